"""Tile sizes: whichever are given, the answer is the same; what was tuned for a device is what runs there."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import ragged_paged_attention, tpu_work, tuned, xla
from tests.kernels.ragged_batches import Shape, random_batch

MIXED = Shape(6, 2, 16, 8, 8, 5, 64, longest=40)
DECODES = Shape(6, 2, 16, 8, 8, 5, 5, decode_only=True)


def attend(shape: Shape, **options: Any) -> np.ndarray:
    batch = random_batch(shape, seed=1, logit_size=3.0)
    out, _ = ragged_paged_attention(
        *batch.operands, scale=shape.scale, decode_only=shape.decode_only, **options
    )
    return np.asarray(out)[: batch.query_starts[-1]]  # the rest is padding


@pytest.mark.parametrize("shape", [MIXED, DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize(
    "tiling",
    [
        xla.Tiling(8, (1, 1), (8, 8), (16, 8)),
        xla.Tiling(16, (3, 5), (24, 16), (8, 64)),
        xla.Tiling(256, (4, 64), (64, 256), (256, 512)),
    ],
    ids=str,
)
def test_tiles_change_nothing(shape: Shape, tiling: xla.Tiling) -> None:
    # Sums in another order: a few units in the last place of numbers around 1.
    np.testing.assert_allclose(
        attend(shape, tiling=tiling), attend(shape, backend="reference"), rtol=2e-5, atol=2e-6
    )


def test_decodes_gather_a_few_mebibytes_at_a_time() -> None:
    for kv_heads in (1, 2, 3, 8, 12, 32, 71):
        for head_dim in (64, 96, 128, 256):
            tiling = xla.Tiling.choose(kv_heads, head_dim)
            gathered = tiling.decode_lanes[1] * tiling.decode_block * 2 * kv_heads * head_dim * 4
            fewest = 4 * tiling.decode_block * 2 * kv_heads * head_dim * 4
            assert gathered <= max(3 << 20, fewest)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Writes a table for this device, and gives the tilings that the backend is called with."""
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.read_table.cache_clear()
    yield lambda values: tuned.table_path(jax.devices()[0].device_kind).write_text(json.dumps(values))
    tuned.read_table.cache_clear()


def test_a_tuned_tiling_is_used_for_its_shape_alone(table: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    best, used = xla.Tiling(8, (1, 2), (8, 8), (16, 8)), []
    run = xla.attend
    monkeypatch.setattr(xla, "attend", lambda *a, tiling: used.append(tiling) or run(*a, tiling=tiling))
    batch = random_batch(MIXED, seed=1, logit_size=3.0)
    key = tuned.shape_key(jnp.asarray(batch.q), jnp.asarray(batch.kv_pages), decode_only=False)
    table({"xla": {key: dataclasses.asdict(best)}, "tpu": {key: {"queries": 16, "keys": 32}}})
    attend(MIXED)
    attend(DECODES)
    attend(MIXED, tiling=xla.Tiling())
    assert used == [best, None, xla.Tiling()]
    assert tpu_work.Tiling.from_fields(tuned.tuned_tiling("tpu", key)) == tpu_work.Tiling(16, 32)


def test_tilings_of_a_gpu_survive_being_written() -> None:
    gpu = pytest.importorskip("pallas_kernels.ragged_paged_attention.gpu", exc_type=ImportError)
    tiling = gpu.Tiling(gpu.Cut(pairs=2, splits=3, pieces=2), gpu.Cut(warpgroups=2, keys=128))
    assert gpu.Tiling.from_fields(json.loads(json.dumps(dataclasses.asdict(tiling)))) == tiling


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_what_has_no_tiles_says_so(backend: str) -> None:
    with pytest.raises(ValueError, match=f"{backend} backend has no tiles"):
        attend(MIXED, backend=backend, tiling=xla.Tiling())

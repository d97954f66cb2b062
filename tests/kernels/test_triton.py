"""The Triton kernel against float64: in Triton's interpreter, or where there is a GPU (`JAX_PLATFORMS=cuda`)
on that; and compiled for Ampere and Hopper, which need not be there.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import gpu_tiles, triton
from pallas_kernels.ragged_paged_attention.options import AttentionOptions
from pallas_kernels.ragged_paged_attention.triton import Cut, Tiling
from tests.kernels.oracle import check
from tests.kernels.ragged_batches import Batch, Shape, options_of, random_batch

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton (pip install 'triton>=3.7')"
)

Decodes = functools.partial(Shape, decode_only=True, lse=True)
Mixed = functools.partial(Shape, lse=True)
SMALL = Tiling(Cut(rows=16, keys=16), Cut(rows=32, keys=32))
SPLIT = Tiling(Cut(rows=16, keys=16, splits=4, pieces=3), Cut(rows=32, keys=16))

CASES: dict[str, tuple[Shape, Tiling]] = {
    "decodes": (Decodes(8, 2, 64, 16, 6, 3, 3), SMALL),
    "decodes, keys split": (Decodes(8, 2, 16, 8, 30, 4, 4), SPLIT),
    "decodes, float16": (Decodes(4, 1, 32, 16, 10, 3, 3, dtype=jnp.float16), SPLIT),
    "decodes, more heads than a tile has rows": (Decodes(37, 1, 16, 64, 3, 2, 2), SPLIT),
    "decodes, everything": (
        Decodes(6, 3, 16, 16, 12, 4, 4, window=90, sinks=True, soft_cap=5.0, alibi=True),
        SPLIT,
    ),
    "mixed": (Mixed(6, 2, 16, 16, 8, 5, 70, longest=50), SMALL),
    "mixed, odd head, odd page": (Mixed(3, 1, 7, 3, 25, 3, 40, longest=30), SMALL),
    "mixed, keys split": (Mixed(6, 2, 24, 16, 10, 4, 60, longest=40), SPLIT),
    "mixed, window and sinks": (Mixed(4, 2, 16, 8, 20, 4, 80, longest=60, window=37, sinks=True), SMALL),
    "mixed, spans": (Mixed(2, 1, 16, 32, 5, 4, 80, longest=60, spans=True), SMALL),
    "mixed, ALiBi and soft cap": (Mixed(4, 4, 16, 64, 2, 3, 60, longest=40, alibi=True, soft_cap=9.0), SMALL),
    "mixed, trees": (Mixed(4, 2, 16, 16, 8, 5, 60, longest=20, tree_width=12, sinks=True), SMALL),
    "mixed, wide trees, window": (Mixed(2, 1, 8, 8, 20, 3, 120, longest=80, tree_width=70, window=30), SMALL),
    "mixed, int8 pages": (Mixed(6, 2, 16, 32, 6, 3, 60, longest=40, cache_dtype=jnp.int8), SMALL),
    "decodes, float8_e4m3fn pages": (Decodes(4, 2, 16, 16, 8, 4, 4, cache_dtype=jnp.float8_e4m3fn), SPLIT),
    "mixed, float8_e5m2 pages": (Mixed(4, 2, 16, 16, 8, 4, 40, cache_dtype=jnp.float8_e5m2), SMALL),
    "mixed, bfloat16 pages of float32 queries": (
        Mixed(4, 2, 16, 16, 8, 4, 40, cache_dtype=jnp.bfloat16),
        SMALL,
    ),
}


def run(batch: Batch, shape: Shape, tiling: Tiling | None) -> tuple[np.ndarray, ...]:
    launch = None
    if jax.default_backend() != "gpu":
        from tests.kernels.interpret_triton import launch_interpreted as launch
    attend = jax.jit(functools.partial(triton.attend, tiling=tiling, launch=launch))
    return tuple(np.asarray(x) for x in attend(*batch.operands, options_of(batch, shape)))


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(name: str) -> None:
    shape, tiling = CASES[name]
    batch = random_batch(shape, seed=0, logit_size=(1.0, 8.0)[len(name) % 2])
    check(batch, shape, *run(batch, shape, tiling))


@needs_triton
@pytest.mark.parametrize("tiling", [SMALL, SPLIT], ids=["whole", "split"])
def test_an_empty_batch_leaves_the_cache_alone(tiling: Tiling) -> None:
    shape = Decodes(4, 2, 16, 16, 4, 4, 4)
    full = random_batch(shape, 0, 1.0)
    batch = replace(full, seq_lens=np.zeros(4, np.int32), query_starts=np.zeros(5, np.int32))
    batch = replace(batch, k=np.full_like(full.k, np.nan), v=np.full_like(full.v, np.nan))
    check(batch, shape, *run(batch, shape, tiling))


def _shift(cut: Callable[..., Any], column: str, by: int) -> Callable[..., Any]:
    def shifted(*args: Any, **options: Any) -> Any:
        tiles = cut(*args, **options)
        return tiles._replace(**{column: getattr(tiles, column) + by})

    return shifted


@needs_triton
@pytest.mark.parametrize(("column", "by"), [("begin", 1), ("end", -1), ("position", 1)])
def test_the_check_catches_a_mask_off_by_one(column: str, by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Mixed(2, 1, 16, 8, 10, 3, 40, window=9, alibi=column == "position")
    batch = random_batch(shape, 0, 1.0, [(25, 3), (33, 2), (40, 30)])
    monkeypatch.setattr(gpu_tiles, "cut_long", _shift(gpu_tiles.cut_long, column, by))
    with pytest.raises(AssertionError):
        check(batch, shape, *run(batch, shape, SMALL))


@needs_triton
@pytest.mark.parametrize("mistake", ["scale", "page"])
def test_the_check_catches_a_wrong_scale_and_a_wrong_page(mistake: str) -> None:
    shape = Mixed(2, 1, 16, 8, 10, 3, 40, window=20, alibi=True)
    batch = random_batch(shape, 0, 1.0, [(25, 3), (33, 2), (40, 30)])
    wrong = replace(batch, q=batch.q * np.float32(1.0005))
    if mistake == "page":
        table = batch.page_table.copy()
        table[2, [3, 4]] = table[2, [4, 3]]
        wrong = replace(batch, page_table=table)
    with pytest.raises(AssertionError, match="relative error"):
        check(batch, shape, *run(wrong, shape, SMALL))


@pytest.mark.parametrize(
    ("head_dim", "scale", "message"),
    [
        (272, 1.0, r"head_dim of up to 256; got 272. Use backend='xla'"),
        (16, 0.0, r"positive scale; got 0\.0"),
    ],
)
def test_what_it_cannot_do_is_refused(head_dim: int, scale: float, message: str) -> None:
    batch = random_batch(Decodes(4, 2, head_dim, 16, 4, 4, 4), 0, 1.0)
    with pytest.raises(ValueError, match=message):
        triton.attend(*batch.operands, AttentionOptions(scale=scale, decode_only=True))


LATENT = "deepseek-v3, decode", "deepseek-v3 tp8, decode"


def reports(capability: int, *names: str) -> list[dict[str, Any]]:
    """A process of its own: where kernels are interpreted they cannot be compiled."""
    command = [sys.executable, "-m", "tests.kernels.compile_triton", str(capability), *names]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@needs_triton
@pytest.mark.parametrize("capability", [80, 90])
def test_every_shape_compiles_without_spilling(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    # All of them for Ampere; Hopper has a kernel of its own but of latents, and takes this one where it is
    # asked for.
    names = () if capability == 80 else ("llama-3.1-8b, mixed", "gemma-2-9b, decode", *LATENT)
    found = reports(capability, *names)
    assert {report["name"] for report in found} >= set(names) and len(found) >= 3
    for report in found:
        assert report["spilled_bytes"] == 0, report
        # The least that a thread block may have on any GPU from Ampere on.
        assert report["shared_bytes"] <= 99 * 1024, report
        assert (report["tensor_core_products"] > 0) == ("float32" not in report["name"]), report

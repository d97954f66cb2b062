"""Latent attention's TPU kernel in the TPU interpreter, races detected: against float64, cache exactly."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_ragged_paged_attention import mla_ragged_paged_attention, tpu
from pallas_kernels.ragged_paged_attention import tpu_flash
from pallas_kernels.ragged_paged_attention.tpu_work import Tiling
from tests.kernels.latent_batches import Batch, Shape, check, random_batch

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="interpreted on JAX 0.11 and newer, in one lane of two"
)
RAGGED = [(20, 1), (0, 0), (0, 21), (5, 9), (0, 1), (40, 2), (0, 0)]
DECODES = [(20, 1), (0, 1), (47, 1), (15, 1), (16, 1), (0, 0), (0, 0)]
SMALL = Tiling(queries=16, keys=16)
MIXED = Shape(4, 24, 8, 8, 8, 7, 40)
DECODE = Shape(4, 24, 8, 8, 8, 7, 7, decode_only=True)
CASES: dict[str, tuple[Shape, Tiling]] = {
    "mixed, in two rows": (replace(MIXED, rank=140, spare=108), SMALL),
    "odd sizes, no log-sum-exp": (replace(MIXED, heads=3, rank=7, rope_dim=2, lse=False), Tiling(32, 8)),
    "latents of two registers, bfloat16 pages": (
        replace(MIXED, rank=256, rope_dim=64, cache_dtype=jnp.bfloat16), SMALL,
    ),
    "more heads than are computed together, soft cap": (
        replace(MIXED, heads=40, soft_cap=3.0, dtype=jnp.bfloat16), Tiling(32, 32),
    ),
    "decodes": (DECODE, Tiling(1, 16)),
    "decodes, bfloat16, in two rows": (
        replace(DECODE, rank=256, rope_dim=32, spare=224, dtype=jnp.bfloat16), Tiling(1, 16),
    ),
}  # fmt: skip


@pytest.fixture
def interpreter() -> Iterator[None]:
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    pltpu.reset_tpu_interpret_mode_state()


def batch_of(shape: Shape) -> Batch:
    return random_batch(shape, 0, 2.0, DECODES if shape.decode_only else RAGGED)


def run(batch: Batch, shape: Shape, tiling: Tiling) -> tuple[np.ndarray, ...]:
    op = functools.partial(mla_ragged_paged_attention, **shape.options, backend="tpu", tiling=tiling)
    return tuple(np.asarray(x) for x in jax.jit(op)(*batch.operands))


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(name: str) -> None:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    shape, tiling = CASES[name]
    batch = batch_of(shape)
    check(batch, shape, *run(batch, shape, tiling))
    assert not interpret_pallas_call.races.races_found


@interpreted
@pytest.mark.usefixtures("interpreter")
@pytest.mark.parametrize("mistake", ["mask", "scale", "page"])
def test_a_mistake_is_caught(mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = given = batch_of(MIXED)
    if mistake == "mask":
        right = tpu_flash.FlashTile._visible

        def wrong(self: Any, *arguments: Any) -> tuple[jax.Array, jax.Array]:
            distance, _ = right(self, *arguments)
            return distance, distance >= 1

        monkeypatch.setattr(tpu_flash.FlashTile, "_visible", wrong)
    elif mistake == "scale":
        given = replace(batch, q_latent=batch.q_latent * np.float32(1.0005))
    else:
        table = batch.page_table.copy()
        table[5, 3] = table[5, 4]
        given = replace(batch, page_table=table)
    with pytest.raises(AssertionError, match="relative error"):
        check(batch, MIXED, *run(given, MIXED, SMALL))


def test_tiles() -> None:
    assert tpu.choose_tiling(2048, 128, 64, 128, False) == Tiling(16, 512)
    assert tpu.choose_tiling(2048, 16, 64, 128, False) == Tiling(128, 512)
    assert tpu.choose_tiling(20, 16, 64, 128, False) == Tiling(32, 512)
    assert tpu.choose_tiling(64, 128, 256, 1, True) == Tiling(1, 256)
    assert [tpu.heads_together(heads, 16) for heads in (128, 40, 37, 7)] == [32, 20, 1, 7]
    assert tpu.heads_together(128, 1) == 128

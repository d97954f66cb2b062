"""Latent attention's TPU kernel in the TPU interpreter, races detected; and compiled for chips."""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_ragged_paged_attention import cache_rows, mla_ragged_paged_attention, tpu
from pallas_kernels.mla_ragged_paged_attention.shapes import LAYERS
from pallas_kernels.ragged_paged_attention import tpu_flash
from pallas_kernels.ragged_paged_attention.tpu_work import Tiling
from tests.kernels.compile_tpu import TOPOLOGIES, sharding_on
from tests.kernels.latent_batches import Batch, Shape, check, random_batch

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="interpreted on JAX 0.11 and newer, in one lane of two"
)
compiled = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler (pip install 'jaxllm[tpu]')"
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


def compile_layers(chip: str, name: str, num_tokens: int, page_size: int) -> tuple[Any, tuple[int, ...]]:
    """A loop over layers, whose rows depend on the output of the one before, and the cache's shape."""
    here, shape = sharding_on(chip), LAYERS[name]
    num_seqs, context = min(64, num_tokens), 8192
    cache = (4, 256, page_size, *cache_rows("tpu", shape.kv_lora_rank, shape.rope_dim))
    row_major = Format(Layout(tuple(range(5))), here)

    def array(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=here)

    def layers(q: Any, q_rope: Any, pages: Any, table: Any, lens: Any, starts: Any) -> Any:
        def layer(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, pages = carry
            out, rows = mla_ragged_paged_attention(
                x, q_rope, x[:, 0], q_rope[:, 0], pages.reshape(*cache[:3], -1), index, table, lens, starts,
                scale=0.1, decode_only=num_tokens == num_seqs, backend="tpu",
            )  # fmt: skip
            return x + out, rows.reshape(pages.shape)

        return jax.lax.fori_loop(0, cache[0], layer, (q, pages))

    jitted = jax.jit(layers, donate_argnums=2, out_shardings=(here, row_major))
    lowered = jitted.lower(
        array(num_tokens, shape.heads, shape.kv_lora_rank, dtype=jnp.bfloat16),
        array(num_tokens, shape.heads, shape.rope_dim, dtype=jnp.bfloat16),
        jax.ShapeDtypeStruct(cache, jnp.bfloat16, sharding=row_major),
        array(num_seqs, context // page_size),
        array(num_seqs),
        array(num_seqs + 1),
    )
    return lowered.compile(), cache


@compiled
@pytest.mark.parametrize(
    ("chip", "name", "num_tokens", "page_size"),
    [
        *((chip, "deepseek-v3", tokens, 64) for chip in TOPOLOGIES for tokens in (64, 1024)),
        ("v6e", "deepseek-v2-lite", 64, 16),
        ("v6e", "deepseek-v2 tp4", 2048, 128),
    ],
)
def test_compiles_in_place(chip: str, name: str, num_tokens: int, page_size: int) -> None:
    program, cache = compile_layers(chip, name, num_tokens, page_size)
    text, memory = program.as_text(), program.memory_analysis()
    assert "tpu_custom_call" in text
    shape = re.escape(f"[{','.join(map(str, cache))}]")
    assert not re.findall(rf"= \w+{shape}\S* (?:copy|transpose|convert|copy-start)\(", text)
    # As large as its numbers, without padding.
    assert memory.alias_size_in_bytes == 2 * math.prod(cache)

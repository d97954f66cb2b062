"""Latent attention's TPU kernel, compiled for v5e, v6e and v7x at the shapes that models serve."""

from __future__ import annotations

import importlib.util
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.layout import Format, Layout

from pallas_kernels.mla_ragged_paged_attention import cache_rows, mla_ragged_paged_attention
from pallas_kernels.mla_ragged_paged_attention.shapes import LAYERS
from tests.kernels.compile_tpu import TOPOLOGIES, sharding_on

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler (pip install 'jaxllm[tpu]')"
)


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


@pytest.mark.parametrize(
    ("chip", "name", "num_tokens", "page_size"),
    [
        *((chip, "deepseek-v3", 64, 64) for chip in TOPOLOGIES),
        ("v5e", "deepseek-v3", 1024, 64),
        ("v7x", "deepseek-v3", 1024, 64),
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

"""The portable fast path: flash attention in XLA (`xla_flash`) over pages of interleaved keys and values.

Scales of k and v are applied to the queries and the output, which are smaller than the keys and values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.cache import write_new_tokens
from pallas_kernels.ragged_paged_attention.options import AttentionOptions
from pallas_kernels.ragged_paged_attention.xla_flash import PagedBlocks, Tiling, flash_attention

__all__ = ["Tiling", "attend"]


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    options: AttentionOptions,
    tiling: Tiling | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See `ragged_paged_attention`, ; lse is None unless asked for."""
    num_tokens, _, head_dim = q.shape
    num_kv_heads = k.shape[1]
    tiling = tiling or Tiling.choose(num_kv_heads, head_dim)
    kv_pages = write_new_tokens(k, v, kv_pages, layer, page_table, seq_lens, query_starts, options)
    scale = options.scale if options.k_scale is None else options.scale * options.k_scale
    blocks = PagedBlocks(kv_pages, layer, head_dim, _split_heads)
    grouped = (q.astype(jnp.float32) * scale).reshape(num_tokens, num_kv_heads, -1, head_dim)
    out, lse = flash_attention(grouped, blocks, page_table, seq_lens, query_starts, options, tiling)
    if options.v_scale is not None:
        out = out * options.v_scale
    if lse is not None:
        lse = lse.reshape(q.shape[:2])
    return out.reshape(q.shape).astype(q.dtype), kv_pages, lse


def _split_heads(tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[..., n, 2 * kv_heads, head_dim] to keys and values [..., n, kv_heads, head_dim]."""
    pairs = tokens.reshape(*tokens.shape[:-2], tokens.shape[-2] // 2, 2, tokens.shape[-1])
    return pairs[..., 0, :], pairs[..., 1, :]

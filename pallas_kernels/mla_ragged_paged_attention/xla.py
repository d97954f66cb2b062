"""The portable fast path: the sibling's flash attention in XLA, over rows that are key and value at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.mla_ragged_paged_attention.rows import query_rows, token_rows
from pallas_kernels.ragged_paged_attention.cache import write_rows
from pallas_kernels.ragged_paged_attention.options import AttentionOptions
from pallas_kernels.ragged_paged_attention.xla_flash import PagedBlocks, Tiling, flash_attention

__all__ = ["Tiling", "attend"]


def attend(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    k_rope: jax.Array,
    pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    options: AttentionOptions,
    tiling: Tiling | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See `mla_ragged_paged_attention`; lse is None unless asked for."""
    rank, width = q_latent.shape[2], q_latent.shape[2] + q_rope.shape[2]
    # A row is read once for both, so it counts as half a key and half a value.
    tiling = tiling or Tiling.choose(1, -(-width // 2))
    pages = write_rows(token_rows(latent, k_rope, pages), pages, layer, page_table, seq_lens, query_starts)

    def split(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """[..., n, width] to keys and values [..., n, 1, dim]."""
        return rows[..., None, :width], rows[..., None, :rank]

    q = query_rows(q_latent, q_rope, width).astype(jnp.float32)[:, None] * options.scale
    blocks = PagedBlocks(pages, layer, rank, split)
    out, lse = flash_attention(q, blocks, page_table, seq_lens, query_starts, options, tiling)
    return out[:, 0].astype(q_latent.dtype), pages, None if lse is None else lse[:, 0]

"""The op on TPU: the sibling's Pallas Mosaic kernel (`ragged_paged_attention.tpu_kernel` says how it works).

A token stands in a page as two rows, [page_size, 2, width / 2], since a single row of 16-bit numbers would be
padded to two. The kernel copies a block to the chip once, joins the rows of a token, and multiplies them
twice: whole as keys, their first lanes as values. Key-value heads are what the kernel calls heads that it
computes together; here all of them read the same row, and in decodes one product serves them all.

What lives where differs from the sibling in sizes (bfloat16, 128 heads, rank 512, rope 64, width 768):
    VMEM    ring of blocks [RING, keys, 2, width / 2]               1.5 MiB at 512 keys
            the block, rows joined [keys, width]                    0.8 MiB
            ring of query tiles [RING, queries, heads, width]       6 MiB at 16 queries
            the tile's queries by head [heads * queries, width]     3 MiB
            running maximum and sum [heads * queries, 128] float32  1 MiB each
            running output [heads * queries, rank] float32          4 MiB
            the tile's output [queries, heads, rank]                2 MiB
"""

from __future__ import annotations

import jax
from jax.experimental import pallas as pl

from pallas_kernels.mla_ragged_paged_attention.rows import query_rows, token_rows
from pallas_kernels.ragged_paged_attention.options import AttentionOptions
from pallas_kernels.ragged_paged_attention.tpu import attend_rows
from pallas_kernels.ragged_paged_attention.tpu_flash import STRIP
from pallas_kernels.ragged_paged_attention.tpu_rows import LANES
from pallas_kernels.ragged_paged_attention.tpu_work import Tiling

__all__ = ["Tiling", "attend"]

# Rows of queries whose logits are computed at once.
ROWS = 512
KEYS = 512


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `mla_ragged_paged_attention`; lse is zero unless `options.return_lse`.

    Raises:
        ValueError: what this backend cannot do, and what to use instead.
    """
    (num_tokens, heads, rank), (*_, page_size, width) = q_latent.shape, pages.shape
    if tiling is None:
        tiling = choose_tiling(num_tokens, heads, page_size, page_table.shape[1], options.decode_only)
    rows = 2 if width % (2 * LANES) == 0 else 1
    held = (rows, width // rows)
    out, held_pages, lse = attend_rows(
        query_rows(q_latent, q_rope, width),
        token_rows(latent, k_rope, pages).reshape(num_tokens, *held),
        pages.reshape(*pages.shape[:3], *held),
        layer,
        page_table,
        seq_lens,
        query_starts,
        options,
        tiling,
        group=heads_together(heads, tiling.queries),
        value_lanes=min(width, -(-rank // LANES) * LANES),
        name="mla_ragged_paged_attention",
    )
    return out[..., :rank], held_pages.reshape(pages.shape), lse


def choose_tiling(
    num_tokens: int, heads: int, page_size: int, pages_per_seq: int, decode_only: bool
) -> Tiling:
    """Blocks of 512 keys, and as many queries as make 2,048 rows of all heads."""
    keys = min(max(1, KEYS // page_size), pages_per_seq) * page_size
    if decode_only:
        return Tiling(1, keys)
    queries = STRIP * max(1, 4 * ROWS // heads // STRIP)
    return Tiling(min(queries, STRIP * pl.cdiv(num_tokens, STRIP)), keys)


def heads_together(heads: int, queries: int) -> int:
    """Heads whose logits are computed at once: the most that share all heads evenly and make `ROWS` rows."""
    return max(n for n in range(1, heads + 1) if heads % n == 0 and (n == 1 or n * queries <= ROWS))

"""What surrounds a GPU kernel, whatever it is written in: XLA cuts the work, feeds it, and merges results.

XLA has scattered the new keys and values into their pages, in place. It cuts the queries into tiles and the
keys into pieces (`gpu_schedule.py`), and gathers the rows of each tile. The kernel computes the attention of
every piece. XLA merges the pieces where there are several, and gathers the rows back.

It runs twice where prefills and decodes may be mixed: once for the sequences of few queries, which are
bound by memory and whose keys are cut into pieces, and once for those of many, which are bound by products.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.ragged_paged_attention.cache import token_positions
from pallas_kernels.ragged_paged_attention.gpu_schedule import (
    KeyCut,
    Tiles,
    Work,
    cut_keys,
    cut_long,
    cut_short,
    is_short,
    is_split,
    short_tiles,
)
from pallas_kernels.ragged_paged_attention.options import AttentionOptions


class TileKernel(Protocol):
    """Attention of every item of a `Work`."""

    def __call__(
        self,
        q: jax.Array,
        kv_pages: jax.Array,
        layer: jax.Array,
        page_table: jax.Array,
        items: jax.Array,
        begin: jax.Array,
        end: jax.Array,
        *,
        tree: jax.Array | None,
        tree_bits: jax.Array | None,
        position: jax.Array | None,
        slopes: jax.Array | None,
        sinks: jax.Array | None,
        factors: jax.Array | None,
        scale: float,
        soft_cap: float | None,
        cut: Any,
        out_dtype: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """Computes softmax(q k^T) v for tiles of R query rows.

        Args:
            q: [tiles, kv_heads, r, D], the first r rows of every tile, r a multiple of 8; the others may
                hold anything.
            kv_pages: [layers, pages, page_size, ...], whatever the kernel's pages hold of a token.
            layer: int32[1].
            page_table: int32[S, P].
            items: int32[items, 7], see `gpu_schedule.Work`.
            begin, end, tree, tree_bits: the keys that each row sees, see `gpu_schedule.Tiles`.
            position, slopes: int32[tiles, R] and float32[kv_heads, tiles, R], for ALiBi.
            sinks: float32[kv_heads, tiles, R].
            factors: float32[2], of keys and of values.

        Returns:
            (out [items, kv_heads, r, value_dim], lse float32[items, kv_heads, R]). Items without keys may
            be left unwritten.
        """
        ...


def attend_in_tiles(
    q: jax.Array,
    kv_heads: int,
    kv_pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    options: AttentionOptions,
    *,
    short: KeyCut,
    long: KeyCut,
    kernel: TileKernel,
) -> tuple[jax.Array, jax.Array]:
    """Attention of q [T, heads, D] over keys that are in their pages, as the ops describe the batch.

    Args:
        kv_heads: what the heads are shared by.
        short, long: how sequences of few queries are cut, and those of many.

    Returns:
        (out [T, heads, value_dim] in q's dtype, lse float32[T, heads]).
    """
    tokens, heads, _ = q.shape
    group = heads // kv_heads
    sequence, _, is_real = token_positions(seq_lens, query_starts, tokens)

    def attend_some(tiles: Tiles, cut: KeyCut) -> tuple[jax.Array, jax.Array]:
        # Most rows of a decode's tile are there for the shape of the product only.
        given = min(cut.rows, -(-group // 8) * 8) if options.decode_only else cut.rows
        out, lse = _attend(q, kv_heads, kv_pages, layer, page_table, tiles, cut, given, options, kernel)
        return _rows_of_tokens(out, lse, tiles, sequence, query_starts, group)

    out, lse = attend_some(cut_short(short.rows, tokens, seq_lens, query_starts, group, options), short)
    if not options.decode_only:
        tiles = cut_long(long.rows, tokens, seq_lens, query_starts, group, options, short_rows=short.rows)
        out_of_long, lse_of_long = attend_some(tiles, long)
        few = is_short(query_starts, group, short.rows)[sequence, None, None]
        out, lse = jnp.where(few[..., None], out, out_of_long), jnp.where(few, lse, lse_of_long)
    out = jnp.where(is_real[:, None, None, None], out, 0)
    return out.astype(q.dtype).reshape(tokens, heads, -1), lse.reshape(tokens, heads)


def cost_of_tiles(
    q: jax.Array, value_dim: int, kv_pages: jax.Array, page_table: jax.Array
) -> pl.CostEstimate:
    """Of tiles whose sequences fill the page table: lengths are not known when this is compiled."""
    keys = page_table.shape[1] * kv_pages.shape[2]
    kv_bytes = keys * math.prod(kv_pages.shape[3:]) * kv_pages.dtype.itemsize
    rows, both = q.size // q.shape[-1], q.shape[-1] + value_dim
    return pl.CostEstimate(
        flops=2 * rows * both * keys,
        transcendentals=rows * keys,
        bytes_accessed=q.shape[0] * kv_bytes + rows * both * q.dtype.itemsize,
    )


def refuse_scale(backend: str, options: AttentionOptions) -> None:
    """Raises: the maximum of scaled logits is not the scaled maximum where a scale is not positive."""
    if options.scale <= 0:
        raise ValueError(
            f"The {backend} backend needs a positive scale; got {options.scale}. Use backend='xla'."
        )


def split_decodes(
    group: int, kv_heads: int, num_seqs: int, units: int, rows: int, options: AttentionOptions
) -> tuple[int, int]:
    """(splits, pieces) of a cut of short sequences, for a device that works on so many items at a time.

    Four rounds of work for each even out what is uneven. Merging reads as many pieces of a tile as there
    may be, so many tiles are cut into few.
    """
    splits = -(-4 * units // kv_heads)
    most = 512 if options.decode_only else 256
    return splits, min(splits, 64, -(-most // (num_seqs * short_tiles(group, rows))))


def _attend(
    q: jax.Array,
    kv_heads: int,
    kv_pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    tiles: Tiles,
    cut: KeyCut,
    given: int,
    options: AttentionOptions,
    kernel: TileKernel,
) -> tuple[jax.Array, jax.Array]:
    """Attention of tiles: (out [tiles, kv_heads, given, value_dim], lse float32[tiles, kv_heads, R])."""
    tokens, heads, head_dim = q.shape
    group = heads // kv_heads
    work = cut_keys(tiles, cut, kv_pages.shape[2])
    token, group_head = tiles.token[:, :given], tiles.group_head[:, :given]
    q_tiles = q.reshape(tokens, kv_heads, group, head_dim)[token, :, group_head].swapaxes(1, 2)

    def of_rows(of_heads: jax.Array | None) -> jax.Array | None:
        if of_heads is None:
            return None
        return of_heads.astype(jnp.float32).reshape(kv_heads, group)[:, tiles.group_head]

    factors = None
    if options.k_scale is not None or options.v_scale is not None:
        scales = [1.0 if s is None else s for s in (options.k_scale, options.v_scale)]
        factors = jnp.stack([jnp.asarray(s, jnp.float32) for s in scales])
    out, lse = kernel(
        q_tiles,
        kv_pages,
        jnp.full((1,), layer, jnp.int32),
        page_table,
        work.items,
        tiles.begin,
        tiles.end,
        tree=tiles.tree,
        tree_bits=tiles.tree_bits,
        position=None if options.alibi_slopes is None else tiles.position,
        slopes=of_rows(options.alibi_slopes),
        sinks=of_rows(options.sinks),
        factors=factors,
        scale=options.scale,
        soft_cap=options.soft_cap,
        cut=cut,
        out_dtype=jnp.float32 if is_split(cut) else q.dtype,
    )
    return _merge(out, lse, work, cut.pieces) if is_split(cut) else (out, lse)


def _merge(out: jax.Array, lse: jax.Array, work: Work, pieces: int) -> tuple[jax.Array, jax.Array]:
    """[items, ...] to [tiles, ...]: the mean of a tile's pieces, weighted by their shares of the softmax."""
    piece = jnp.arange(pieces, dtype=jnp.int32)
    item = work.first[:, None] + jnp.minimum(piece, work.pieces[:, None] - 1)
    item = jnp.clip(item, 0, out.shape[0] - 1)
    exists = (piece < work.pieces[:, None])[:, :, None, None]
    parts = jnp.where(exists, lse[item], -jnp.inf)
    total = jax.nn.logsumexp(parts, axis=1)
    given = out.shape[2]
    share = jnp.where(exists, jnp.exp(parts - total[:, None]), 0)[..., :given, None]
    # A tile without pieces points at results that were never written.
    return jnp.where(share > 0, share * out[item], 0).sum(axis=1), total


def _rows_of_tokens(
    out: jax.Array,
    lse: jax.Array,
    tiles: Tiles,
    sequence: jax.Array,
    query_starts: jax.Array,
    group: int,
) -> tuple[jax.Array, jax.Array]:
    """out [tiles, kv_heads, r, value_dim] and lse [tiles, kv_heads, R] to [T, kv_heads, group, ...].

    Tokens that are in none of the tiles get anything.
    """
    rows = lse.shape[2]
    row = jnp.arange(sequence.shape[0], dtype=jnp.int32) - query_starts[sequence]
    row = row[:, None] * group + jnp.arange(group, dtype=jnp.int32)
    tile = jnp.clip(tiles.first[sequence][:, None] + row // rows, 0, out.shape[0] - 1)
    row = jnp.minimum(row % rows, out.shape[2] - 1)
    return out[tile, :, row].swapaxes(1, 2), lse[tile, :, row].swapaxes(1, 2)

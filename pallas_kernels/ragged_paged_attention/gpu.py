"""The op on NVIDIA Hopper GPUs (H100, H200): a warp-specialised kernel in Pallas Mosaic GPU, fed by XLA.

XLA scatters the new keys and values into their pages, in place, cuts the queries into tiles and the keys
into pieces (`gpu_schedule.py`), and gathers the rows of each tile. The kernel (`gpu_kernel.py`) computes
the attention of every piece. XLA merges the pieces where there are several, and gathers the rows back.

It runs twice where prefills and decodes may be mixed: once for the sequences of few queries, which are
bound by memory and whose keys are cut into pieces, and once for those of many, which are bound by wgmma.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.cache import token_positions, write_new_tokens
from pallas_kernels.ragged_paged_attention.gpu_kernel import attend_tiles
from pallas_kernels.ragged_paged_attention.gpu_schedule import (
    Cut,
    Tiles,
    Work,
    cut_keys,
    cut_long,
    cut_short,
    is_short,
    short_tiles,
)
from pallas_kernels.ragged_paged_attention.options import AttentionOptions

# Streaming multiprocessors of an H100 or H200; on others only the balance of the work differs.
NUM_SMS = 132


@dataclass(frozen=True)
class Tiling:
    """How sequences of few queries are cut, and those of many."""

    short: Cut
    long: Cut

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Tiling:
        """What `dataclasses.asdict` made of one."""
        return cls(Cut(**fields["short"]), Cut(**fields["long"]))


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
    *,
    tiling: Tiling | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `ragged_paged_attention`.

    Args:
        tiling: how the work is cut; by default what `choose_tiling` says.
        interpret: `plgpu.InterpretGPUParams` to simulate the kernel on a CPU.

    Raises:
        ValueError: what these kernels cannot do.
    """
    _refuse_unsupported(q, kv_pages, options)
    tokens, heads, _ = q.shape
    group = heads // k.shape[1]
    if tiling is None:
        tiling = choose_tiling(q, kv_pages, page_table, options)
    kv_pages = write_new_tokens(k, v, kv_pages, layer, page_table, seq_lens, query_starts, options)
    sequence, _, is_real = token_positions(seq_lens, query_starts, tokens)

    def attend_some(tiles: Tiles, cut: Cut) -> tuple[jax.Array, jax.Array]:
        # Most rows of a decode's tile are there for wgmma only.
        given = min(64, -(-group // 8) * 8) if options.decode_only else cut.rows
        out, lse = _attend(q, kv_pages, layer, page_table, tiles, cut, given, options, interpret=interpret)
        return _rows_of_tokens(out, lse, tiles, sequence, query_starts, group)

    tiles = cut_short(tokens, seq_lens, query_starts, group, options)
    out, lse = attend_some(tiles, tiling.short)
    if not options.decode_only:
        tiles = cut_long(tiling.long.rows, tokens, seq_lens, query_starts, group, options)
        out_of_long, lse_of_long = attend_some(tiles, tiling.long)
        short = is_short(query_starts, group)[sequence, None, None]
        out, lse = jnp.where(short[..., None], out, out_of_long), jnp.where(short, lse, lse_of_long)
    out = jnp.where(is_real[:, None, None, None], out, 0)
    return out.astype(q.dtype).reshape(q.shape), kv_pages, lse.reshape(tokens, heads)


def choose_tiling(
    q: jax.Array, kv_pages: jax.Array, page_table: jax.Array, options: AttentionOptions
) -> Tiling:
    """A tiling by shape: many copies in flight for sequences of few queries, wide tiles for the others."""
    head_dim, page_size, kv_heads = q.shape[2], kv_pages.shape[2], kv_pages.shape[3] // 2
    group = q.shape[1] // kv_heads
    num_seqs, capacity = page_table.shape[0], page_table.shape[1] * page_size
    needs_registers = options.alibi_slopes is not None or options.tree_mask is not None
    wide, narrow_pages = head_dim > 128, kv_pages.dtype.itemsize == 1
    # As many keys as registers allow, and as many stages as shared memory.
    long = Cut(
        warpgroups=2,
        keys=64 if wide or needs_registers else 128,
        stages=1 if wide and narrow_pages else 2,
    )
    pairs, stages = 1 if wide else 2, 1 if narrow_pages else 2
    if not options.decode_only and capacity <= 4096:
        return Tiling(Cut(pairs=pairs, stages=stages), long)
    # Four rounds of work for each warpgroup that computes even out what is uneven. Merging reads as many
    # pieces of a tile as there may be, so many tiles are cut into few.
    splits = -(-4 * NUM_SMS * pairs // kv_heads)
    most = 512 if options.decode_only else 256
    pieces = min(splits, 64, -(-most // (num_seqs * short_tiles(group))))
    return Tiling(Cut(pairs=pairs, stages=stages, splits=splits, pieces=pieces), long)


def _attend(
    q: jax.Array,
    kv_pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    tiles: Tiles,
    cut: Cut,
    given: int,
    options: AttentionOptions,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array]:
    """Attention of tiles: (out [tiles, kv_heads, given, D], lse float32[tiles, kv_heads, R])."""
    tokens, heads, head_dim = q.shape
    kv_heads = kv_pages.shape[3] // 2
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
    out, lse = attend_tiles(
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
        out_dtype=jnp.float32 if cut.is_split else q.dtype,
        interpret=interpret,
    )
    return _merge(out, lse, work, cut.pieces) if cut.is_split else (out, lse)


def _refuse_unsupported(q: jax.Array, kv_pages: jax.Array, options: AttentionOptions) -> None:
    head_dim, page_size = q.shape[-1], kv_pages.shape[2]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"The gpu backend multiplies bfloat16 or float16; q is {q.dtype.name}. Use backend='xla', which "
            "computes in float32."
        )
    if options.scale <= 0:
        raise ValueError(f"The gpu backend needs a positive scale; got {options.scale}. Use backend='xla'.")
    if kv_pages.dtype != q.dtype and kv_pages.dtype.itemsize > 1:
        raise ValueError(
            f"The gpu backend reads pages of 8 bits or of q's dtype, {q.dtype.name}; kv_pages are "
            f"{kv_pages.dtype.name}. Use backend='xla'."
        )
    if head_dim % 16 or head_dim > 256:
        raise ValueError(
            f"The gpu backend needs a head_dim that is a multiple of 16 up to 256; got {head_dim}. Use "
            "backend='xla'."
        )
    if page_size % 8 or (64 % page_size and page_size % 64):
        raise ValueError(
            "The gpu backend needs a page_size of 8, 16 or 32, or a multiple of 64; got "
            f"{page_size}. Change the page size, or use backend='xla'."
        )
    if options.tree_mask is not None and options.tree_mask.shape[1] > 64:
        raise ValueError(
            "The gpu backend takes trees of up to 64 tokens; tree_mask has "
            f"{options.tree_mask.shape[1]} columns. Verify fewer at a time, or use backend='xla'."
        )


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
    """out [tiles, kv_heads, r, D] and lse [tiles, kv_heads, R] to [T, kv_heads, group, ...].

    Tokens that are in none of the tiles get anything.
    """
    rows = lse.shape[2]
    row = jnp.arange(sequence.shape[0], dtype=jnp.int32) - query_starts[sequence]
    row = row[:, None] * group + jnp.arange(group, dtype=jnp.int32)
    tile = jnp.clip(tiles.first[sequence][:, None] + row // rows, 0, out.shape[0] - 1)
    row = jnp.minimum(row % rows, out.shape[2] - 1)
    return out[tile, :, row].swapaxes(1, 2), lse[tile, :, row].swapaxes(1, 2)

"""The op on NVIDIA Hopper GPUs (H100, H200): a warp-specialised kernel in Pallas Mosaic GPU, fed by XLA.

XLA scatters the new keys and values into their pages, in place, cuts the queries into tiles and the keys
into pieces (`gpu_schedule.py`), and gathers the rows of each tile. The kernel (`gpu_kernel.py`) computes
the attention of every piece. XLA merges the pieces where there are several, and gathers the rows back.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.cache import token_positions, write_new_tokens
from pallas_kernels.ragged_paged_attention.gpu_kernel import attend_tiles
from pallas_kernels.ragged_paged_attention.gpu_schedule import (
    Tiles,
    Tiling,
    Work,
    count_tiles,
    cut_keys,
    cut_rows,
)
from pallas_kernels.ragged_paged_attention.options import AttentionOptions

# Streaming multiprocessors of an H100 or H200; on others only the balance of the work differs.
NUM_SMS = 132


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
    tokens, heads, head_dim = q.shape
    kv_heads, page_size = k.shape[1], kv_pages.shape[2]
    group, sequences = heads // kv_heads, page_table.shape[0]
    if tiling is None:
        tiling = choose_tiling(sequences, group, kv_heads, head_dim, kv_pages.dtype, options)
    kv_pages = write_new_tokens(k, v, kv_pages, layer, page_table, seq_lens, query_starts, options)

    num_tiles = count_tiles(tokens, sequences, group, tiling.rows, options.decode_only)
    tiles = cut_rows(tokens, seq_lens, query_starts, group, tiling.rows, num_tiles, options)
    work = cut_keys(tiles, tiling, page_size)
    # Most rows of a decode's tile are there for wgmma only.
    given = min(tiling.rows, -(-group // 8) * 8) if options.decode_only else tiling.rows
    token, group_head = tiles.token[:, :given], tiles.group_head[:, :given]
    q_tiles = q.reshape(tokens, kv_heads, group, head_dim)[token, :, group_head].swapaxes(1, 2)

    def of_rows(of_heads: jax.Array) -> jax.Array:
        return of_heads.astype(jnp.float32).reshape(kv_heads, group)[:, tiles.group_head]

    factors = None
    if options.k_scale is not None or options.v_scale is not None:
        scales = [1.0 if s is None else s for s in (options.k_scale, options.v_scale)]
        factors = jnp.stack([jnp.asarray(s, jnp.float32) for s in scales])
    has_alibi = options.alibi_slopes is not None
    out, lse = attend_tiles(
        q_tiles,
        kv_pages,
        jnp.full((1,), layer, jnp.int32),
        page_table,
        work.items,
        tiles.begin,
        tiles.end,
        position=tiles.position if has_alibi else None,
        slopes=None if options.alibi_slopes is None else of_rows(options.alibi_slopes),
        sinks=None if options.sinks is None else of_rows(options.sinks),
        factors=factors,
        scale=options.scale,
        soft_cap=options.soft_cap,
        tiling=tiling,
        out_dtype=jnp.float32 if tiling.is_split else q.dtype,
        interpret=interpret,
    )
    if tiling.is_split:
        out, lse = _merge(out, lse, work, tiling.pieces)
    out, lse = _rows_of_tokens(out, lse, tiles, seq_lens, query_starts, tokens, group)
    return out.astype(q.dtype).reshape(q.shape), kv_pages, lse.reshape(tokens, heads)


def choose_tiling(
    sequences: int, group: int, kv_heads: int, head_dim: int, dtype: Any, options: AttentionOptions
) -> Tiling:
    """The tiling by shape: decodes are bound by memory and need many copies in flight, prefills by wgmma.

    Args:
        sequences: S.
        group: query heads of a key-value head.
        dtype: of the pages; those of 8 bits take room in shared memory from the stages.
    """
    wide = head_dim > 128
    narrow_pages = jnp.dtype(dtype).itemsize == 1
    if not options.decode_only:
        # As many keys as registers allow.
        keys = 64 if wide or options.alibi_slopes is not None else 128
        return Tiling(warpgroups=2, keys=keys, stages=1 if wide and narrow_pages else 2)
    pairs = 1 if wide else 2
    # Four rounds of work for each warpgroup that computes even out what is uneven.
    splits = -(-4 * NUM_SMS * pairs // kv_heads)
    pieces = min(splits, 64, -(-512 // (sequences * -(-group // 64))))
    return Tiling(pairs=pairs, stages=1 if narrow_pages else 2, splits=splits, pieces=pieces)


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
    if options.tree_mask is not None:
        raise ValueError("The gpu backend has no tree_mask. Use backend='xla'.")


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
    seq_lens: jax.Array,
    query_starts: jax.Array,
    tokens: int,
    group: int,
) -> tuple[jax.Array, jax.Array]:
    """out [tiles, kv_heads, r, D] and lse [tiles, kv_heads, R] to [T, kv_heads, group, ...]; padding is 0."""
    rows = lse.shape[2]
    sequence, _, is_real = token_positions(seq_lens, query_starts, tokens)
    row = jnp.arange(tokens, dtype=jnp.int32) - query_starts[sequence]
    row = row[:, None] * group + jnp.arange(group, dtype=jnp.int32)
    tile = jnp.where(is_real[:, None], tiles.first[sequence][:, None] + row // rows, 0)
    row = jnp.where(is_real[:, None], row % rows, 0)
    out = jnp.where(is_real[:, None, None, None], out[tile, :, row], 0)
    return out.swapaxes(1, 2), lse[tile, :, row].swapaxes(1, 2)

"""The op on NVIDIA Hopper GPUs (H100, H200): a warp-specialised kernel in Pallas Mosaic GPU, fed by XLA.

`gpu_tiles.py` is what surrounds the kernel, `gpu_schedule.py` how the work is cut, and `gpu_kernel.py` the
kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.cache import write_new_tokens
from pallas_kernels.ragged_paged_attention.gpu_kernel import attend_tiles
from pallas_kernels.ragged_paged_attention.gpu_schedule import Cut, TwoCuts
from pallas_kernels.ragged_paged_attention.gpu_tiles import attend_in_tiles, refuse_scale, split_decodes
from pallas_kernels.ragged_paged_attention.options import AttentionOptions

# Streaming multiprocessors of an H100 or H200; on others only the balance of the work differs.
NUM_SMS = 132


class Tiling(TwoCuts[Cut]):
    """See `TwoCuts`."""

    cut = Cut


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
    if tiling is None:
        tiling = choose_tiling(q, kv_pages, page_table, options)
    kv_pages = write_new_tokens(k, v, kv_pages, layer, page_table, seq_lens, query_starts, options)
    out, lse = attend_in_tiles(
        q,
        k.shape[1],
        kv_pages,
        layer,
        page_table,
        seq_lens,
        query_starts,
        options,
        short=tiling.short,
        long=tiling.long,
        kernel=functools.partial(attend_tiles, interpret=interpret),
    )
    return out, kv_pages, lse


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
    splits, pieces = split_decodes(group, kv_heads, num_seqs, NUM_SMS * pairs, 64, options)
    return Tiling(Cut(pairs=pairs, stages=stages, splits=splits, pieces=pieces), long)


def refuse_page_size(page_size: int) -> None:
    """Raises: pages do not fill blocks of 64 keys, nor blocks pages."""
    if page_size % 8 or (64 % page_size and page_size % 64):
        raise ValueError(
            "The gpu backend needs a page_size of 8, 16 or 32, or a multiple of 64; got "
            f"{page_size}. Change the page size, or use backend='xla'."
        )


def _refuse_unsupported(q: jax.Array, kv_pages: jax.Array, options: AttentionOptions) -> None:
    head_dim, page_size = q.shape[-1], kv_pages.shape[2]
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"The gpu backend multiplies bfloat16 or float16; q is {q.dtype.name}. Use backend='xla', which "
            "computes in float32."
        )
    refuse_scale("gpu", options)
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
    refuse_page_size(page_size)
    if options.tree_mask is not None and options.tree_mask.shape[1] > 64:
        raise ValueError(
            "The gpu backend takes trees of up to 64 tokens; tree_mask has "
            f"{options.tree_mask.shape[1]} columns. Verify fewer at a time, or use backend='xla'."
        )

"""The op on NVIDIA GPUs from Ampere on, through jax-triton.

The sibling's `gpu_tiles.py` is what surrounds the kernel, its `gpu_schedule.py` how the work is cut, and
`triton_kernel.py` the kernel. All heads share one row a token, so they are the group of one key-value head,
and a tile of a decode is 16 heads or 32.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.mla_ragged_paged_attention import TRITON_LIMITS
from pallas_kernels.mla_ragged_paged_attention.rows import query_rows, token_rows
from pallas_kernels.ragged_paged_attention.cache import write_rows
from pallas_kernels.ragged_paged_attention.gpu_tiles import (
    attend_in_tiles,
    cost_of_tiles,
    refuse_scale,
    split_decodes,
)
from pallas_kernels.ragged_paged_attention.options import AttentionOptions
from pallas_kernels.ragged_paged_attention.triton import (
    NUM_SMS,
    Cut,
    Launch,
    Launcher,
    Tiling,
    launch_compiled,
)

__all__ = ["Cut", "Tiling", "attend"]

KERNEL = "pallas_kernels.mla_ragged_paged_attention.triton_kernel:latent_attention"


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
    *,
    tiling: Tiling | None = None,
    launch: Launcher | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `mla_ragged_paged_attention`.

    Args:
        tiling: how the work is cut; by default what `choose_tiling` says.
        launch: what runs the kernel, in place of `launch_compiled` for this process's GPU; tests interpret
            it, or compile it for another one.

    Raises:
        ValueError: what this kernel cannot do.
    """
    rank, rope_dim = q_latent.shape[2], q_rope.shape[2]
    refuse_scale("triton", options)
    most_rank, most_rope = TRITON_LIMITS
    if rank > most_rank or rope_dim > most_rope:
        raise ValueError(
            f"The triton backend takes latents of up to {most_rank} and rotated keys of up to {most_rope} "
            f"numbers; got {rank} and {rope_dim}. Use backend='xla'."
        )
    pages = write_rows(token_rows(latent, k_rope, pages), pages, layer, page_table, seq_lens, query_starts)
    # What the matrix units multiply is of one dtype.
    wide = jnp.promote_types(q_latent.dtype, pages.dtype)
    q = query_rows(q_latent, q_rope, rank + rope_dim).astype(wide)
    if tiling is None:
        tiling = choose_tiling(q, pages, page_table, options)
    out, lse = attend_in_tiles(
        q,
        1,
        pages,
        layer,
        page_table,
        seq_lens,
        query_starts,
        options,
        short=tiling.short,
        long=tiling.long,
        kernel=functools.partial(_attend_tiles, rank=rank, launch=launch or launch_compiled),
    )
    return out.astype(q_latent.dtype), pages, lse


def choose_tiling(q: jax.Array, pages: jax.Array, page_table: jax.Array, options: AttentionOptions) -> Tiling:
    """A tiling by shape: what fits into 99 KiB of shared memory, and spills no register."""
    heads, num_seqs = q.shape[1], page_table.shape[0]
    # Float32 takes twice of both, and is multiplied without matrix units.
    is_wide = q.dtype.itemsize == 4
    rows = 16 if is_wide or heads <= 16 else 32
    long = Cut(16, keys=16, warps=8) if is_wide else Cut(32, keys=32, warps=8)
    keys, warps = (16, 8) if is_wide else (32, 4 if rows == 16 else 8)
    if not options.decode_only and page_table.shape[1] * pages.shape[2] <= 4096:
        return Tiling(Cut(rows, keys, warps=warps), long)
    splits, pieces = split_decodes(heads, 1, num_seqs, 2 * NUM_SMS, rows, options)
    return Tiling(Cut(rows, keys, splits, pieces, warps), long)


def _attend_tiles(
    q: jax.Array,
    pages: jax.Array,
    layer: jax.Array,
    page_table: jax.Array,
    items: jax.Array,
    begin: jax.Array,
    end: jax.Array,
    *,
    rank: int,
    scale: float,
    soft_cap: float | None,
    cut: Cut,
    out_dtype: Any,
    launch: Launcher,
    **absent: None,
) -> tuple[jax.Array, jax.Array]:
    """A `gpu_tiles.TileKernel`; begin is zero without a window, and the other options this op has not."""
    assert all(option is None for option in absent.values()), absent
    num_items, given, rope_dim = items.shape[0], q.shape[2], q.shape[3] - rank
    cost = cost_of_tiles(q, rank, pages, page_table)
    return launch(
        Launch(
            kernel=KERNEL,
            operands=(q, pages, layer, page_table, items, end),
            results=(
                jax.ShapeDtypeStruct((num_items, 1, given, rank), out_dtype),
                jax.ShapeDtypeStruct((num_items, 1, cut.rows), jnp.float32),
            ),
            constants={
                "scale": float(scale),
                "soft_cap": None if soft_cap is None else float(soft_cap),
                "ITEMS": num_items,
                "PAGES": pages.shape[1],
                "PAGES_PER_SEQ": page_table.shape[1],
                "PAGE_SIZE": pages.shape[2],
                "WIDTH": pages.shape[3],
                "ROWS": cut.rows,
                "GIVEN": given,
                "KEYS": cut.keys,
                "RANK": rank,
                "RANK_DIMS": max(16, pl.next_power_of_2(rank)),
                "ROPE": rope_dim,
                "ROPE_DIMS": max(16, pl.next_power_of_2(rope_dim)),
            },
            programs=num_items,
            cut=cut,
            cost={"flops": cost.flops, "bytes_accessed": cost.bytes_accessed},
        )
    )

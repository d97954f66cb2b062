"""The op on NVIDIA GPUs that are older than Hopper (Ampere, Ada), through jax-triton.

`gpu_tiles.py` is what surrounds the kernel, `gpu_schedule.py` how the work is cut, and `triton_kernel.py` the
kernel. It also runs on newer GPUs, where `gpu` is faster.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.ragged_paged_attention.cache import write_new_tokens
from pallas_kernels.ragged_paged_attention.gpu_schedule import TwoCuts
from pallas_kernels.ragged_paged_attention.gpu_tiles import (
    attend_in_tiles,
    cost_of_tiles,
    refuse_scale,
    split_decodes,
)
from pallas_kernels.ragged_paged_attention.options import AttentionOptions

# Streaming multiprocessors of an A100; on others only the balance of the work differs.
NUM_SMS = 108


@dataclass(frozen=True)
class Cut:
    """How the work is cut (`gpu_schedule.KeyCut`), and what Triton makes of it.

    Attributes:
        rows, keys: powers of two of at least 16.
        splits, pieces: see `KeyCut`.
        warps: of a thread block.
        stages: blocks of keys and of values in flight.
    """

    rows: int
    keys: int = 64
    splits: int = 0
    pieces: int = 1
    warps: int = 4
    stages: int = 2


class Tiling(TwoCuts[Cut]):
    """See `TwoCuts`."""

    cut = Cut


@dataclass(frozen=True)
class Launch:
    """A call of a kernel in Triton.

    Attributes:
        kernel: where it is, MODULE:NAME; it is imported where it runs, since that needs Triton.
        operands: of the kernel, in its order.
        results: what it writes, in its order.
        constants: its compile-time parameters, by name.
        programs: how many run.
    """

    kernel: str
    operands: tuple[jax.Array, ...]
    results: tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct]
    constants: dict[str, Any]
    programs: int
    cut: Cut
    cost: dict[str, int]

    def load(self) -> Any:
        """The kernel."""
        module, name = self.kernel.split(":")
        return getattr(importlib.import_module(module), name)


Launcher = Callable[[Launch], tuple[jax.Array, jax.Array]]


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
    launch: Launcher | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `ragged_paged_attention`.

    Args:
        tiling: how the work is cut; by default what `choose_tiling` says.
        launch: what runs the kernel, in place of `launch_compiled` for this process's GPU; tests interpret
            it, or compile it for another one.

    Raises:
        ValueError: what this kernel cannot do.
    """
    head_dim = q.shape[-1]
    refuse_scale("triton", options)
    if head_dim > 256:
        raise ValueError(
            f"The triton backend needs a head_dim of up to 256; got {head_dim}. Use backend='xla'."
        )
    if tiling is None:
        tiling = choose_tiling(q, kv_pages, page_table, options)
    # What the matrix units multiply is of one dtype; numbers of 8 bits are exact in any.
    wide = q.dtype if kv_pages.dtype.itemsize == 1 else jnp.promote_types(q.dtype, kv_pages.dtype)
    kv_pages = write_new_tokens(k, v, kv_pages, layer, page_table, seq_lens, query_starts, options)
    out, lse = attend_in_tiles(
        q.astype(wide),
        k.shape[1],
        kv_pages,
        layer,
        page_table,
        seq_lens,
        query_starts,
        options,
        short=tiling.short,
        long=tiling.long,
        kernel=functools.partial(_attend_tiles, launch=launch or launch_compiled),
    )
    return out.astype(q.dtype), kv_pages, lse


def choose_tiling(
    q: jax.Array, kv_pages: jax.Array, page_table: jax.Array, options: AttentionOptions
) -> Tiling:
    """A tiling by shape: what fits into 99 KiB of shared memory, and few registers for what is small."""
    head_dim, page_size, kv_heads = q.shape[2], kv_pages.shape[2], kv_pages.shape[3] // 2
    group = q.shape[1] // kv_heads
    num_seqs, capacity = page_table.shape[0], page_table.shape[1] * page_size
    # Float32 is multiplied without matrix units, and a row of 256 numbers takes twice the registers.
    large = (head_dim > 128) + (max(q.dtype.itemsize, kv_pages.dtype.itemsize) == 4)
    keys = 64 >> large
    rows = min(64 >> large, max(16, pl.next_power_of_2(group)))
    # What a tree shows takes registers, too, and so does widening pages of 8 bits.
    crowded = options.tree_mask is not None or kv_pages.dtype.itemsize == 1
    long = Cut(rows=128 >> max(large, crowded), keys=keys, warps=8)
    if not options.decode_only and capacity <= 4096:
        return Tiling(Cut(rows=rows, keys=keys), long)
    splits, pieces = split_decodes(group, kv_heads, num_seqs, 2 * NUM_SMS, rows, options)
    return Tiling(Cut(rows=rows, keys=keys, splits=splits, pieces=pieces), long)


def _attend_tiles(
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
    cut: Cut,
    out_dtype: Any,
    launch: Launcher,
) -> tuple[jax.Array, jax.Array]:
    """A `gpu_tiles.TileKernel`."""
    tiles, kv_heads, given, head_dim = q.shape
    num_items, page_size = items.shape[0], kv_pages.shape[2]
    narrow = kv_pages.dtype.itemsize == 1
    pages = lax.bitcast_convert_type(kv_pages, jnp.int8) if narrow else kv_pages
    optional = (tree, tree_bits, position, slopes, sinks, factors)
    cost = cost_of_tiles(q, head_dim, kv_pages, page_table)
    return launch(
        Launch(
            kernel="pallas_kernels.ragged_paged_attention.triton_kernel:paged_attention",
            operands=(
                *(q, pages, layer, page_table, items, begin, end),
                *(begin if array is None else array for array in optional),
            ),
            results=(
                jax.ShapeDtypeStruct((num_items, kv_heads, given, head_dim), out_dtype),
                jax.ShapeDtypeStruct((num_items, kv_heads, cut.rows), jnp.float32),
            ),
            constants={
                "scale": float(scale),
                "soft_cap": None if soft_cap is None else float(soft_cap),
                "FORMAT": kv_pages.dtype.name if narrow else None,
                "HAS_TREE": tree is not None,
                "HAS_SLOPES": slopes is not None,
                "HAS_SINKS": sinks is not None,
                "HAS_FACTORS": factors is not None,
                "ITEMS": num_items,
                "TILES": tiles,
                "KV_HEADS": kv_heads,
                "PAGES": kv_pages.shape[1],
                "PAGES_PER_SEQ": page_table.shape[1],
                "PAGE_SIZE": page_size,
                "TREE_WORDS": 0 if tree_bits is None else tree_bits.shape[1],
                "ROWS": cut.rows,
                "GIVEN": given,
                "KEYS": cut.keys,
                "HEAD_DIM": head_dim,
                "DIMS": max(16, pl.next_power_of_2(head_dim)),
            },
            programs=num_items * kv_heads,
            cut=cut,
            cost={"flops": cost.flops, "bytes_accessed": cost.bytes_accessed},
        )
    )


def launch_compiled(launch: Launch, compute_capability: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Runs the kernel on a GPU; compute_capability (80 for Ampere) is that of the one in this process."""
    # Named at run time: these are there only where the `cuda` extra is.
    jax_triton = importlib.import_module("jax_triton")
    out, lse = jax_triton.triton_call(
        *launch.operands,
        kernel=launch.load(),
        out_type=launch.results,
        grid=(launch.programs,),
        name=launch.kernel.split(":")[1],
        num_warps=launch.cut.warps,
        num_stages=launch.cut.stages,
        compute_capability=compute_capability,
        cost_estimate=launch.cost,
        **launch.constants,
    )
    return out, lse

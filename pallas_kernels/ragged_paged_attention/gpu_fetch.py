"""The half of the kernel in `gpu_kernel.py` that fetches: pages from HBM into stages of shared memory.

A stage holds a block of B keys and one of as many values, each with a barrier `ready`, which those who
compute wait for, and a barrier `free`, at which they arrive when they have done with it.

Pages of q's dtype are copied (TMA) straight into a stage, whose `ready` passes when the bytes are there.
Pages of 8 bits are copied into one of two raw blocks, while the other one is widened into a stage by the
128 threads of the fetching warpgroup, which then arrive at `ready` themselves.

Values at `stop` and after it may hold anything, NaN included, and a weight of zero does not make that
zero: the last block of values is cleaned by the fetching warpgroup before it is `ready`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention.gpu_schedule import Cut

MATRIX = plgpu.Layout.WGMMA
RAW_BLOCKS = 2


def load(ref: Any, layout: Any) -> jax.Array:
    """What ref holds, in registers."""
    # Until JAX 0.10 the index was not optional.
    return plgpu.load(ref, layout=layout, optimized=False)  # type: ignore[call-arg]


def swizzled_columns(columns: int, dtype: Any) -> int:
    """How many columns TMA and wgmma take as one: up to 128 bytes."""
    bits = jnp.dtype(dtype).itemsize * 8
    return plgpu.find_swizzle(columns * bits) * 8 // bits


def shared(shape: tuple[int, ...], dtype: Any, columns: int | None = None) -> Any:
    """Matrices in shared memory in the form that TMA writes and wgmma reads."""
    columns = columns or swizzled_columns(shape[-1], dtype)
    swizzle = plgpu.SwizzleTransform(columns * jnp.dtype(dtype).itemsize)
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, columns)), swizzle))


@dataclass(frozen=True)
class Pages:
    """The cache, as the kernel sees it.

    Attributes:
        kv_heads, head_dim, page_size, pages: of kv_pages, `pages` those of one layer.
        dtype, wide: of the pages, and of q.
    """

    kv_heads: int
    head_dim: int
    page_size: int
    pages: int
    dtype: Any
    wide: Any

    @property
    def widened(self) -> bool:
        return bool(self.dtype != self.wide)

    def copies(self, keys: int) -> int:
        """Pages that a block of keys spans."""
        return max(1, keys // self.page_size)

    def scratch(self, cut: Cut) -> dict[str, Any]:
        """The stages, for all pairs of a thread block."""
        pairs, keys, stages = cut.pairs, cut.keys, cut.pairs * cut.stages
        copies = self.copies(keys)
        arrivals = 1 if self.widened else copies
        block = (keys, self.head_dim)
        scratch = {
            "k": shared((stages, *block), self.wide),
            "v": shared((stages, *block), self.wide),
            "k_ready": plgpu.Barrier(num_barriers=stages, num_arrivals=arrivals),
            "v_ready": plgpu.Barrier(num_barriers=stages, num_arrivals=arrivals),
            "k_free": plgpu.Barrier(num_barriers=stages, num_arrivals=cut.warpgroups),
            "v_free": plgpu.Barrier(num_barriers=stages, num_arrivals=cut.warpgroups),
        }
        if self.widened:
            columns = swizzled_columns(self.head_dim, self.wide)
            raw = shared((pairs * RAW_BLOCKS, *block), self.dtype, columns)
            ready = plgpu.Barrier(num_barriers=pairs * RAW_BLOCKS, num_arrivals=copies)
            return {**scratch, "raw_k": raw, "raw_v": raw, "raw_k_ready": ready, "raw_v_ready": ready}
        return {**scratch, "tail_ready": plgpu.Barrier(num_barriers=pairs, num_arrivals=copies)}


class Share(NamedTuple):
    """What one warpgroup fetches: `blocks` blocks of the keys [start, stop) of a head of a sequence.

    Attributes:
        pair: whose stages they go to.
        first_row: of the layer, among all rows of all pages.
    """

    pair: jax.Array
    head: jax.Array
    sequence: jax.Array
    start: jax.Array
    stop: jax.Array
    blocks: jax.Array
    first_row: jax.Array


def fetch(share: Share, kv_ref: Any, table_ref: Any, scratch: dict[str, Any], pages: Pages, cut: Cut) -> None:
    """Fetches all blocks of a share, up to `cut.stages` ahead of those who compute.

    Args:
        kv_ref: [rows of all pages, 2 * kv_heads * head_dim].
        table_ref: int32[S, P].
        scratch: what `Pages.scratch` describes.
    """
    keys, stages = cut.keys, cut.stages
    copies = pages.copies(keys)
    copy_keys = keys // copies
    parts = list(
        itertools.product(
            range(0, keys, 64), range(0, pages.head_dim, swizzled_columns(pages.head_dim, pages.wide))
        )
    )

    def rows_of(i: jax.Array) -> list[jax.Array]:
        """Where the pages of block i begin."""
        first = share.start + i * keys
        # Past the last page the table may say anything: the last one is read again, and masked.
        last_page = lax.div(share.stop - 1, pages.page_size)
        entries = [jnp.minimum(lax.div(first, pages.page_size) + j, last_page) for j in range(copies)]
        rows = [share.first_row + table_ref[share.sequence, entry] * pages.page_size for entry in entries]
        return rows if copies > 1 else [rows[0] + lax.rem(first, pages.page_size)]

    def copy(rows: list[jax.Array], column: jax.Array, target: Any, barrier: Any) -> None:
        columns = pl.ds(pl.multiple_of(column * pages.head_dim, 16), pages.head_dim)
        for j, row in enumerate(rows):
            source = kv_ref.at[pl.ds(pl.multiple_of(row, 8), copy_keys), columns]
            plgpu.copy_gmem_to_smem(source, target.at[pl.ds(j * copy_keys, copy_keys)], barrier)

    def rewrite(source: Any, target: Any, limit: jax.Array | None) -> None:
        """Copies a block by way of registers, few at a time; rows from `limit` on become zero."""
        width = swizzled_columns(pages.head_dim, pages.wide)
        for row, column in parts:
            part = pl.ds(row, 64), pl.ds(column, width)
            values = _widen(load(source.at[part], MATRIX), pages.wide)
            if limit is not None:
                at = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=MATRIX)
                values = jnp.where(at < limit - row, values, jnp.zeros_like(values))
            target.at[part][...] = values
        plgpu.commit_smem()

    def when_free(i: jax.Array, barrier: Any) -> None:
        pl.when(i >= stages)(lambda: plgpu.barrier_wait(barrier))

    def copy_block(i: jax.Array, _: None) -> None:
        stage = share.pair * stages + lax.rem(i, stages)
        rows = rows_of(i)
        left = share.stop - share.start - i * keys

        def copy_and_clean() -> None:
            tail = scratch["tail_ready"].at[share.pair]
            copy(rows, 2 * share.head + 1, scratch["v"].at[stage], tail)
            plgpu.barrier_wait(tail)
            rewrite(scratch["v"].at[stage], scratch["v"].at[stage], left)
            for _ in rows:
                plgpu.barrier_arrive(scratch["v_ready"].at[stage])

        when_free(i, scratch["k_free"].at[stage])
        copy(rows, 2 * share.head, scratch["k"].at[stage], scratch["k_ready"].at[stage])
        when_free(i, scratch["v_free"].at[stage])
        pl.when(left < keys)(copy_and_clean)

        @pl.when(left >= keys)
        def copy_only() -> None:
            copy(rows, 2 * share.head + 1, scratch["v"].at[stage], scratch["v_ready"].at[stage])

    def copy_raw(i: jax.Array) -> None:
        raw = share.pair * RAW_BLOCKS + lax.rem(i, RAW_BLOCKS)
        rows = rows_of(i)
        copy(rows, 2 * share.head, scratch["raw_k"].at[raw], scratch["raw_k_ready"].at[raw])
        copy(rows, 2 * share.head + 1, scratch["raw_v"].at[raw], scratch["raw_v_ready"].at[raw])

    def widen_block(i: jax.Array, _: None) -> None:
        stage = share.pair * stages + lax.rem(i, stages)
        raw = share.pair * RAW_BLOCKS + lax.rem(i, RAW_BLOCKS)
        pl.when(i + 1 < share.blocks)(lambda: copy_raw(i + 1))
        left = share.stop - share.start - i * keys
        limits: tuple[tuple[str, jax.Array | None], ...] = (("k", None), ("v", left))
        for name, limit in limits:
            plgpu.barrier_wait(scratch[f"raw_{name}_ready"].at[raw])
            when_free(i, scratch[f"{name}_free"].at[stage])
            rewrite(scratch[f"raw_{name}"].at[raw], scratch[name].at[stage], limit)
            plgpu.barrier_arrive(scratch[f"{name}_ready"].at[stage])

    def drain(i: jax.Array, _: None) -> None:
        stage = share.pair * stages + lax.rem(i, stages)
        plgpu.barrier_wait(scratch["k_free"].at[stage])
        plgpu.barrier_wait(scratch["v_free"].at[stage])

    block: Callable[[jax.Array, None], None] = copy_block
    if pages.widened:
        copy_raw(jnp.int32(0))
        block = widen_block
    lax.fori_loop(0, share.blocks, block, None)
    # No arrival is left on its way when the thread block ends.
    lax.fori_loop(jnp.maximum(share.blocks - stages, 0), share.blocks, drain, None)


def _widen(x: jax.Array, dtype: Any) -> jax.Array:
    """8 bits to 16, exactly, by the conversions that the hardware has."""
    if x.dtype == dtype:
        return x
    if x.dtype == jnp.int8:
        x = x.astype(jnp.bfloat16)
        return x if dtype == jnp.bfloat16 else x.astype(jnp.float32).astype(dtype)
    x = x.astype(jnp.float16)
    return x if dtype == jnp.float16 else x.astype(jnp.float32).astype(dtype)

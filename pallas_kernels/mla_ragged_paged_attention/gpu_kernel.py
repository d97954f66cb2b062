"""Latent attention of the tiles of `gpu_tiles.py` as a kernel in Pallas Mosaic GPU, for Hopper.

Computes softmax(q k^T) v for tiles of 64 query rows (`gpu_schedule.py`) in one pass over their keys, with a
running maximum and sum (Milakov & Gimelshein 2018; Dao et al. 2022). A row is one head of one token; all of
them read the same keys: a key is a token's latent and its rotated key, its value the latent.

Grid: a thread block for each item, those of long context first. Two warpgroups compute and a third fetches,
up to `stages` blocks of 64 keys ahead of them. A row's sum of 512 numbers is more than the registers of one
warpgroup hold beside all else: each of the two has half of the columns, and computes the logits of half of
the keys. Maxima, and then weights, they exchange by way of shared memory.

    HBM        q, pages, results; the page table and the items, read as scalars.
    SMEM       q [64, width], 72 KiB at width 576 and 16 bits; stages of keys, which are the values, too
               [64, width], 2 x 72 KiB; weights 2 x [64, 32], 8 KiB; maxima [2, 64]; of 227 KiB.
    registers  of a computing warpgroup: logits [64, 32] and its half of the weighted sum [64, rank / 2],
               float32, and the maximum and sum of each row.

Why it cannot race: a stage is written by the fetching warpgroup; it passes its `ready` barrier when the bytes
are there, and is written again after both others have arrived at `free`, their wgmmas done. A warpgroup
writes its maxima before it arrives at `maxima_met` and reads the other's after; its weights before it arrives
at `weights_met`, and both are read after. Whoever writes maxima again has passed `weights_met`, at which the
other arrived having read them; whoever writes weights again has passed the next `maxima_met`, at which the
other arrived with its wgmma done. Every item has results of its own; what is read, nobody writes.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.ragged_paged_attention import gpu_schedule as schedule
from pallas_kernels.ragged_paged_attention.gpu_fetch import MATRIX, load, shared, swizzled_columns
from pallas_kernels.ragged_paged_attention.gpu_tiles import cost_of_tiles

LOG2E = math.log2(math.e)
# Stands for minus infinity, whose difference with itself would be NaN.
MASKED = -0.7 * float(np.finfo(np.float32).max)

ROWS, KEYS = 64, 64
OF_ROWS = plgpu.Layout.WGMMA.reduce(1)
# Columns of q that are multiplied at a time.
STEP = 64
# Of a thread that fetches and of one that computes; 128 and 256 of them share 65,536.
REGISTERS = (40, 232)


def _across(rows: jax.Array, like: jax.Array) -> jax.Array:
    """[64] to [64, n]."""
    return lax.broadcast_in_dim(rows, like.shape, [0])


def _store(ref: Any, value: jax.Array) -> None:
    """Writes registers to device memory."""
    if hasattr(plgpu, "store"):  # from JAX 0.12 on, where an assignment is of the optimized kind only
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value


def attend_tiles(
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
    cut: Any,
    out_dtype: Any,
    interpret: Any = None,
    **absent: None,
) -> tuple[jax.Array, jax.Array]:
    """A `gpu_tiles.TileKernel`; begin is zero without a window, and the other options this op has not.

    Args:
        q: [tiles, 1, r, rank + rope_dim].
        pages: [layers, pages, page_size, width], of q's dtype.
        interpret: `plgpu.InterpretGPUParams` to simulate it on a CPU.

    Returns:
        out [items, 1, 64, rank], whatever r: registers are written out whole.
    """
    assert all(option is None for option in absent.values()), absent
    layers, num_pages, page_size, page_width = pages.shape
    given, width, stages = min(q.shape[2], ROWS), q.shape[3], cut.stages
    half_keys, half_rank = KEYS // 2, rank // 2
    copies = max(1, KEYS // page_size)
    copy_keys = KEYS // copies
    # All pages' rows one under another leave TMA two dimensions to deal with.
    flat_pages = pages.reshape(layers * num_pages * page_size, page_width)
    unit = scale if soft_cap is None else 1.0

    def latent_attention(
        q_ref: Any, pages_ref: Any, layer_ref: Any, table_ref: Any, items_ref: Any, end_ref: Any,
        out_ref: Any, lse_ref: Any, **smem: Any,
    ) -> None:  # fmt: skip
        role = lax.axis_index("warpgroup")
        # Items of long context come last in a sequence; they start first, not to be waited for at the end.
        item = items.shape[0] - 1 - lax.axis_index("block")
        tile = items_ref[item, schedule.TILE]
        start, stop = items_ref[item, schedule.START], items_ref[item, schedule.STOP]
        blocks = lax.div(stop - start + (KEYS - 1), KEYS)

        def meet(barrier: Any) -> None:
            plgpu.barrier_arrive(barrier)
            plgpu.barrier_wait(barrier)

        def compute(side: int) -> None:
            """One of the two: side 0 has the first half of a block's keys, and of the columns of values."""
            own_keys, columns = pl.ds(side * half_keys, half_keys), pl.ds(side * half_rank, half_rank)
            plgpu.barrier_wait(smem["q_ready"])

            def block(i: jax.Array, carry: Any, masked: bool) -> Any:
                total, most, mass = carry
                stage = lax.rem(i, stages)
                kv = smem["kv"].at[stage]
                plgpu.barrier_wait(smem["ready"].at[stage])

                def multiply(acc: Any) -> jax.Array:
                    # In a loop, since the addresses of all columns of q would be kept in registers.
                    def some_columns(j: jax.Array, _: None) -> None:
                        part = pl.ds(pl.multiple_of(j * STEP, STEP), STEP)
                        plgpu.wgmma(acc, smem["q"].at[:, part], kv.at[own_keys, part].transpose((1, 0)))

                    lax.fori_loop(0, width // STEP, some_columns, None)
                    return acc[...]

                logits = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, half_keys), jnp.float32))
                if soft_cap is not None:
                    # tanh through exp2: the hardware's own tanh is good to 11 bits.
                    squared = jnp.exp2(logits * (scale * (2 * LOG2E / soft_cap)))
                    logits = soft_cap * (1 - 2 / (1 + squared))
                if masked:
                    key = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=MATRIX)
                    key = key + (start + i * KEYS + side * half_keys)
                    seen = key < _across(load(end_ref.at[tile], OF_ROWS), key)
                    logits = jnp.where(seen, logits, MASKED)
                own_most = logits.max(axis=1)
                smem["maxima"].at[side][...] = own_most
                meet(smem["maxima_met"])
                new_most = jnp.maximum(
                    jnp.maximum(most, own_most), load(smem["maxima"].at[1 - side], OF_ROWS)
                )
                # Logits are kept in units of `unit`. Scaling them before the maximum is taken would let the
                # compiler round the difference from it otherwise than the maximum.
                fade = jnp.exp2((most - new_most) * (unit * LOG2E))
                weights = jnp.exp2((logits - _across(new_most, logits)) * (unit * LOG2E))
                mass = mass * fade + weights.sum(axis=1)
                total = total * _across(fade, total)
                smem["weights"][side][...] = weights.astype(q.dtype)
                plgpu.commit_smem()
                meet(smem["weights_met"])
                parts = [(smem["weights"][n], pl.ds(n * half_keys, half_keys)) for n in (0, 1)]
                if interpret is None:

                    def accumulate(acc: Any) -> None:
                        for part, part_keys in parts:
                            plgpu.wgmma(acc, part, kv.at[part_keys, columns])

                    total = pl.run_state(accumulate)(plgpu.WGMMAAccumulatorRef.init(total))
                else:
                    # The simulator has no accumulator that begins with anything but zero.
                    for part, part_keys in parts:
                        values = kv.at[part_keys, columns][...]
                        total += jnp.dot(part[...], values, preferred_element_type=jnp.float32)
                    plgpu.commit_smem()
                plgpu.barrier_arrive(smem["free"].at[stage])
                return total, new_most, mass

            most = plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), OF_ROWS)
            mass = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), OF_ROWS)
            total = plgpu.layout_cast(jnp.zeros((ROWS, half_rank), jnp.float32), MATRIX)
            full_stop = items_ref[item, schedule.FULL_STOP]
            carry = lax.fori_loop(0, full_stop, functools.partial(block, masked=False), (total, most, mass))
            total, most, mass = lax.fori_loop(full_stop, blocks, functools.partial(block, masked=True), carry)
            smem["maxima"].at[side][...] = mass
            meet(smem["maxima_met"])
            mass = mass + load(smem["maxima"].at[1 - side], OF_ROWS)
            if side == 0:
                _store(lse_ref.at[item, 0], most * unit + jnp.log(mass))
            _store(out_ref.at[item, 0, :, columns], (total / _across(mass, total)).astype(out_dtype))

        def fetch() -> None:
            sequence, first_row = items_ref[item, schedule.SEQUENCE], layer_ref[0] * (num_pages * page_size)
            here = pl.ds(0, given)
            plgpu.copy_gmem_to_smem(q_ref.at[tile, 0, here], smem["q"].at[here], smem["q_ready"])

            def copy(i: jax.Array, stage: jax.Array, barrier: Any) -> None:
                first = start + i * KEYS
                for j in range(copies):
                    # Past the last page the table may say anything: the last one is read again, and masked.
                    entry = jnp.minimum(lax.div(first, page_size) + j, lax.div(stop - 1, page_size))
                    row = first_row + table_ref[sequence, entry] * page_size
                    row = row if copies > 1 else row + lax.rem(first, page_size)
                    source = pages_ref.at[pl.ds(pl.multiple_of(row, 8), copy_keys), pl.ds(0, width)]
                    target = smem["kv"].at[stage, pl.ds(j * copy_keys, copy_keys)]
                    plgpu.copy_gmem_to_smem(source, target, barrier)

            def clean(stage: jax.Array, left: jax.Array) -> None:
                """Zeros in place of values past the last key: NaN there would outlive a weight of zero."""
                step = swizzled_columns(width, q.dtype)
                for column in range(0, rank, step):
                    part = smem["kv"].at[stage, :, pl.ds(column, step)]
                    values = load(part, MATRIX)
                    at = plgpu.broadcasted_iota(jnp.int32, values.shape, 0, layout=MATRIX)
                    part[...] = jnp.where(at < left, values, jnp.zeros_like(values))
                plgpu.commit_smem()

            def block(i: jax.Array, _: None) -> None:
                stage, left = lax.rem(i, stages), stop - start - i * KEYS
                ready = smem["ready"].at[stage]
                pl.when(i >= stages)(lambda: plgpu.barrier_wait(smem["free"].at[stage]))
                pl.when(left >= KEYS)(lambda: copy(i, stage, ready))

                @pl.when(left < KEYS)
                def copy_and_clean() -> None:
                    copy(i, stage, smem["tail_ready"])
                    plgpu.barrier_wait(smem["tail_ready"])
                    clean(stage, left)
                    for _ in range(copies):
                        plgpu.barrier_arrive(ready)

            lax.fori_loop(0, blocks, block, None)
            # No arrival is left on its way when the thread block ends.
            lax.fori_loop(
                jnp.maximum(blocks - stages, 0),
                blocks,
                lambda i, _: plgpu.barrier_wait(smem["free"].at[lax.rem(i, stages)]),
                None,
            )

        for side in (0, 1):

            @pl.when((blocks > 0) & (role == side))
            def compute_when_some(side: int = side) -> None:
                plgpu.set_max_registers(REGISTERS[1], action="increase")
                compute(side)

        @pl.when((blocks > 0) & (role == 2))
        def fetch_when_some() -> None:
            plgpu.set_max_registers(REGISTERS[0], action="decrease")
            fetch()

    # A kernel of Mosaic GPU takes an estimate from JAX 0.12 on.
    cost: dict[str, Any] = {}
    if jax.__version_info__ >= (0, 12):
        cost["cost_estimate"] = cost_of_tiles(q, rank, pages, page_table)
    kernel = plgpu.kernel(
        latent_attention,
        out_type=(
            jax.ShapeDtypeStruct((items.shape[0], 1, ROWS, rank), out_dtype),
            jax.ShapeDtypeStruct((items.shape[0], 1, ROWS), jnp.float32),
        ),
        scratch_types={
            "q": shared((ROWS, width), q.dtype, half_keys),
            "kv": shared((stages, KEYS, width), q.dtype, half_keys),
            "weights": [shared((ROWS, half_keys), q.dtype, half_keys)] * 2,
            "maxima": plgpu.SMEM((2, ROWS), jnp.float32),
            "q_ready": plgpu.Barrier(),
            "ready": plgpu.Barrier(num_barriers=stages, num_arrivals=copies),
            "tail_ready": plgpu.Barrier(num_arrivals=copies),
            "free": plgpu.Barrier(num_barriers=stages, num_arrivals=2),
            "maxima_met": plgpu.Barrier(num_arrivals=2),
            "weights_met": plgpu.Barrier(num_arrivals=2),
        },
        grid=(items.shape[0],),
        grid_names=("block",),
        num_threads=3,
        thread_name="warpgroup",
        # Maxima and sums are of rows, which no two warps share: they need no shared memory, of which little
        # is left.
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=1024),
        interpret=interpret,
        **cost,
    )
    out, lse = kernel(q, flat_pages, layer, page_table, items, end)
    return out, lse

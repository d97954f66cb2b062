"""The attention of `gpu_tiles.py` as a kernel in Pallas Mosaic GPU, for Hopper.

Computes softmax(q k^T) v for tiles of query rows (`gpu_schedule.py`) in one pass over their keys, with a
running maximum and sum (Milakov & Gimelshein 2018; Dao et al. 2022).

Grid: thread blocks, each with P pairs of an (item, key-value head). For a pair, W warpgroups compute, 64
rows each, and one more fetches: it runs ahead of them by up to `stages` blocks of B keys.

    HBM        q, pages, results; the page table and the items, read as scalars.
    SMEM       a pair has q [64 W, D], its stages of keys and of values [B, D] each, and float32 results
               [64 W, D] where they are to be merged. At D = 128 and 16 bits: decode (P 2, W 1, B 64, 2
               stages) 2 x (16 + 64 + 32) KiB, prefill (P 1, W 2, B 128, 2 stages) 32 + 128 KiB; of 227.
               Pages of 8 bits add two raw blocks of keys and of values (`gpu_fetch.py`).
    registers  of a computing warpgroup: logits [64, B] and the weighted sum of values [64, D], float32,
               and the maximum and sum of each row.

Why it cannot race: a stage is written by one warpgroup, which passes its `ready` barrier when the bytes
are there; a computing warpgroup reads the stage after that, and arrives at `free` when its wgmma is done;
the stage is written again after all have arrived. Every pair writes results that no other one writes;
what it reads, nobody writes.
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
from pallas_kernels.ragged_paged_attention.gpu_fetch import MATRIX, Pages, Share, fetch, load, shared
from pallas_kernels.ragged_paged_attention.gpu_tiles import cost_of_tiles

LOG2E = math.log2(math.e)
# Stands for minus infinity, whose difference with itself would be NaN.
MASKED = -0.7 * float(np.finfo(np.float32).max)

ROWS = plgpu.Layout.WGMMA.reduce(1)


def _across(rows: jax.Array, like: jax.Array) -> jax.Array:
    """[64] to [64, n]."""
    return lax.broadcast_in_dim(rows, like.shape, [0])


def _registers(cut: schedule.Cut, pages: Pages) -> tuple[int, int] | None:
    """Of a thread that fetches and of one that computes; None is an even share, of up to 255."""
    if cut.threads == 2:
        return None
    if cut.threads == 4:
        return (72, 184) if pages.widened else (56, 200)
    if pages.head_dim > 128:
        return (56, 224) if pages.widened else (40, 232)
    return (72, 216) if pages.widened else (56, 224)


def attend_tiles(
    q: jax.Array,
    kv_pages: jax.Array,
    layer: jax.Array,
    page_table: jax.Array,
    items: jax.Array,
    begin: jax.Array,
    end: jax.Array,
    *,
    tree: jax.Array | None = None,
    tree_bits: jax.Array | None = None,
    position: jax.Array | None = None,
    slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    factors: jax.Array | None = None,
    scale: float,
    soft_cap: float | None,
    cut: schedule.Cut,
    out_dtype: Any,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """A `gpu_tiles.TileKernel`; interpret: `plgpu.InterpretGPUParams` to simulate it on a CPU."""
    _, kv_heads, given, head_dim = q.shape
    layers, num_pages, page_size = kv_pages.shape[:3]
    pages = Pages(kv_heads, head_dim, page_size, num_pages, kv_pages.dtype, q.dtype)
    keys, stages, warpgroups, pairs = cut.keys, cut.stages, cut.warpgroups, cut.pairs
    units = items.shape[0] * kv_heads
    given_rows = min(given, 64)
    tree_words = 0 if tree_bits is None else tree_bits.shape[1]
    own_out = out_dtype != q.dtype
    # All pages' rows one under another leave TMA two dimensions to deal with.
    flat_pages = kv_pages.reshape(layers * num_pages * page_size, 2 * kv_heads * head_dim)
    optional = {"position": position, "slopes": slopes, "sinks": sinks, "factors": factors}
    optional |= {"tree": tree, "tree_bits": tree_bits}
    optional = {name: array for name, array in optional.items() if array is not None}

    def paged_attention(
        q_ref: Any, kv_ref: Any, layer_ref: Any, table_ref: Any, items_ref: Any, begin_ref: Any, end_ref: Any,
        optional_refs: dict[str, Any], out_ref: Any, lse_ref: Any, **scratch: Any,
    ) -> None:  # fmt: skip
        thread = lax.axis_index("warpgroup")
        pair, role = lax.div(thread, warpgroups + 1), lax.rem(thread, warpgroups + 1)
        unit = lax.axis_index("block") * pairs + pair
        # Items of long context come last in a sequence; they start first, not to be waited for at the end.
        item = items.shape[0] - 1 - lax.div(jnp.minimum(unit, units - 1), kv_heads)
        head = lax.rem(unit, kv_heads)
        start, stop = items_ref[item, schedule.START], items_ref[item, schedule.STOP]
        blocks = jnp.where(unit < units, lax.div(stop - start + (keys - 1), keys), 0)
        q_smem, k_smem, v_smem = scratch["q"], scratch["k"], scratch["v"]
        out_smem = scratch["out"] if own_out else q_smem

        def compute() -> None:
            tile = items_ref[item, schedule.TILE]
            own, ready = pl.ds(role * 64, 64), scratch["q_ready"].at[pair * warpgroups + role]
            q_own, out_own = q_smem.at[pair, own], out_smem.at[pair, own]
            here, there = pl.ds(0, given_rows), pl.ds(role * 64, given_rows)
            plgpu.copy_gmem_to_smem(q_ref.at[tile, head, there], q_own.at[here], ready)

            def of_rows(ref: Any) -> jax.Array:
                return load(ref.at[own], ROWS)

            def in_tree(key: jax.Array) -> jax.Array:
                """Whether the rows see the keys by their trees; keys before the tree they see."""
                column = key - _across(of_rows(optional_refs["tree"].at[tile]), key)
                bits = jnp.full_like(key, -1)
                for word in range(tree_words):
                    word_bits = _across(of_rows(optional_refs["tree_bits"].at[tile, word]), key)
                    bits = jnp.where(column >= 32 * word, word_bits, bits)
                bit = lax.shift_right_logical(bits, column & 31) & 1
                return bit == 1

            most = plgpu.layout_cast(jnp.full((64,), MASKED, jnp.float32), ROWS)
            mass = plgpu.layout_cast(jnp.zeros((64,), jnp.float32), ROWS)
            # Logits are kept in units of `unit`. Scaling them before the maximum is taken would let the
            # compiler round the difference from it otherwise than the maximum, by more than 1 where they
            # are huge.
            product_scale = scale * (1.0 if factors is None else optional_refs["factors"][0])
            unit = product_scale if soft_cap is None else 1.0
            if sinks is not None:
                # A sink is a key with no value, that the first piece of a tile begins with.
                is_first = jnp.broadcast_to(items_ref[item, schedule.PIECE] == 0, (64,))
                sink = jnp.maximum(of_rows(optional_refs["sinks"].at[head, tile]) / unit, MASKED)
                most = jnp.where(is_first, sink, most)
                mass = jnp.where(is_first, jnp.ones_like(mass), mass)
            if slopes is not None:
                row_position = of_rows(optional_refs["position"].at[tile])
                row_slope = of_rows(optional_refs["slopes"].at[head, tile]) / unit
            plgpu.barrier_wait(ready)

            def block(i: jax.Array, carry: Any, masked: bool) -> Any:
                total, most, mass = carry
                stage = pair * stages + lax.rem(i, stages)
                plgpu.barrier_wait(scratch["k_ready"].at[stage])

                def multiply(acc: Any) -> jax.Array:
                    plgpu.wgmma(acc, q_own, k_smem.at[stage].transpose((1, 0)))
                    return acc[...]

                logits = pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((64, keys), jnp.float32))
                plgpu.barrier_arrive(scratch["k_free"].at[stage])
                if soft_cap is not None:
                    # tanh through exp2: the hardware's own tanh is good to 11 bits.
                    squared = jnp.exp2(logits * (product_scale * (2 * LOG2E / soft_cap)))
                    logits = soft_cap * (1 - 2 / (1 + squared))
                if masked or slopes is not None:
                    key = plgpu.broadcasted_iota(jnp.int32, logits.shape, 1, layout=MATRIX)
                    key = key + (start + i * keys)
                if slopes is not None:
                    distance = (key - _across(row_position, key)).astype(jnp.float32)
                    logits = logits + _across(row_slope, logits) * distance
                if masked:
                    # Read here, for the registers that they would take in the blocks that need no mask.
                    row_begin, row_end = of_rows(begin_ref.at[tile]), of_rows(end_ref.at[tile])
                    seen = (key >= _across(row_begin, key)) & (key < _across(row_end, key))
                    if tree_words:
                        seen &= in_tree(key)
                    logits = jnp.where(seen, logits, MASKED)
                new_most = jnp.maximum(most, logits.max(axis=1))
                fade = jnp.exp2((most - new_most) * (unit * LOG2E))
                weights = jnp.exp2((logits - _across(new_most, logits)) * (unit * LOG2E))
                mass = mass * fade + weights.sum(axis=1)
                total = total * _across(fade, total)
                weights = weights.astype(q.dtype)
                plgpu.barrier_wait(scratch["v_ready"].at[stage])
                if interpret is None:
                    accumulate = pl.run_state(lambda acc: plgpu.wgmma(acc, weights, v_smem.at[stage]))
                    total = accumulate(plgpu.WGMMAAccumulatorRef.init(total))
                else:
                    # The simulator has no wgmma whose left operand is in registers.
                    total += jnp.dot(weights, v_smem[stage], preferred_element_type=jnp.float32)
                    plgpu.commit_smem()
                plgpu.barrier_arrive(scratch["v_free"].at[stage])
                return total, new_most, mass

            carry = plgpu.layout_cast(jnp.zeros((64, head_dim), jnp.float32), MATRIX), most, mass
            full_start, full_stop = items_ref[item, schedule.FULL_START], items_ref[item, schedule.FULL_STOP]
            carry = lax.fori_loop(0, full_start, functools.partial(block, masked=True), carry)
            carry = lax.fori_loop(full_start, full_stop, functools.partial(block, masked=False), carry)
            total, most, mass = lax.fori_loop(full_stop, blocks, functools.partial(block, masked=True), carry)

            # A row whose tree is empty may have seen nothing.
            is_some = most > MASKED / 2
            lse_ref[item, head, own] = jnp.where(is_some, most * unit + jnp.log(mass), -jnp.inf)
            v_factor = 1.0 if factors is None else optional_refs["factors"][1]
            share = jnp.where(is_some, v_factor / mass, jnp.zeros_like(mass))
            out_own[...] = (total * _across(share, total)).astype(out_dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(out_own.at[here], out_ref.at[item, head, there])
            plgpu.wait_smem_to_gmem(0)

        registers = _registers(cut, pages)

        @pl.when((blocks > 0) & (role == warpgroups))
        def _() -> None:
            if registers is not None:
                plgpu.set_max_registers(registers[0], action="decrease")
            sequence = items_ref[item, schedule.SEQUENCE]
            first_row = layer_ref[0] * (num_pages * page_size)
            share = Share(pair, head, sequence, start, stop, blocks, first_row)
            fetch(share, kv_ref, table_ref, scratch, pages, cut)

        @pl.when((blocks > 0) & (role < warpgroups))
        def _() -> None:
            if registers is not None:
                plgpu.set_max_registers(registers[1], action="increase")
            compute()

    # A kernel of Mosaic GPU takes an estimate from JAX 0.12 on.
    cost: dict[str, Any] = {}
    if jax.__version_info__ >= (0, 12):
        cost["cost_estimate"] = cost_of_tiles(q, head_dim, kv_pages, page_table)
    kernel = plgpu.kernel(
        paged_attention,
        out_type=(
            jax.ShapeDtypeStruct((items.shape[0], kv_heads, given, head_dim), out_dtype),
            jax.ShapeDtypeStruct((items.shape[0], kv_heads, cut.rows), jnp.float32),
        ),
        scratch_types={
            "q": shared((pairs, cut.rows, head_dim), q.dtype),
            "q_ready": plgpu.Barrier(num_barriers=pairs * warpgroups),
            **({"out": shared((pairs, cut.rows, head_dim), out_dtype)} if own_out else {}),
            **pages.scratch(cut),
        },
        grid=(-(-units // pairs),),
        grid_names=("block",),
        num_threads=cut.threads,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
        **cost,
    )
    out, lse = kernel(q, flat_pages, layer, page_table, items, begin, end, optional)
    return out, lse

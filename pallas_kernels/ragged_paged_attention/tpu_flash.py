"""What the TPU kernel computes on one work item: flash attention of a tile of queries on a block of keys.

The online softmax of FlashAttention-2 (Dao 2023, section 3.1), float32, one key-value head after the
other. The rows of a head's tile are its group of query heads times the tile's queries, [group, height].
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention import tpu_rows
from pallas_kernels.ragged_paged_attention.options import AttentionOptions
from pallas_kernels.ragged_paged_attention.tpu_rows import LANES
from pallas_kernels.ragged_paged_attention.tpu_work import Item, Tile, Tiling, WorkList

RING = 2
# Queries that are transposed at once, as more do not fit in registers; and keys whose values are cleaned.
STRIP = 16
# Finite, so that a row that has seen nothing yet gives exp(MASKED - MASKED) and not NaN.
MASKED = -(2.0**127)


class Scratch(NamedTuple):
    """Buffers and semaphores of the program; the opening of this file has their sizes."""

    tables: Any
    kv_blocks: Any
    separate: Any
    q_tiles: Any
    queries: Any
    running_max: Any
    running_sum: Any
    acc: Any
    row_words: Any
    out_tile: Any
    lse_tile: Any
    table_arrived: Any
    kv_arrived: Any
    q_arrived: Any
    written: Any


def scratch_shapes(
    q_dtype: jnp.dtype,
    cache_dtype: jnp.dtype,
    heads: int,
    group: int,
    page_rows: tuple[int, int],
    row_lanes: int,
    value_lanes: int,
    pages_per_seq: int,
    words_per_row: int,
    return_lse: bool,
    tiling: Tiling,
) -> Scratch:
    """The buffers for pages of page_rows = (rows, lanes) a token and words_per_row words a query.

    Rows of a page are joined to rows of row_lanes; value_lanes are the first of those, which the output has.
    """
    kv_heads, rows, lanes = heads // group, group * tiling.queries, row_lanes
    # 8-bit numbers are exact in bfloat16.
    wide = jnp.float32 in (q_dtype, cache_dtype)
    compute_dtype = jnp.dtype(jnp.float32 if wide else jnp.bfloat16)
    return Scratch(
        tables=pltpu.SMEM((2 * pages_per_seq,), jnp.int32),
        kv_blocks=pltpu.VMEM((RING, tiling.keys, *page_rows), cache_dtype),
        separate=pltpu.VMEM((page_rows[0] * page_rows[1] // lanes, tiling.keys, lanes), compute_dtype),
        q_tiles=pltpu.VMEM((RING, tiling.queries, heads, lanes), q_dtype),
        queries=pltpu.VMEM((kv_heads * rows, lanes), compute_dtype),
        running_max=pltpu.VMEM((kv_heads * rows, LANES), jnp.float32),
        running_sum=pltpu.VMEM((kv_heads * rows, _sum_lanes(tiling)), jnp.float32),
        acc=pltpu.VMEM((kv_heads * rows, value_lanes), jnp.float32),
        row_words=pltpu.VMEM((max(1, words_per_row), tiling.queries, 1), jnp.int32),
        out_tile=pltpu.VMEM((tiling.queries, heads, value_lanes), q_dtype),
        lse_tile=pltpu.VMEM((tiling.queries if return_lse else 1, heads, LANES), jnp.float32),
        table_arrived=pltpu.SemaphoreType.DMA((2,)),
        kv_arrived=pltpu.SemaphoreType.DMA((RING,)),
        q_arrived=pltpu.SemaphoreType.DMA((RING,)),
        written=pltpu.SemaphoreType.DMA((2,)),
    )


@dataclass(frozen=True)
class FlashTile:
    """The arithmetic of the kernel; everything it reads and writes is on the chip.

    Attributes:
        group: query heads of a key-value head.
        num_tokens: T, rows in the packed batch.
        scales: float32[2], of keys and of values, in SMEM.
        sinks, slopes: float32[heads] in SMEM, or None.
        row_words: int32[words * T] in SMEM, or None: what a query sees beside causality.
    """

    work: WorkList
    group: int
    num_tokens: int
    scales: Any
    sinks: Any
    slopes: Any
    row_words: Any
    scratch: Scratch

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.scratch.out_tile.shape[1]

    @property
    def options(self) -> AttentionOptions:
        return self.work.options

    def start(self, item: Item, tile: Tile, slot: jax.Array, height: int) -> None:
        """Takes the tile's queries from their ring slot, and begins an empty softmax."""
        scratch = self.scratch
        rows = self.heads * height

        def take(first: jax.Array | int, count: int) -> None:
            queries = scratch.q_tiles[slot, pl.ds(first, count)].astype(scratch.queries.dtype)
            for head, values in enumerate(jnp.swapaxes(queries, 0, 1)):
                scratch.queries[pl.ds(head * height + first, count)] = values

        if height == 1:
            scratch.queries[:rows] = scratch.q_tiles[slot, 0].astype(scratch.queries.dtype)
        else:
            _in_strips(tile.num_queries, take)
        scratch.acc[:rows] = jnp.zeros((rows, scratch.acc.shape[1]), jnp.float32)
        sums = (rows, scratch.running_sum.shape[1])
        if self.sinks is None:
            scratch.running_max[:rows] = jnp.full((rows, LANES), MASKED)
            scratch.running_sum[:rows] = jnp.zeros(sums, jnp.float32)
        else:
            # A sink is a logit that has been seen already, and has no value behind it.
            sinks = self._per_row(self.sinks, 0, self.heads, height)
            scratch.running_max[:rows] = jnp.broadcast_to(sinks, (rows, LANES))
            scratch.running_sum[:rows] = (lax.broadcasted_iota(jnp.int32, sums, 1) == 0).astype(jnp.float32)
        if self.row_words is not None:

            def set_words(query: jax.Array, _: None) -> None:
                for word in range(scratch.row_words.shape[0]):
                    value = self.row_words[word * self.num_tokens + item.row + query]
                    scratch.row_words[word, pl.ds(query, 1)] = jnp.full((1, 1), value)

            lax.fori_loop(0, tile.num_queries, set_words, None)

    def _per_row(self, of_head: Any, first: int, count: int, height: int) -> jax.Array:
        """float32[heads] in SMEM to [count * height, 1], for the rows of `count` query heads."""
        head = lax.broadcasted_iota(jnp.int32, (count, height, 1), 0).reshape(-1, 1)
        values = jnp.full(head.shape, of_head[first])
        for index in range(1, count):
            values = jnp.where(head == index, of_head[first + index], values)
        return values

    def attend(self, item: Item, tile: Tile, slot: jax.Array, height: int) -> None:
        """One item: logits, mask, running maximum and sum, and the weighted values."""
        self._separate_rows(slot)
        self._clean_values(item, tile)
        kv_heads = self.heads // self.group
        # Heads of few rows are taken together: what is done to a row costs as much as to eight.
        together = kv_heads if height == 1 else 1
        distance, visible = self._visible(item, tile, together * self.group, height)
        for first in range(0, kv_heads, together):
            self._attend_heads(range(first, first + together), height, distance, visible)

    def _attend_heads(self, heads: range, height: int, distance: jax.Array, visible: jax.Array) -> None:
        """Key-value heads `heads`; distance and visible are [their rows, keys]."""
        scratch, options, dtype = self.scratch, self.options, self.scratch.queries.dtype
        rows = self.group * height
        own = pl.ds(heads.start * rows, len(heads) * rows)
        dot = functools.partial(
            lax.dot_general,
            precision=lax.Precision.HIGHEST if dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        logits = jnp.concatenate(
            [
                dot(
                    scratch.queries[pl.ds(first * rows, count * rows)],
                    scratch.separate[keys],
                    (((1,), (1,)), ((), ())),
                )
                for first, count, keys, _ in self._of_one_row(heads)
            ]
        )
        logits = options.cap(logits * (options.scale * self.scales[0]))
        if self.slopes is not None:
            slopes = self._per_row(self.slopes, heads.start * self.group, len(heads) * self.group, height)
            logits -= slopes * distance.astype(jnp.float32)
        logits = jnp.where(visible, logits, MASKED)

        old_max = scratch.running_max[own]
        new_max = jnp.maximum(old_max, jnp.max(logits, axis=1, keepdims=True))
        weights = jnp.exp(logits - _lanes(new_max, logits.shape[1]))
        if options.tree_mask is not None:  # only then may a query see no key at all
            weights = jnp.where(visible, weights, 0.0)
        decay = jnp.exp(old_max - new_max)
        scratch.running_max[own] = new_max
        width = scratch.running_sum.shape[1]
        parts = [weights[:, begin : begin + width] for begin in range(0, weights.shape[1], width)]
        scratch.running_sum[own] = _lanes(decay, width) * scratch.running_sum[own] + sum(parts)
        weights = weights.astype(dtype)
        partial = jnp.concatenate(
            [
                dot(
                    weights[(first - heads.start) * rows : (first - heads.start + count) * rows],
                    self._values(row),
                    (((1,), (0,)), ((), ())),
                )
                for first, count, _, row in self._of_one_row(heads)
            ]
        )
        scratch.acc[own] = _lanes(decay, partial.shape[1]) * scratch.acc[own] + partial

    def _clean_values(self, item: Item, tile: Tile) -> None:
        """Zeroes values that no query sees: they may be anything, and zero times NaN is NaN."""
        keys, separate = self.work.tiling.keys, self.scratch.separate
        begin = jnp.clip(tile.key_begin - item.block * keys, 0, keys)
        end = jnp.clip(tile.key_end - item.block * keys, 0, keys)
        strip = next(size for size in (STRIP, keys) if keys % size == 0)
        rows = {self._rows_of(head)[1] for head in range(self.heads // self.group)}

        def clean(index: jax.Array, _: None) -> None:
            first = pl.multiple_of(index * strip, strip)
            key = first + lax.broadcasted_iota(jnp.int32, (strip, separate.shape[2]), 0)
            is_seen = (key >= begin) & (key < end)
            for row in sorted(rows):
                values = separate[row, pl.ds(first, strip)].astype(jnp.float32)
                separate[row, pl.ds(first, strip)] = jnp.where(is_seen, values, 0.0).astype(separate.dtype)

        lax.fori_loop(0, pl.cdiv(begin, strip), clean, None)
        lax.fori_loop(lax.div(end, strip), keys // strip, clean, None)

    def _separate_rows(self, slot: jax.Array) -> None:
        """[keys, rows, lanes] as it was fetched to [rows, keys, lanes], in steps that fit in registers.

        Where fewer rows are kept apart than there are, they are wider, and several stand in each.
        """
        scratch = self.scratch
        keys = self.work.tiling.keys
        in_words = tpu_rows.stand_in_words(scratch.kv_blocks, scratch.separate)
        step = tpu_rows.keys_separated(scratch.separate.shape[0] if in_words else 16, keys)

        def from_words(index: jax.Array) -> None:
            place = pl.ds(pl.multiple_of(index * step, step), step)
            for row, values in enumerate(tpu_rows.by_word(scratch.kv_blocks.at[slot], index * step, step)):
                scratch.separate[row, place] = values

        def from_block(index: jax.Array) -> None:
            place = pl.ds(pl.multiple_of(index * step, step), step)
            rows = tpu_rows.by_row(scratch.kv_blocks[slot, place], scratch.separate.dtype)
            side_by_side, lanes = len(rows) // scratch.separate.shape[0], scratch.kv_blocks.shape[3]
            for row, values in enumerate(rows):
                if side_by_side == 1:
                    scratch.separate[row, place] = values
                else:
                    within = pl.ds(row % side_by_side * lanes, lanes)
                    scratch.separate[row // side_by_side, place, within] = values

        def separate(index: jax.Array, _: None) -> None:
            if in_words:
                # Interpreters know no other view of a ref than its own.
                lax.platform_dependent(index, mosaic=from_words, default=from_block)
            else:
                from_block(index)

        lax.fori_loop(0, keys // step, separate, None)

    def _visible(self, item: Item, tile: Tile, heads: int, height: int) -> tuple[jax.Array, jax.Array]:
        """(query position - key position int32, whether it is seen), each [heads * height, keys]."""
        options, words = self.options, self.scratch.row_words
        shape = (heads * height, self.work.tiling.keys)
        query = lax.broadcasted_iota(jnp.int32, (heads, height, shape[1]), 1).reshape(shape)
        key = lax.broadcasted_iota(jnp.int32, shape, 1)
        first_key = item.block * self.work.tiling.keys
        distance = query - key + (tile.position - first_key)
        visible = distance >= 0

        def of_rows(word: int) -> jax.Array:
            return jnp.concatenate([words[word, :height]] * heads, axis=0)

        if options.span_ends is not None:
            visible |= key < of_rows(0) - first_key
        if options.window is not None:
            visible &= distance < options.window
        if options.tree_mask is not None:
            begin, end = self.work.query_starts[item.seq], self.work.query_starts[item.seq + 1]
            column = key + (first_key - (self.work.seq_lens[item.seq] - (end - begin)))
            column = jnp.where(end - begin <= options.tree_mask.shape[1], column, -1)
            for word in range(words.shape[0]):
                bit = jnp.clip(column - 32 * word, 0, 31)
                allowed = (lax.shift_right_logical(jnp.broadcast_to(of_rows(word), shape), bit) & 1) == 1
                if options.window is not None:  # by the place in the cache
                    allowed &= distance < options.window
                of_word = (column >= 32 * word) & (column < 32 * word + 32)
                visible = (of_word & allowed) | (~of_word & visible)
        if self.row_words is not None:
            visible &= key < tile.key_end - first_key
        return distance, visible

    def _rows_of(self, kv_head: int) -> tuple[int, int]:
        """The rows that hold the head's keys and its values; see `tpu.page_rows`."""
        kv_heads, page_rows = self.heads // self.group, self.scratch.separate.shape[0]
        if page_rows == 2 * kv_heads:
            return 2 * kv_head, 2 * kv_head + 1
        return kv_head * page_rows // kv_heads, kv_head * page_rows // kv_heads

    def _of_one_row(self, heads: range) -> list[tuple[int, int, int, int]]:
        """(first head, how many, row of their keys, row of their values) of heads that one product serves."""
        runs = [(rows, list(run)) for rows, run in itertools.groupby(heads, self._rows_of)]
        return [(run[0], len(run), *rows) for rows, run in runs]

    def _values(self, row: int) -> jax.Array:
        """[keys, value lanes] of a row of the block."""
        width, separate = self.scratch.acc.shape[1], self.scratch.separate
        return separate[row] if width == separate.shape[2] else separate[row, :, :width]

    def finish(self, tile: Tile, height: int) -> None:
        """Divides by the sums, and lays the tile out as it leaves: [height, heads, lanes]."""
        scratch = self.scratch

        def results(rows: Any) -> list[tuple[Any, jax.Array]]:
            weight_sum = jnp.sum(scratch.running_sum[rows], axis=1, keepdims=True)
            divisor = weight_sum
            if self.options.tree_mask is not None:
                divisor = jnp.where(weight_sum > 0, weight_sum, 1.0)
            found = [(scratch.out_tile, scratch.acc[rows] * (self.scales[1] / divisor))]
            if self.options.return_lse:
                found.append((scratch.lse_tile, scratch.running_max[rows] + jnp.log(weight_sum)))
            return [(target, values.astype(target.dtype)) for target, values in found]

        def give(first: jax.Array | int, count: int) -> None:
            per_head = [results(pl.ds(head * height + first, count)) for head in range(self.heads)]
            for of_heads in zip(*per_head, strict=True):
                values = jnp.stack([values for _, values in of_heads])
                of_heads[0][0][pl.ds(first, count)] = jnp.swapaxes(values, 0, 1)

        if height == 1:
            for target, values in results(pl.ds(0, self.heads)):
                target[0] = values
        else:
            _in_strips(tile.num_queries, give)


def _sum_lanes(tiling: Tiling) -> int:
    """Partial sums of a row's weights: adding across lanes is dear, and is left to the end."""
    return LANES if tiling.keys % LANES == 0 else tiling.keys


def _lanes(x: jax.Array, width: int) -> jax.Array:
    """[rows, LANES] of equal lanes to [rows, width]."""
    if width % LANES == 0:
        return jnp.concatenate([x] * (width // LANES), axis=1)
    return x[:, :width] if width < LANES else jnp.broadcast_to(x[:, :1], (x.shape[0], width))


def _in_strips(num_queries: jax.Array, do: Callable[[jax.Array | int, int], None]) -> None:
    """do(first, count) for strips that cover the queries; a whole tile would not fit in registers."""

    def strip(index: jax.Array, _: None) -> None:
        do(pl.multiple_of(index * STRIP, STRIP), STRIP)

    lax.fori_loop(0, pl.cdiv(num_queries, STRIP), strip, None)

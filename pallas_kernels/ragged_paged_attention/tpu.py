"""The op on TPU, as one Pallas Mosaic kernel: cache write, then flash attention over the pages.

What it computes
    `reference.attend`, with the online softmax of FlashAttention-2 (Dao 2023, section 3.1) in float32.

How work is laid out
    One program runs the whole batch, because how much there is to do is only known on the device.
    First every new key and value is copied into its page, one copy per page touched. Then the program
    walks a list of work items (sequence, tile of queries, block of keys), in that order, over what is
    really there: empty sequences, padding, and keys that causality or a window hides cost nothing.
    Two cursors walk the same list: one starts the copies of a block (and, with the first block of a
    tile, of its queries), the other computes `RING - 1` items behind it, so that the copies of the
    next blocks, tiles and sequences fly while this one is computed. Sequences of one query use a tile
    of one query, the others the tall tile of `Tiling`.

What lives where (bytes for bfloat16, 8 key-value heads, 32 query heads, head_dim 128)
    HBM     q, out, the new keys and values, and the whole cache, which is never sliced or copied.
    SMEM    seq_lens, query_starts and page_table, at most 512 KiB.
    VMEM    ring of key-value blocks [RING, block, 2 * kv_heads, head_dim]      4 MiB at 512 keys
            ring of query tiles [RING, tile, heads, head_dim]                   2 MiB at 128 queries
            the tile's queries by head [kv_heads, group * tile, head_dim]       1 MiB
            running maximum and sum [kv_heads, group * tile, 128] float32       2 MiB each
            running output [kv_heads, group * tile, head_dim] float32           2 MiB
            the tile's output [tile, heads, head_dim]                           1 MiB
    vregs   the logits of one key-value head at a time.

Why it cannot race
    All cache writes have landed before the first page is read, so it does not matter who shares which
    page. A ring slot is filled again only after the item that used it has been computed, since both
    happen in one program, in order. The tile's output is overwritten only after its last copy out has
    been waited for, and each copy out covers just the rows of its own tile.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.cache import to_cache_dtype, token_positions
from pallas_kernels.ragged_paged_attention.options import AttentionOptions

RING = 2
LANES = 128
MAX_PAGES_PER_SEQ = 2**16
VMEM_BYTES = 60 * 2**20
# Finite, so that a row that has seen nothing yet gives exp(MASKED - MASKED) and not NaN.
MASKED = -(2.0**127)


@dataclass(frozen=True)
class Tiling:
    """How many queries and keys a work item covers.

    Attributes:
        queries: tokens in a tile of a sequence that has more than one query.
        keys: tokens in a block of keys, a multiple of the page size.
    """

    queries: int
    keys: int

    @classmethod
    def choose(cls, num_tokens: int, group: int, kv_heads: int, page_size: int, decode_only: bool) -> Tiling:
        """512 rows of queries per key-value head, and blocks of about 2 MiB of keys and values."""
        keys = max(1, (512 * 8 // max(kv_heads, 8)) // page_size) * page_size
        if decode_only:
            return cls(1, keys)
        queries = 16 * max(1, 512 // group // 16)
        return cls(min(queries, 16 * pl.cdiv(num_tokens, 16)), keys)


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
    tiling: Tiling | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `ragged_paged_attention`; lse is zero unless `options.return_lse`.

    Raises:
        ValueError: what this backend cannot do, and what to use instead.
    """
    _refuse_unsupported(page_table, kv_pages, options)
    num_tokens, heads, head_dim = q.shape
    kv_heads, page_size = k.shape[1], kv_pages.shape[2]
    group = heads // kv_heads
    if tiling is None:
        tiling = Tiling.choose(num_tokens, group, kv_heads, page_size, options.decode_only)
    num_rows, lanes = page_rows(kv_heads, head_dim)
    sequence, position, is_real = token_positions(seq_lens, query_starts, num_tokens)
    new = jnp.stack(
        [
            to_cache_dtype(k, options.k_scale, kv_pages.dtype),
            to_cache_dtype(v, options.v_scale, kv_pages.dtype),
        ],
        axis=2,
    )

    per_head = [x for x in (options.sinks, options.alibi_slopes) if x is not None]
    scales = [jnp.float32(1) if x is None else x for x in (options.k_scale, options.v_scale)]
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    lse_rows = num_tokens if options.return_lse else 1
    call = pl.pallas_call(
        functools.partial(_kernel, options=options, tiling=tiling, group=group),
        out_shape=(
            jax.ShapeDtypeStruct((num_tokens, heads, lanes), q.dtype),
            jax.ShapeDtypeStruct((*kv_pages.shape[:3], num_rows, lanes), kv_pages.dtype),
            jax.ShapeDtypeStruct((lse_rows, heads, LANES), jnp.float32),
        ),
        in_specs=[smem] * (5 + len(per_head)) + [hbm] * 4,
        out_specs=(hbm, hbm, hbm),
        scratch_shapes=_scratch_shapes(
            q.dtype, kv_pages.dtype, heads, group, num_rows, lanes, page_table.shape[1], tiling
        ),
        input_output_aliases={8 + len(per_head): 1},
        cost_estimate=_cost(q, kv_pages, page_table),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES),
        name="ragged_paged_attention",
    )
    out, pages, lse = call(
        jnp.asarray(layer, jnp.int32).reshape(1),
        seq_lens,
        query_starts,
        page_table[sequence, jnp.where(is_real, position // page_size, 0)],
        jnp.stack(scales),
        *per_head,
        page_table[:, None],
        _spread(q, kv_heads, lanes),
        new.reshape(num_tokens, num_rows, lanes),
        kv_pages.reshape(*kv_pages.shape[:3], num_rows, lanes),
    )
    out = jnp.where(is_real[:, None, None], _gather(out, kv_heads, head_dim), jnp.zeros((), out.dtype))
    return out, pages.reshape(kv_pages.shape), lse[:, :, 0] if options.return_lse else jnp.zeros(q.shape[:2])


def page_rows(kv_heads: int, head_dim: int) -> tuple[int, int]:
    """How the keys and values of one token stand in a page: (rows, lanes).

    Heads narrower than half a vector register stand side by side in rows of 128 lanes, so that no lane
    of memory is wasted: hold the cache as [layers, pages, page_size, rows, lanes] and give the op
    `kv_pages.reshape(..., 2 * kv_heads, head_dim)`. The reshapes there and here cancel; a cache that is
    held otherwise is copied at every call. Where head_dim is no multiple of 128 and heads cannot be put
    side by side, rows are [2 * kv_heads, head_dim], and the cache must be held row-major (as
    `jax.experimental.layout.Layout((0, 1, 2, 3, 4))`) lest it be copied.
    """
    if LANES % (2 * head_dim) == 0 and (2 * kv_heads * head_dim) % LANES == 0:
        return 2 * kv_heads * head_dim // LANES, LANES
    return 2 * kv_heads, head_dim


def _spread(q: jax.Array, kv_heads: int, lanes: int) -> jax.Array:
    """Queries [T, heads, head_dim] at the lanes of their keys, [T, heads, lanes], with zeros elsewhere.

    Times a row of the page this gives the product with the keys alone.
    """
    tokens, heads, head_dim = q.shape
    side_by_side = max(1, lanes // (2 * head_dim))
    if lanes == head_dim:
        return q
    q = q.reshape(tokens, kv_heads // side_by_side, side_by_side, heads // kv_heads, head_dim)
    begins = [2 * head_dim * place for place in range(side_by_side)]
    return jnp.stack(
        [
            jnp.pad(q[:, :, place], ((0, 0), (0, 0), (0, 0), (begin, lanes - begin - head_dim)))
            for place, begin in enumerate(begins)
        ],
        axis=2,
    ).reshape(tokens, heads, lanes)


def _gather(out: jax.Array, kv_heads: int, head_dim: int) -> jax.Array:
    """The inverse for outputs, which stand at the lanes of their values: [T, heads, head_dim]."""
    tokens, heads, lanes = out.shape
    side_by_side = max(1, lanes // (2 * head_dim))
    if lanes == head_dim:
        return out
    out = out.reshape(tokens, kv_heads // side_by_side, side_by_side, heads // kv_heads, lanes)
    begins = [2 * head_dim * place + head_dim for place in range(side_by_side)]
    return jnp.stack(
        [out[:, :, place, :, begin : begin + head_dim] for place, begin in enumerate(begins)], axis=2
    ).reshape(tokens, heads, head_dim)


def _scratch_shapes(
    q_dtype: jnp.dtype,
    cache_dtype: jnp.dtype,
    heads: int,
    group: int,
    num_rows: int,
    lanes: int,
    pages_per_seq: int,
    tiling: Tiling,
) -> _Scratch:
    kv_heads, rows = heads // group, group * tiling.queries
    # 8-bit numbers are exact in bfloat16.
    wide = jnp.float32 in (q_dtype, cache_dtype)
    compute_dtype = jnp.dtype(jnp.float32 if wide else jnp.bfloat16)
    return _Scratch(
        tables=pltpu.SMEM((2, 1, pages_per_seq), jnp.int32),
        kv_blocks=pltpu.VMEM((RING, tiling.keys, num_rows, lanes), cache_dtype),
        q_tiles=pltpu.VMEM((RING, tiling.queries, heads, lanes), q_dtype),
        queries=pltpu.VMEM((kv_heads, rows, lanes), compute_dtype),
        running_max=pltpu.VMEM((kv_heads, rows, 1), jnp.float32),
        running_sum=pltpu.VMEM((kv_heads, rows, 1), jnp.float32),
        acc=pltpu.VMEM((kv_heads, rows, lanes), jnp.float32),
        out_tile=pltpu.VMEM((tiling.queries, heads, lanes), q_dtype),
        lse_tile=pltpu.VMEM((tiling.queries, heads, LANES), jnp.float32),
        table_arrived=pltpu.SemaphoreType.DMA((2,)),
        kv_arrived=pltpu.SemaphoreType.DMA((RING,)),
        q_arrived=pltpu.SemaphoreType.DMA((RING,)),
        written=pltpu.SemaphoreType.DMA((2,)),
    )


def _refuse_unsupported(page_table: jax.Array, kv_pages: jax.Array, options: AttentionOptions) -> None:
    if options.tree_mask is not None or options.span_ends is not None:
        name = "tree_mask" if options.span_ends is None else "span_ends"
        raise ValueError(f"the tpu backend has no {name}; use backend='xla'.")
    if kv_pages.dtype == jnp.float16:
        raise ValueError("the tpu backend has no float16 pages, as TPUs have no float16; use bfloat16.")
    if page_table.shape[1] > MAX_PAGES_PER_SEQ:
        raise ValueError(
            f"the page table has {page_table.shape[1]} pages a sequence, and the tpu backend has room for "
            f"{MAX_PAGES_PER_SEQ}; use larger pages."
        )


def _cost(q: jax.Array, kv_pages: jax.Array, page_table: jax.Array) -> pl.CostEstimate:
    """The cost of a batch that fills its page table: lengths are not known when this is compiled."""
    tokens, heads, head_dim = q.shape
    num_seqs, pages = page_table.shape
    keys = pages * kv_pages.shape[2]
    page_bytes = math.prod(kv_pages.shape[2:]) * kv_pages.dtype.itemsize
    new_bytes = 2 * tokens * page_bytes // kv_pages.shape[2]
    return pl.CostEstimate(
        flops=4 * tokens * heads * head_dim * keys,
        transcendentals=tokens * heads * keys,
        bytes_accessed=num_seqs * pages * page_bytes + 2 * q.size * q.dtype.itemsize + new_bytes,
    )


def _by_row(block: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    """[keys, rows, lanes] to a [keys, lanes] of the given dtype for every row."""
    keys, rows, lanes = block.shape
    if dtype != jnp.bfloat16 or block.dtype != jnp.bfloat16 or rows % 16:
        return list(jnp.swapaxes(block.astype(dtype), 0, 1))
    # Two rows share a 32-bit word, and whole words are transposed at half the price; a bfloat16 is
    # the upper half of the float32 that it stands for.
    pairs = pltpu.bitcast(block.reshape(keys * rows, lanes), jnp.uint32).reshape(keys, rows // 2, lanes)
    separate = []
    for pair in jnp.swapaxes(pairs, 0, 1):
        for bits in (pair << 16, pair & jnp.uint32(0xFFFF0000)):
            separate.append(lax.bitcast_convert_type(bits, jnp.float32).astype(dtype))
    return separate


class _Scratch(NamedTuple):
    """Buffers and semaphores of the program; the opening of this file has their sizes."""

    tables: Any
    kv_blocks: Any
    q_tiles: Any
    queries: Any
    running_max: Any
    running_sum: Any
    acc: Any
    out_tile: Any
    lse_tile: Any
    table_arrived: Any
    kv_arrived: Any
    q_arrived: Any
    written: Any


class _Item(NamedTuple):
    """A block of keys for a tile of queries: the sequence, the tile's first packed row, the block's index."""

    seq: jax.Array
    row: jax.Array
    block: jax.Array


class _Tile(NamedTuple):
    """What follows from an item's sequence and row.

    Attributes:
        num_queries: rows of the tile.
        position: place of its first query in the sequence.
        key_begin, key_end: the keys that any of its queries may see.
    """

    num_queries: jax.Array
    position: jax.Array
    key_begin: jax.Array
    key_end: jax.Array


def _kernel(
    layer: Any,
    seq_lens: Any,
    query_starts: Any,
    new_pages: Any,
    scales: Any,
    *refs: Any,
    options: AttentionOptions,
    tiling: Tiling,
    group: int,
) -> None:
    given = iter(refs)
    sinks = next(given) if options.sinks is not None else None
    slopes = next(given) if options.alibi_slopes is not None else None
    page_table, q, new, _, out, pages, lse = (next(given) for _ in range(7))
    scratch = _Scratch(*given)
    program = _Program(
        options, tiling, group, layer, seq_lens, query_starts, new_pages, scales, sinks, slopes,
        page_table, q, new, pages, out, lse, scratch,
    )  # fmt: skip
    program.write_new_tokens()
    program.attend()


@dataclass(frozen=True)
class _Program:
    """The kernel's operands, and its steps as methods."""

    options: AttentionOptions
    tiling: Tiling
    group: int
    layer: Any
    seq_lens: Any
    query_starts: Any
    new_pages: Any
    scales: Any
    sinks: Any
    slopes: Any
    page_table: Any
    q: Any
    new: Any
    pages: Any
    out: Any
    lse: Any
    scratch: _Scratch

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]

    @property
    def page_size(self) -> int:
        return self.pages.shape[2]

    def page(self, index: jax.Array) -> Any:
        """A page of this layer, [page_size, rows, lanes] in HBM."""
        return self.pages.at[self.layer[0], index]

    def write_new_tokens(self) -> None:
        """Starts a copy per page that new tokens fall into, and waits for all of them."""
        arrived = self.scratch.written.at[0]

        def write_sequence(seq: jax.Array, _: None) -> None:
            begin, end = self.query_starts[seq], self.query_starts[seq + 1]
            context = self.seq_lens[seq] - (end - begin)

            def write_page(row: jax.Array) -> jax.Array:
                position = context + row - begin
                offset = lax.rem(position, self.page_size)
                count = jnp.minimum(self.page_size - offset, end - row)
                page = self.page(self.new_pages[row])
                pltpu.make_async_copy(
                    self.new.at[pl.ds(row, count)], page.at[pl.ds(offset, count)], arrived
                ).start()
                return row + count

            lax.while_loop(lambda row: row < end, write_page, begin)

        lax.fori_loop(0, self.num_seqs, write_sequence, None)
        total = self.query_starts[self.num_seqs]

        @pl.when(total > 0)
        def _() -> None:
            # A semaphore counts bytes: one wait for as many as all the copies together.
            everything = self.new.at[pl.ds(0, total)]
            pltpu.make_async_copy(everything, everything, arrived).wait()

    def attend(self) -> None:
        """Computes every item, with the copies of the next ones under way."""
        first = self.first_item_of(self.next_sequence(jnp.int32(0)))
        self.start_table_fetch(first.seq, jnp.int32(0))
        ahead, table = first, jnp.int32(0)
        for slot in range(RING - 1):
            ahead, table = self.start_fetch(ahead, jnp.int32(slot), table)

        def step(carry: Any) -> Any:
            item, ahead, table, slot, last_row, last_count = carry
            ahead, table = self.start_fetch(ahead, lax.rem(slot + RING - 1, RING), table)
            tile = self.tile(item)
            self.wait_for_fetch(item, tile, slot)
            heights = {1, self.tiling.queries}
            for height in heights:

                @pl.when(True if len(heights) == 1 else (tile.num_queries == 1) == (height == 1))
                def _(height: int = height) -> None:
                    self.compute(item, tile, slot, height, last_row, last_count)

            following = self.advance(item)
            done = (following.seq != item.seq) | (following.row != item.row)
            last_row = jnp.where(done, item.row, last_row)
            last_count = jnp.where(done, tile.num_queries, last_count)
            return following, ahead, table, lax.rem(slot + 1, RING), last_row, last_count

        start = (first, ahead, table, jnp.int32(0), jnp.int32(0), jnp.int32(0))
        *_, last_row, last_count = lax.while_loop(lambda carry: carry[0].seq < self.num_seqs, step, start)
        self.wait_for_output(last_row, last_count)

    def next_sequence(self, seq: jax.Array) -> jax.Array:
        """The first sequence from this one on that has queries, or num_seqs."""

        def is_empty(seq: jax.Array) -> jax.Array:
            inside = jnp.minimum(seq, self.num_seqs - 1)
            return (seq < self.num_seqs) & (self.query_starts[inside] == self.query_starts[inside + 1])

        return lax.while_loop(is_empty, lambda seq: seq + 1, seq)

    def first_item_of(self, seq: jax.Array) -> _Item:
        row = self.query_starts[jnp.minimum(seq, self.num_seqs)]
        return self._first_block(seq, row)

    def _first_block(self, seq: jax.Array, row: jax.Array) -> _Item:
        begin = self.tile(_Item(seq, row, jnp.int32(0))).key_begin
        return _Item(seq, row, lax.div(begin, self.tiling.keys))

    def tile(self, item: _Item) -> _Tile:
        seq = jnp.minimum(item.seq, self.num_seqs - 1)
        left = self.query_starts[seq + 1] - item.row
        count = jnp.minimum(left, self.tiling.queries)
        position = self.seq_lens[seq] - left
        begin = jnp.int32(0)
        if self.options.window is not None:
            begin = jnp.maximum(position - (self.options.window - 1), 0)
        return _Tile(count, position, begin, position + count)

    def advance(self, item: _Item) -> _Item:
        """The item after this one: the next block, else the next tile, else the next sequence."""
        tile = self.tile(item)
        next_block = item.block + 1
        same_tile = next_block * self.tiling.keys < tile.key_end
        next_row = item.row + tile.num_queries
        seq = jnp.minimum(item.seq, self.num_seqs - 1)
        same_seq = next_row < self.query_starts[seq + 1]
        after = lax.cond(
            same_tile | same_seq,
            lambda: item.seq,
            lambda: self.next_sequence(jnp.minimum(item.seq + 1, self.num_seqs)),
        )
        fresh = self._first_block(after, next_row)
        return _Item(
            after, jnp.where(same_tile, item.row, next_row), jnp.where(same_tile, next_block, fresh.block)
        )

    def _page_range(self, item: _Item, tile: _Tile) -> tuple[jax.Array, jax.Array]:
        """Pages of the sequence, first and past the last, that hold the block's visible keys."""
        begin = jnp.maximum(tile.key_begin, item.block * self.tiling.keys)
        end = jnp.minimum(tile.key_end, (item.block + 1) * self.tiling.keys)
        return lax.div(begin, self.page_size), pl.cdiv(end, self.page_size)

    def _is_first(self, item: _Item, tile: _Tile) -> jax.Array:
        return item.block == lax.div(tile.key_begin, self.tiling.keys)

    def _table_copy(self, seq: jax.Array, table: jax.Array) -> Any:
        scratch = self.scratch
        return pltpu.make_async_copy(
            self.page_table.at[seq], scratch.tables.at[table], scratch.table_arrived.at[table]
        )

    def start_table_fetch(self, seq: jax.Array, table: jax.Array) -> None:
        @pl.when(seq < self.num_seqs)
        def _() -> None:
            self._table_copy(seq, table).start()

    def start_fetch(self, item: _Item, slot: jax.Array, table: jax.Array) -> tuple[_Item, jax.Array]:
        """Starts the copies of the item's pages and, if it is its tile's first, of its queries.

        `table` is where the page table of the item's sequence is or will be; returns the next item and
        where its table will be.
        """
        scratch = self.scratch

        @pl.when(item.seq < self.num_seqs)
        def _() -> None:
            tile = self.tile(item)
            begin, end = self._page_range(item, tile)
            first_of_block = item.block * (self.tiling.keys // self.page_size)
            is_first = self._is_first(item, tile)

            @pl.when(is_first & (item.row == self.query_starts[item.seq]))
            def _() -> None:
                self._table_copy(item.seq, table).wait()
                self.start_table_fetch(self.next_sequence(item.seq + 1), 1 - table)

            @pl.when(is_first)
            def _() -> None:
                self._queries_copy(item, tile, slot).start()

            def fetch_page(index: jax.Array, _: None) -> None:
                place = pl.ds((index - first_of_block) * self.page_size, self.page_size)
                pltpu.make_async_copy(
                    self.page(scratch.tables[table, 0, index]),
                    scratch.kv_blocks.at[slot, place],
                    scratch.kv_arrived.at[slot],
                ).start()

            lax.fori_loop(begin, end, fetch_page, None)

        following = self.advance(item)
        return following, jnp.where(following.seq == item.seq, table, 1 - table)

    def _queries_copy(self, item: _Item, tile: _Tile, slot: jax.Array) -> Any:
        return pltpu.make_async_copy(
            self.q.at[pl.ds(item.row, tile.num_queries)],
            self.scratch.q_tiles.at[slot, pl.ds(0, tile.num_queries)],
            self.scratch.q_arrived.at[slot],
        )

    def wait_for_fetch(self, item: _Item, tile: _Tile, slot: jax.Array) -> None:
        begin, end = self._page_range(item, tile)
        fetched = self.scratch.kv_blocks.at[slot, pl.ds(0, (end - begin) * self.page_size)]
        pltpu.make_async_copy(fetched, fetched, self.scratch.kv_arrived.at[slot]).wait()

        @pl.when(self._is_first(item, tile))
        def _() -> None:
            self._queries_copy(item, tile, slot).wait()

    def _output_copies(self, row: jax.Array, count: jax.Array) -> list[Any]:
        scratch, rows, own = self.scratch, pl.ds(row, count), pl.ds(0, count)
        copies = [pltpu.make_async_copy(scratch.out_tile.at[own], self.out.at[rows], scratch.written.at[0])]
        if self.options.return_lse:
            copies.append(
                pltpu.make_async_copy(scratch.lse_tile.at[own], self.lse.at[rows], scratch.written.at[1])
            )
        return copies

    def wait_for_output(self, row: jax.Array, count: jax.Array) -> None:
        """Waits until the tile of these rows has left; count is 0 where there was none."""

        @pl.when(count > 0)
        def _() -> None:
            for copy in self._output_copies(row, count):
                copy.wait()

    def compute(
        self,
        item: _Item,
        tile: _Tile,
        slot: jax.Array,
        height: int,
        last_row: jax.Array,
        last_count: jax.Array,
    ) -> None:
        """One item, in a tile of `height` queries; rows of a head's queries are [group, height]."""

        @pl.when(self._is_first(item, tile))
        def _() -> None:
            self._start_tile(slot, height)

        self._attend_block(item, tile, slot, height)

        @pl.when((item.block + 1) * self.tiling.keys >= tile.key_end)
        def _() -> None:
            self.wait_for_output(last_row, last_count)
            self._finish_tile(height)
            for copy in self._output_copies(item.row, tile.num_queries):
                copy.start()

    def _start_tile(self, slot: jax.Array, height: int) -> None:
        scratch = self.scratch
        kv_heads, _, head_dim = scratch.queries.shape
        rows = self.group * height
        queries = scratch.q_tiles[slot].astype(scratch.queries.dtype)
        queries = queries[0] if height == 1 else jnp.swapaxes(queries, 0, 1)
        scratch.queries[:, :rows] = queries.reshape(kv_heads, rows, head_dim)
        scratch.acc[:, :rows] = jnp.zeros((kv_heads, rows, head_dim), jnp.float32)
        for head in range(kv_heads):
            # A sink is a logit that has been seen already, and has no value behind it.
            if self.sinks is None:
                scratch.running_max[head, :rows] = jnp.full((rows, 1), MASKED)
                scratch.running_sum[head, :rows] = jnp.zeros((rows, 1), jnp.float32)
            else:
                scratch.running_max[head, :rows] = self._per_row(self.sinks, head, height)
                scratch.running_sum[head, :rows] = jnp.ones((rows, 1), jnp.float32)

    def _per_row(self, of_head: Any, kv_head: int, height: int) -> jax.Array:
        """float32[heads] in SMEM to [group * height, 1], for the rows of one key-value head."""
        member = lax.broadcasted_iota(jnp.int32, (self.group, height, 1), 0).reshape(-1, 1)
        values = jnp.full(member.shape, of_head[kv_head * self.group])
        for index in range(1, self.group):
            values = jnp.where(member == index, of_head[kv_head * self.group + index], values)
        return values

    def _clean_block(self, item: _Item, tile: _Tile, slot: jax.Array) -> None:
        """Zeroes what no query sees: it may be anything, and zero times NaN is NaN."""
        keys = self.tiling.keys
        begin = jnp.clip(tile.key_begin - item.block * keys, 0, keys)
        end = jnp.clip(tile.key_end - item.block * keys, 0, keys)
        blocks = self.scratch.kv_blocks

        def clean(index: jax.Array, _: None) -> None:
            blocks[slot, index] = jnp.zeros(blocks.shape[2:], blocks.dtype)

        lax.fori_loop(0, begin, clean, None)
        lax.fori_loop(end, keys, clean, None)

    def _attend_block(self, item: _Item, tile: _Tile, slot: jax.Array, height: int) -> None:
        scratch, options = self.scratch, self.options
        kv_heads, dtype = scratch.queries.shape[0], scratch.queries.dtype
        rows, keys = self.group * height, self.tiling.keys
        precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
        self._clean_block(item, tile, slot)
        block = _by_row(scratch.kv_blocks[slot], dtype)

        query = lax.broadcasted_iota(jnp.int32, (self.group, height, keys), 1).reshape(rows, keys)
        key = lax.broadcasted_iota(jnp.int32, (rows, keys), 1)
        distance = query - key + (tile.position - item.block * keys)
        visible = distance >= 0
        if options.window is not None:
            visible &= distance < options.window

        for head in range(kv_heads):
            key_row, value_row = self._rows_of(head)
            logits = lax.dot_general(
                scratch.queries[head, :rows], block[key_row], (((1,), (1,)), ((), ())),
                precision=precision, preferred_element_type=jnp.float32,
            )  # fmt: skip
            logits = options.cap(logits * (options.scale * self.scales[0]))
            if self.slopes is not None:
                logits -= self._per_row(self.slopes, head, height) * distance.astype(jnp.float32)
            logits = jnp.where(visible, logits, MASKED)

            old_max = scratch.running_max[head, :rows]
            new_max = jnp.maximum(old_max, jnp.max(logits, axis=1, keepdims=True))
            weights = jnp.exp(logits - new_max)
            decay = jnp.exp(old_max - new_max)
            scratch.running_max[head, :rows] = new_max
            scratch.running_sum[head, :rows] = decay * scratch.running_sum[head, :rows] + jnp.sum(
                weights, axis=1, keepdims=True
            )
            partial = jnp.dot(
                weights.astype(dtype),
                block[value_row],
                precision=precision,
                preferred_element_type=jnp.float32,
            )
            scratch.acc[head, :rows] = decay * scratch.acc[head, :rows] + partial

    def _rows_of(self, kv_head: int) -> tuple[int, int]:
        """The rows of a page that hold the head's keys and its values; see `page_rows`."""
        kv_heads, num_rows = self.scratch.queries.shape[0], self.pages.shape[3]
        if num_rows == 2 * kv_heads:
            return 2 * kv_head, 2 * kv_head + 1
        return kv_head * num_rows // kv_heads, kv_head * num_rows // kv_heads

    def _finish_tile(self, height: int) -> None:
        scratch = self.scratch
        rows, heads = self.group * height, scratch.out_tile.shape[1]

        def store(target: Any, values: jax.Array) -> None:
            """[kv_heads, group * height, lanes] to the target's [height, heads, lanes]."""
            values = values.astype(target.dtype)
            if height == 1:
                target[0] = values.reshape(heads, values.shape[2])
            else:
                target[...] = jnp.swapaxes(values.reshape(heads, height, values.shape[2]), 0, 1)

        weight_sum = scratch.running_sum[:, :rows]
        store(scratch.out_tile, scratch.acc[:, :rows] * (self.scales[1] / weight_sum))
        if self.options.return_lse:
            lse = scratch.running_max[:, :rows] + jnp.log(weight_sum)
            store(scratch.lse_tile, jnp.broadcast_to(lse, (*lse.shape[:2], LANES)))

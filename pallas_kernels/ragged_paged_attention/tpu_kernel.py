"""The op on TPU, as one Pallas Mosaic kernel: cache write, then flash attention over the pages.

What it computes
    `reference.attend`, with the online softmax of FlashAttention-2 (Dao 2023, section 3.1) in float32.

How work is laid out
    One program runs the whole batch, because how much there is to do is only known on the device.
    First every new key and value is copied into its page, one copy per page touched. Then the program
    walks a list of work items (sequence, tile of queries, block of keys), in that order, over what is
    really there: empty sequences, padding, and blocks that causality or a window hides cost nothing.
    Two cursors walk the same list: one starts the copies of a block (and, with the first block of a
    tile, of its queries), the other computes `RING - 1` items behind, so that the copies of the
    next blocks, tiles and sequences fly while this one is computed. Sequences of one query use a tile
    of one query, the others the tall tile of `Tiling`.

What lives where (bytes for bfloat16, 8 key-value heads, 32 query heads, head_dim 128)
    HBM     q, out, the new keys and values, and the whole cache, which is never sliced or copied.
    SMEM    seq_lens, query_starts, the pages of the new tokens; and the page tables of two sequences, this
            one's and the next one's, at most 256 KiB each: all of them at once might not fit.
    VMEM    ring of key-value blocks [RING, keys, 2 * kv_heads, head_dim]       4 MiB at 512 keys
            the block, each row apart [2 * kv_heads, keys, head_dim]            2 MiB
            ring of query tiles [RING, queries, heads, head_dim]                2 MiB at 128 queries
            the tile's queries by head [heads * queries, head_dim]              1 MiB
            running maximum and sum [heads * queries, 128] float32              2 MiB each
            running output [heads * queries, head_dim] float32                  2 MiB
            the tile's output [queries, heads, head_dim]                        1 MiB
    vregs   what is being laid apart: 64 keys of 16 rows or 16 queries at a time; logits of a key-value head.

Why it cannot race
    All cache writes have landed before the first page is read, so it does not matter who shares which
    page. A ring slot is filled again only after the item that used it has been computed, and a page
    table is replaced only after its last page has been asked for, since all of it happens in one
    program, in order. The tile's output is overwritten only after its last copy out has
    been waited for, and each copy out covers just the rows of its own tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.options import AttentionOptions
from pallas_kernels.ragged_paged_attention.tpu_flash import RING, FlashTile, Scratch
from pallas_kernels.ragged_paged_attention.tpu_work import Item, Tile, Tiling, WorkList

FETCHED = 8  # pages whose copies are started together


def kernel(
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
    """The body of the Pallas call; of the array options only those that are given are among `refs`."""
    given = iter(refs)
    sinks = None if options.sinks is None else next(given)
    slopes = None if options.alibi_slopes is None else next(given)
    row_words = None if options.span_ends is None and options.tree_mask is None else next(given)
    page_table, q, new, _, out, pages, lse = (next(given) for _ in range(7))
    scratch = Scratch(*given)
    work = WorkList(options, tiling, pages.shape[2], seq_lens, query_starts)
    flash = FlashTile(work, group, q.shape[0], scales, sinks, slopes, row_words, scratch)
    program = _Program(work, flash, scratch, layer, new_pages, page_table, q, new, pages, out, lse)
    program.write_new_tokens()
    program.attend()


@dataclass(frozen=True)
class _Program:
    """What is moved between HBM and the chip, and when. The refs from page_table on are in HBM.

    Attributes:
        layer: int32[1] in SMEM.
        new_pages: int32[T] in SMEM, the page that each new token goes to.
    """

    work: WorkList
    flash: FlashTile
    scratch: Scratch
    layer: Any
    new_pages: Any
    page_table: Any
    q: Any
    new: Any
    pages: Any
    out: Any
    lse: Any

    @property
    def table_entries(self) -> int:
        """Of the page table of a sequence."""
        entries: int = self.page_table.shape[2]
        return entries

    def _page(self, index: jax.Array) -> Any:
        """A page of this layer, [page_size, rows, lanes] in HBM."""
        return self.pages.at[self.layer[0], index]

    def write_new_tokens(self) -> None:
        """Starts a copy per page that new tokens fall into, and waits for all of them."""
        arrived = self.scratch.written.at[0]

        def write_sequence(seq: jax.Array, _: None) -> None:
            begin, end = self.work.query_starts[seq], self.work.query_starts[seq + 1]
            context = self.work.seq_lens[seq] - (end - begin)

            def write_page(row: jax.Array) -> jax.Array:
                position = context + row - begin
                offset = lax.rem(position, self.work.page_size)
                count = jnp.minimum(self.work.page_size - offset, end - row)
                page = self._page(self.new_pages[row])
                pltpu.make_async_copy(
                    self.new.at[pl.ds(row, count)], page.at[pl.ds(offset, count)], arrived
                ).start()
                return row + count

            lax.while_loop(lambda row: row < end, write_page, begin)

        lax.fori_loop(0, self.work.num_seqs, write_sequence, None)
        total = self.work.query_starts[self.work.num_seqs]

        @pl.when(total > 0)
        def _() -> None:
            # A semaphore counts bytes: one wait for as many as all the copies together.
            everything = self.new.at[pl.ds(0, total)]
            pltpu.make_async_copy(everything, everything, arrived).wait()

    def attend(self) -> None:
        """Computes every item, with the copies of the next ones under way."""
        work = self.work
        first = work.first()
        self._start_table_fetch(first.seq, jnp.int32(0))
        ahead, table = first, jnp.int32(0)
        for slot in range(RING - 1):
            ahead, table = self._start_fetch(ahead, jnp.int32(slot), table)

        def step(carry: Any) -> Any:
            item, ahead, table, slot, last_row, last_count = carry
            ahead, table = self._start_fetch(ahead, lax.rem(slot + RING - 1, RING), table)
            tile = work.tile(item)
            self._wait_for_fetch(item, tile, slot)
            if work.tiling.queries == 1:
                self._compute(item, tile, slot, 1, last_row, last_count)
            else:
                lax.cond(
                    tile.num_queries == 1,
                    lambda: self._compute(item, tile, slot, 1, last_row, last_count),
                    lambda: self._compute(item, tile, slot, work.tiling.queries, last_row, last_count),
                )
            is_last = work.is_last_of_tile(item, tile)
            last_row = jnp.where(is_last, item.row, last_row)
            last_count = jnp.where(is_last, tile.num_queries, last_count)
            return work.after(item), ahead, table, lax.rem(slot + 1, RING), last_row, last_count

        start = (first, ahead, table, jnp.int32(0), jnp.int32(0), jnp.int32(0))
        *_, last_row, last_count = lax.while_loop(lambda carry: work.exists(carry[0]), step, start)
        self._wait_for_output(last_row, last_count)

    def _compute(
        self, item: Item, tile: Tile, slot: jax.Array, height: int, last_row: jax.Array, last_count: jax.Array
    ) -> None:
        """One item, in a tile of `height` queries; last_row and last_count are of the tile before."""

        @pl.when(self.work.is_first_of_tile(item, tile))
        def _() -> None:
            self.flash.start(item, tile, slot, height)

        self.flash.attend(item, tile, slot, height)

        @pl.when(self.work.is_last_of_tile(item, tile))
        def _() -> None:
            self._wait_for_output(last_row, last_count)
            self.flash.finish(tile, height)
            for copy in self._output_copies(item.row, tile.num_queries):
                copy.start()

    def _table_copy(self, seq: jax.Array, table: jax.Array) -> Any:
        scratch = self.scratch
        return pltpu.make_async_copy(
            self.page_table.at[seq, 0],
            scratch.tables.at[pl.ds(table * self.table_entries, self.table_entries)],
            scratch.table_arrived.at[table],
        )

    def _start_table_fetch(self, seq: jax.Array, table: jax.Array) -> None:
        @pl.when(seq < self.work.num_seqs)
        def _() -> None:
            self._table_copy(seq, table).start()

    def _start_fetch(self, item: Item, slot: jax.Array, table: jax.Array) -> tuple[Item, jax.Array]:
        """Starts the copies of the item's pages and, if it is its tile's first, of its queries.

        `table` is where the page table of the item's sequence is or will be; returns the next item and
        where its table will be.
        """
        scratch = self.scratch

        @pl.when(self.work.exists(item))
        def _() -> None:
            tile = self.work.tile(item)
            begin, end = self.work.pages(item, tile)
            pages = self.work.tiling.keys // self.work.page_size
            first_of_block = item.block * pages
            first_entry = table * self.table_entries + first_of_block
            is_first = self.work.is_first_of_tile(item, tile)

            @pl.when(self.work.is_first_of_sequence(item, tile))
            def _() -> None:
                self._table_copy(item.seq, table).wait()
                self._start_table_fetch(self.work.sequence_from(item.seq + 1), 1 - table)

            @pl.when(is_first)
            def _() -> None:
                self._queries_copy(item, tile, slot).start()

            def fetch_page(place: jax.Array, _: None = None) -> None:
                own = pl.ds(place * self.work.page_size, self.work.page_size)
                pltpu.make_async_copy(
                    self._page(scratch.tables[first_entry + place]),
                    scratch.kv_blocks.at[slot, own],
                    scratch.kv_arrived.at[slot],
                ).start()

            def fetch_all() -> None:
                together = math.gcd(pages, FETCHED)

                def fetch_some(index: jax.Array, _: None) -> None:
                    for page in range(together):
                        fetch_page(index * together + page)

                lax.fori_loop(0, pages // together, fetch_some, None)

            def fetch_visible() -> None:
                lax.fori_loop(begin - first_of_block, end - first_of_block, fetch_page, None)

            # Of a whole block it is known how many pages there are, so that starting one waits for no other.
            lax.cond(end - begin == pages, fetch_all, fetch_visible)

        following = self.work.after(item)
        return following, jnp.where(following.seq == item.seq, table, 1 - table)

    def _queries_copy(self, item: Item, tile: Tile, slot: jax.Array) -> Any:
        return pltpu.make_async_copy(
            self.q.at[pl.ds(item.row, tile.num_queries)],
            self.scratch.q_tiles.at[slot, pl.ds(0, tile.num_queries)],
            self.scratch.q_arrived.at[slot],
        )

    def _wait_for_fetch(self, item: Item, tile: Tile, slot: jax.Array) -> None:
        begin, end = self.work.pages(item, tile)
        fetched = self.scratch.kv_blocks.at[slot, pl.ds(0, (end - begin) * self.work.page_size)]
        pltpu.make_async_copy(fetched, fetched, self.scratch.kv_arrived.at[slot]).wait()

        @pl.when(self.work.is_first_of_tile(item, tile))
        def _() -> None:
            self._queries_copy(item, tile, slot).wait()

    def _output_copies(self, row: jax.Array, count: jax.Array) -> list[Any]:
        scratch, rows, own = self.scratch, pl.ds(row, count), pl.ds(0, count)
        copies = [pltpu.make_async_copy(scratch.out_tile.at[own], self.out.at[rows], scratch.written.at[0])]
        if self.work.options.return_lse:
            copies.append(
                pltpu.make_async_copy(scratch.lse_tile.at[own], self.lse.at[rows], scratch.written.at[1])
            )
        return copies

    def _wait_for_output(self, row: jax.Array, count: jax.Array) -> None:
        """Waits until the tile of these rows has left; count is 0 where there was none."""

        @pl.when(count > 0)
        def _() -> None:
            for copy in self._output_copies(row, count):
                copy.wait()

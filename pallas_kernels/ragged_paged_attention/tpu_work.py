"""The order in which the TPU kernel works: which queries meet which keys, and what comes next.

A work item is a block of keys for a tile of queries of one sequence. Items are walked sequence by
sequence, tile by tile, block by block, over what is really there. Everything here is scalar arithmetic
on lengths in SMEM; nothing is stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.ragged_paged_attention.options import AttentionOptions


@dataclass(frozen=True)
class Tiling:
    """How many queries and keys a work item covers.

    Attributes:
        queries: tokens in a tile of a sequence that has more than one query: a multiple of 16, or 1 where
            there are none.
        keys: tokens in a block of keys, a multiple of the page size.
    """

    queries: int
    keys: int

    @classmethod
    def choose(cls, q: jax.Array, kv_pages: jax.Array, page_table: jax.Array, decode_only: bool) -> Tiling:
        """512 rows of queries per key-value head, and blocks of about 2 MiB of keys and values.

        Of few heads so many keys would be in vain where sequences are short, and too many beside 512 rows.
        """
        num_tokens, heads, _ = q.shape
        page_size, kv_heads = kv_pages.shape[2], kv_pages.shape[3] // 2
        pages = max(1, 512 * 8 // max(kv_heads, 4 if decode_only else 8) // page_size)
        keys = min(pages, page_table.shape[1]) * page_size
        if decode_only:
            return cls(1, keys)
        queries = 16 * max(1, 512 // (heads // kv_heads) // 16)
        return cls(min(queries, 16 * pl.cdiv(num_tokens, 16)), keys)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Tiling:
        """What `dataclasses.asdict` made of one."""
        return cls(**fields)


class Item(NamedTuple):
    """A block of keys for a tile of queries: the sequence, the tile's first packed row, the block's index."""

    seq: jax.Array
    row: jax.Array
    block: jax.Array


class Tile(NamedTuple):
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


@dataclass(frozen=True)
class WorkList:
    """All items of a batch. An item whose sequence is num_seqs is past the end.

    Attributes:
        seq_lens: int32[S] in SMEM.
        query_starts: int32[S + 1] in SMEM.
    """

    options: AttentionOptions
    tiling: Tiling
    page_size: int
    seq_lens: Any
    query_starts: Any

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]

    def exists(self, item: Item) -> jax.Array:
        return item.seq < self.num_seqs

    def first(self) -> Item:
        seq = self.sequence_from(jnp.int32(0))
        return self._first_of_tile(seq, self.query_starts[seq])

    def sequence_from(self, seq: jax.Array) -> jax.Array:
        """The first sequence from this one on that has queries, or num_seqs."""

        def is_empty(seq: jax.Array) -> jax.Array:
            inside = jnp.minimum(seq, self.num_seqs - 1)
            return (seq < self.num_seqs) & (self.query_starts[inside] == self.query_starts[inside + 1])

        return lax.while_loop(is_empty, lambda seq: seq + 1, seq)

    def tile(self, item: Item) -> Tile:
        seq = jnp.minimum(item.seq, self.num_seqs - 1)
        left = self.query_starts[seq + 1] - item.row
        count = jnp.minimum(left, self.tiling.queries)
        length = self.seq_lens[seq]
        position = length - left
        begin, end = jnp.int32(0), position + count
        if self.options.window is not None:
            begin = jnp.maximum(position - (self.options.window - 1), 0)
        if self.options.tree_mask is not None or self.options.span_ends is not None:
            # Both may show a query what comes after it.
            end = length
        return Tile(count, position, begin, end)

    def is_first_of_tile(self, item: Item, tile: Tile) -> jax.Array:
        return item.block == lax.div(tile.key_begin, self.tiling.keys)

    def is_last_of_tile(self, item: Item, tile: Tile) -> jax.Array:
        return (item.block + 1) * self.tiling.keys >= tile.key_end

    def is_first_of_sequence(self, item: Item, tile: Tile) -> jax.Array:
        return self.is_first_of_tile(item, tile) & (item.row == self.query_starts[item.seq])

    def after(self, item: Item) -> Item:
        """The item after this one: the next block, else the next tile, else the next sequence."""
        tile = self.tile(item)
        next_row = item.row + tile.num_queries
        ends_tile = self.is_last_of_tile(item, tile)
        ends_sequence = ends_tile & (
            next_row >= self.query_starts[jnp.minimum(item.seq, self.num_seqs - 1) + 1]
        )
        seq = lax.cond(
            ends_sequence & self.exists(item), lambda: self.sequence_from(item.seq + 1), lambda: item.seq
        )
        fresh = self._first_of_tile(seq, next_row)
        return Item(
            seq,
            jnp.where(ends_tile, next_row, item.row),
            jnp.where(ends_tile, fresh.block, item.block + 1),
        )

    def _first_of_tile(self, seq: jax.Array, row: jax.Array) -> Item:
        begin = self.tile(Item(seq, row, jnp.int32(0))).key_begin
        return Item(seq, row, lax.div(begin, self.tiling.keys))

    def pages(self, item: Item, tile: Tile) -> tuple[jax.Array, jax.Array]:
        """Pages of the sequence, first and past the last, that hold the block's visible keys."""
        begin = jnp.maximum(tile.key_begin, item.block * self.tiling.keys)
        end = jnp.minimum(tile.key_end, (item.block + 1) * self.tiling.keys)
        return lax.div(begin, self.page_size), pl.cdiv(end, self.page_size)

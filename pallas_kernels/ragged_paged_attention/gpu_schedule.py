"""Which query rows make up a tile, and which keys a warpgroup reads for it.

A row is one query head of one token. The rows of a sequence that share a key-value head are packed into
tiles, so that one read of a key serves the whole group of query heads and, in a prefill, many tokens.
What a row may see (causality, window, spans, padding) is reduced here to an interval of keys: the kernel
knows nothing else of masks. All of it is a few integers a row, worked out by XLA; none of it depends on
the layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Generic, NamedTuple, Protocol, Self, TypeVar

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.options import AttentionOptions

NOWHERE = 2**31 - 1  # past every key

# Columns of Work.items.
TILE, SEQUENCE, START, STOP, FULL_START, FULL_STOP, PIECE = range(7)


class KeyCut(Protocol):
    """How the work is cut, of a kernel that adds to this what it does with a tile.

    Attributes:
        rows: of a tile.
        keys: that are multiplied at a time, a block.
        splits: about how many pieces all keys of a batch are cut into, so that few long sequences
            still fill the device; 0 leaves the keys of a tile whole.
        pieces: the most pieces that the keys of one tile are cut into.
    """

    @property
    def rows(self) -> int: ...
    @property
    def keys(self) -> int: ...
    @property
    def splits(self) -> int: ...
    @property
    def pieces(self) -> int: ...


def is_split(cut: KeyCut) -> bool:
    """Whether the keys of one tile may be cut into several pieces."""
    return cut.splits > 0 and cut.pieces > 1


C = TypeVar("C")


@dataclass(frozen=True)
class TwoCuts(Generic[C]):
    """How sequences of few queries are cut, and those of many; a backend's tiling names the class of both."""

    cut: ClassVar[type[Any]]
    short: C
    long: C

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Self:
        """What `dataclasses.asdict` made of one."""
        return cls(cls.cut(**fields["short"]), cls.cut(**fields["long"]))


@dataclass(frozen=True)
class Cut:
    """The cut of the Mosaic kernel, and what of it a thread block does at a time.

    Attributes:
        warpgroups: warpgroups that compute one tile, 64 rows each.
        pairs: tiles (of two key-value heads or two items) that a thread block works on side by side.
        keys: keys that are multiplied at a time, a block; 64 or 128.
        stages: blocks of keys and of values in flight.
        splits, pieces: see `KeyCut`.
    """

    warpgroups: int = 1
    pairs: int = 1
    keys: int = 64
    stages: int = 2
    splits: int = 0
    pieces: int = 1

    @property
    def rows(self) -> int:
        """Rows of a tile."""
        return 64 * self.warpgroups

    @property
    def threads(self) -> int:
        """Warpgroups of a thread block: those that compute, and one for each pair that fetches."""
        return self.pairs * (self.warpgroups + 1)


class Tiles(NamedTuple):
    """Rows cut into tiles of R; where a sequence's rows do not fill a tile, the last one is repeated.

    Attributes:
        token, group_head: int32[tiles, R] packed token, and query head within its group, of a row.
        position: int32[tiles, R] position of the row's token in its sequence.
        begin, end: int32[tiles, R] the row sees the keys [begin, end), where it is in no tree.
        tree: int32[tiles, R] position from which on the row sees what tree_bits say, if before end.
        tree_bits: int32[tiles, words, R] bit j of all words is whether the row sees the key tree + j.
        sequence: int32[tiles].
        used: bool[tiles].
        first: int32[S] first tile of a sequence.
    """

    token: jax.Array
    group_head: jax.Array
    position: jax.Array
    begin: jax.Array
    end: jax.Array
    tree: jax.Array | None
    tree_bits: jax.Array | None
    sequence: jax.Array
    used: jax.Array
    first: jax.Array


class Work(NamedTuple):
    """What each warpgroup does.

    Attributes:
        items: int32[items, 7] tile, sequence, first key (aligned to a page, or within one to a block),
            one past the last key, the range of blocks (counted from the first key) whose keys all rows
            see, and the piece of the tile that this is. Items without work have no keys.
        first: int32[tiles] first item of a tile.
        pieces: int32[tiles] items of a tile.
    """

    items: jax.Array
    first: jax.Array
    pieces: jax.Array


def short_tiles(group: int, rows: int = 64) -> int:
    """Tiles of so many rows that a short sequence has: as many as one token needs."""
    return -(-group // rows)


def is_short(query_starts: jax.Array, group: int, rows: int = 64) -> jax.Array:
    """bool[S]: whether all rows of a sequence fit into the tiles that its last token alone would need."""
    return (query_starts[1:] - query_starts[:-1]) * group <= rows * short_tiles(group, rows)


def cut_short(
    rows: int,
    num_tokens: int,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    group: int,
    options: AttentionOptions,
) -> Tiles:
    """The tiles of short sequences, `rows` rows each: decodes, and drafts that are verified; no others.

    Args:
        num_tokens: T, of which the last may be padding.
        seq_lens: int32[S].
        query_starts: int32[S + 1].
        group: query heads of a key-value head.
    """
    each = short_tiles(group, rows)
    queries = query_starts[1:] - query_starts[:-1]
    first = jnp.arange(seq_lens.shape[0], dtype=jnp.int32) * each
    tile = jnp.arange(seq_lens.shape[0] * each, dtype=jnp.int32)
    sequence = tile // each
    used = is_short(query_starts, group, rows)[sequence] & (tile % each * rows < queries[sequence] * group)
    return _tiles(rows, num_tokens, seq_lens, query_starts, group, sequence, used, first, options)


def cut_long(
    rows: int,
    num_tokens: int,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    group: int,
    options: AttentionOptions,
    *,
    short_rows: int = 64,
) -> Tiles:
    """The tiles of all sequences that are not short, `rows` rows each; the rest as for `cut_short`."""
    num_seqs = seq_lens.shape[0]
    queries = jnp.where(is_short(query_starts, group, short_rows), 0, query_starts[1:] - query_starts[:-1])
    each = -(-queries * group // rows)
    last = jnp.cumsum(each, dtype=jnp.int32)
    # As many tiles as a batch can have.
    tile = jnp.arange((num_tokens * group + num_seqs * (rows - 1)) // rows, dtype=jnp.int32)
    sequence = jnp.searchsorted(last, tile, side="right", method="compare_all").astype(jnp.int32)
    sequence = jnp.minimum(sequence, num_seqs - 1)
    used = tile < last[-1]
    return _tiles(rows, num_tokens, seq_lens, query_starts, group, sequence, used, last - each, options)


def _tiles(
    rows: int,
    num_tokens: int,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    group: int,
    sequence: jax.Array,
    used: jax.Array,
    first: jax.Array,
    options: AttentionOptions,
) -> Tiles:
    queries = query_starts[1:] - query_starts[:-1]
    tile = jnp.arange(sequence.shape[0], dtype=jnp.int32)
    row = (tile - first[sequence])[:, None] * rows + jnp.arange(rows, dtype=jnp.int32)
    row = jnp.clip(row, 0, jnp.maximum(queries[sequence] * group - 1, 0)[:, None])
    token = jnp.minimum(query_starts[sequence][:, None] + row // group, num_tokens - 1)
    position = (seq_lens - queries)[sequence][:, None] + row // group
    end = position + 1
    if options.span_ends is not None:
        end = jnp.maximum(end, jnp.minimum(options.span_ends[token], seq_lens[sequence][:, None]))
    begin = jnp.zeros_like(position)
    if options.window is not None:
        begin = jnp.maximum(position + 1 - options.window, 0)
    tree = tree_bits = None
    if options.tree_mask is not None:
        # A tree is of all new tokens of a sequence; one of more than the mask is wide has none.
        in_tree = (queries <= options.tree_mask.shape[1])[sequence][:, None]
        tree = jnp.where(in_tree, (seq_lens - queries)[sequence][:, None], NOWHERE)
        tree = jnp.broadcast_to(tree, end.shape)
        end = jnp.where(in_tree, seq_lens[sequence][:, None], end)
        tree_bits = _packed(options.tree_mask)[token].swapaxes(1, 2)
    return Tiles(token, row % group, position, begin, end, tree, tree_bits, sequence, used, first)


def _packed(mask: jax.Array) -> jax.Array:
    """bool[T, D] to int32[T, ceil(D / 32)], the first column in the lowest bit."""
    mask = jnp.pad(mask, ((0, 0), (0, -mask.shape[1] % 32))).reshape(mask.shape[0], -1, 32)
    bits = mask.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32)
    return jax.lax.bitcast_convert_type(bits.sum(axis=2, dtype=jnp.uint32), jnp.int32)


def cut_keys(tiles: Tiles, cut: KeyCut, page_size: int) -> Work:
    """Gives every tile its keys, in one piece or, where `cut` says so, in several of like length."""
    align = min(cut.keys, page_size)
    start = tiles.begin.min(axis=1) // align * align
    stop = tiles.end.max(axis=1)
    blocks = jnp.where(tiles.used, -(-(stop - start) // cut.keys), 0)
    num_tiles = blocks.shape[0]
    if is_split(cut):
        # A piece shorter than a few blocks costs more in merging than it gains.
        length = jnp.maximum(-(-blocks.sum() // cut.splits), 4)
        pieces = jnp.minimum(-(-blocks // length), cut.pieces)
        length = -(-blocks // jnp.maximum(pieces, 1))
        pieces = -(-blocks // jnp.maximum(length, 1))
        # Sum of ceil(blocks / length) <= tiles + sum of blocks / length <= tiles + splits.
        item = jnp.arange(min(num_tiles + cut.splits, num_tiles * cut.pieces), dtype=jnp.int32)
        ends = jnp.cumsum(pieces, dtype=jnp.int32)
        tile = jnp.searchsorted(ends, item, side="right", method="compare_all").astype(jnp.int32)
        tile = jnp.minimum(tile, num_tiles - 1)
        first = ends - pieces
        piece = item - first[tile]
        keys = length[tile] * cut.keys
        begin = start[tile] + piece * keys
        stop = jnp.minimum(stop[tile], begin + keys)
        used = item < ends[-1]
    else:
        tile = first = jnp.arange(num_tiles, dtype=jnp.int32)
        pieces, piece, begin, used = jnp.ones_like(tile), jnp.zeros_like(tile), start, tiles.used
    begin, stop = jnp.where(used, begin, 0), jnp.where(used, stop, 0)
    blocks = -(-(stop - begin) // cut.keys)
    full_start = jnp.clip(-(-(tiles.begin.max(axis=1)[tile] - begin) // cut.keys), 0, blocks)
    all_see = tiles.end if tiles.tree is None else jnp.minimum(tiles.end, tiles.tree)
    full_stop = (jnp.minimum(all_see.min(axis=1)[tile], stop) - begin) // cut.keys
    full_stop = jnp.clip(full_stop, full_start, blocks)
    columns = [tile, tiles.sequence[tile], begin, stop, full_start, full_stop, piece]
    return Work(jnp.stack(columns, axis=1).astype(jnp.int32), first, pieces)

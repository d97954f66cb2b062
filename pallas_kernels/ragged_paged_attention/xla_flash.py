"""The portable fast path: blockwise online softmax (FlashAttention-2, Dao 2023, section 3.1) in XLA.

Work is proportional to the tokens that are there, not to the padded shapes, because both loops run
for as many trips as the real lengths ask for:

- Sequences with one query (decodes) are cut into blocks of keys. The (sequence, block) pairs of the
  whole batch form one list, and a trip takes the next few pairs side by side; partial results meet
  in per-sequence running maxima, sums and outputs.
- Sequences with more queries (prefill chunks) are cut into tiles of queries; each tile walks over
  the blocks of keys it can see.

A block is gathered from its pages once, as one copy per page, and masked values are replaced by
zero, since what an unused slot holds (NaN included) must not reach the result. An option that is
not used leaves no operation behind; a sink is where a row's running maximum and sum start.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ragged_paged_attention.options import AttentionOptions

# Finite, so that a row that has seen nothing yet gives exp(MASKED - MASKED) and not NaN.
MASKED = -1e30
# Where no sequence has more queries than this, tiles are the short ones, since a tile costs the same
# whether it is full or not.
SHORT_PREFILL = 128


@dataclass(frozen=True)
class Tiling:
    """How the work is cut.

    Attributes:
        decode_block: keys in a block of a decode; a page at least.
        decode_lanes: the fewest and the most such blocks side by side, between which there are four for
            each sequence.
        short_tiles, long_tiles: queries in a tile and keys in a block of prefills.
    """

    decode_block: int = 64
    decode_lanes: tuple[int, int] = (4, 32)
    short_tiles: tuple[int, int] = (64, 128)
    long_tiles: tuple[int, int] = (256, 256)

    @classmethod
    def choose(cls, kv_heads: int, head_dim: int) -> Tiling:
        """Decodes gather about 3 MiB at a time: enough to share out, and little enough to stay in a cache.

        Wide caches take shorter blocks, for the same reason.
        """
        narrow = kv_heads * head_dim <= 256
        block = 64 if narrow else 32
        lanes = (3 << 20) // (block * 2 * kv_heads * head_dim * 4)
        most = min(max(1 << max(lanes, 1).bit_length() - 1, 4), 32)
        short_tiles = (64, 128) if narrow else (64, 64)
        return cls(decode_block=block, decode_lanes=(4, most), short_tiles=short_tiles)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Tiling:
        """What `dataclasses.asdict` made of one, as JSON gives it back."""
        values: dict[str, Any] = {n: tuple(x) if isinstance(x, list) else x for n, x in fields.items()}
        return cls(**values)


@dataclass(frozen=True)
class PagedBlocks:
    """The keys and values of one layer, gathered from its pages a block at a time.

    Attributes:
        pages: [layers, pages, page_size, ...], whatever a page holds of a token.
        layer: which layer's.
        value_dim: numbers of a value.
        split: tokens [..., n, *what a page holds] to keys [..., n, kv_heads, head_dim] and values
            [..., n, kv_heads, value_dim].
    """

    pages: jax.Array
    layer: jax.Array | int
    value_dim: int
    split: Callable[[jax.Array], tuple[jax.Array, jax.Array]]

    @property
    def page_size(self) -> int:
        return self.pages.shape[2]

    def gather(self, pages: jax.Array, visible: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Pages int32[..., b] to keys and values [..., b * page_size, kv_heads, dim] in float32.

        visible is [..., b * page_size]: which positions any query may see.
        """
        block = self.pages[self.layer, pages]
        num_tokens = pages.shape[-1] * self.page_size
        block = block.reshape(*pages.shape[:-1], num_tokens, *self.pages.shape[3:])
        keys, values = self.split(block)
        zero = jnp.zeros((), values.dtype)
        return keys.astype(jnp.float32), jnp.where(visible[..., None, None], values, zero).astype(jnp.float32)


def flash_attention(
    q: jax.Array,
    blocks: PagedBlocks,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    options: AttentionOptions,
    tiling: Tiling,
) -> tuple[jax.Array, jax.Array | None]:
    """Attention of q [T, kv_heads, group, head_dim], float32 and scaled, over keys that are in their pages.

    Returns out float32[T, kv_heads, group, value_dim] and, where asked for, log-sum-exp [T, kv_heads, group].
    """
    num_tokens = q.shape[0]
    query_lens = query_starts[1:] - query_starts[:-1]
    decode_lens = jnp.where(query_lens == 1, seq_lens, 0)
    if options.decode_only:
        sees_itself = None if options.tree_mask is None else options.tree_mask[:, 0]
        return _attend_decodes(q, blocks, page_table, decode_lens, sees_itself, options, tiling)
    columns = q.transpose(1, 3, 2, 0)
    out, lse = _attend_prefills(columns, blocks, page_table, seq_lens, query_starts, options, tiling)
    rows = query_starts[:-1]
    own_row = jnp.minimum(rows, num_tokens - 1)
    sees_itself = None if options.tree_mask is None else options.tree_mask[own_row, 0]
    decodes, decode_lse = _attend_decodes(
        q[own_row], blocks, page_table, decode_lens, sees_itself, options, tiling
    )
    target = jnp.where(query_lens == 1, rows, num_tokens)
    out = out.at[..., target].set(decodes.transpose(1, 3, 2, 0), mode="drop").transpose(3, 0, 2, 1)
    if lse is not None and decode_lse is not None:
        lse = lse.at[..., target].set(decode_lse.transpose(1, 2, 0), mode="drop").transpose(2, 0, 1)
    return out, lse


def _softmax_start(options: AttentionOptions, num_kv_heads: int, group: int) -> tuple[jax.Array, jax.Array]:
    """Running maximum and sum [kv_heads, group] before the first key: a sink is a key without a value."""
    if options.sinks is None:
        return jnp.full((num_kv_heads, group), MASKED), jnp.zeros((num_kv_heads, group))
    # A sink of minus infinity is none.
    sinks = jnp.maximum(options.sinks.astype(jnp.float32), MASKED).reshape(num_kv_heads, group)
    return sinks, jnp.ones_like(sinks)


def _grouped_slopes(options: AttentionOptions, num_kv_heads: int) -> jax.Array | None:
    """ALiBi slopes [kv_heads, group]."""
    return None if options.alibi_slopes is None else options.alibi_slopes.reshape(num_kv_heads, -1)


def _attend_decodes(
    q: jax.Array,
    blocks: PagedBlocks,
    page_table: jax.Array,
    seq_lens: jax.Array,
    sees_itself: jax.Array | None,
    options: AttentionOptions,
    tiling: Tiling,
) -> tuple[jax.Array, jax.Array | None]:
    """One query per sequence: q [S, kv_heads, group, head_dim], scaled; seq_lens 0 leaves a row at zero.

    sees_itself is bool[S] under a tree mask: whether the query may see its own key.
    Returns [S, kv_heads, group, value_dim] and, where asked for, log-sum-exp [S, kv_heads, group].
    """
    num_seqs, num_kv_heads, group, _ = q.shape
    page_size = blocks.page_size
    pages_per_block = max(1, tiling.decode_block // page_size)
    block_size = pages_per_block * page_size
    lanes = min(max(4 * num_seqs, tiling.decode_lanes[0]), tiling.decode_lanes[1])
    window, slopes = options.window, _grouped_slopes(options, num_kv_heads)

    first_block = jnp.zeros_like(seq_lens)
    if window is not None:
        first_block = jnp.maximum(seq_lens - window, 0) // block_size
    num_blocks = jnp.where(seq_lens > 0, -(-seq_lens // block_size) - first_block, 0)
    list_end = jnp.cumsum(num_blocks)
    total = list_end[-1]

    def next_pairs(carry):  # type: ignore[no-untyped-def]
        done, running_max, running_sum, out = carry
        index = done + jnp.arange(lanes, dtype=jnp.int32)
        sequence = jnp.sum(list_end[None] <= index[:, None], axis=1)
        sequence = jnp.minimum(sequence, num_seqs - 1).astype(jnp.int32)
        block = first_block[sequence] + index - (list_end - num_blocks)[sequence]
        column = block[:, None] * pages_per_block + jnp.arange(pages_per_block)
        pages = page_table[sequence[:, None], jnp.clip(column, 0, page_table.shape[1] - 1)]
        position = block[:, None] * block_size + jnp.arange(block_size)
        visible = (position < seq_lens[sequence][:, None]) & (index < total)[:, None]
        if window is not None:
            visible &= position >= seq_lens[sequence][:, None] - window
        if sees_itself is not None:
            visible &= sees_itself[sequence][:, None] | (position < seq_lens[sequence][:, None] - 1)
        keys, values = blocks.gather(pages, visible)

        logits = options.cap(jnp.einsum("nkgd,nbkd->nkgb", q[sequence], keys))
        if slopes is not None:
            distance = position - (seq_lens[sequence][:, None] - 1)
            logits += slopes[..., None] * distance[:, None, None]
        logits = jnp.where(visible[:, None, None], logits, MASKED)
        new_max = running_max.at[sequence].max(logits.max(axis=-1))
        weights = jnp.exp(logits - new_max[sequence][..., None])
        if sees_itself is not None:  # only then may a row see no key at all
            weights = jnp.where(visible[:, None, None], weights, 0)
        decay = jnp.exp(running_max - new_max)
        running_sum = (running_sum * decay).at[sequence].add(weights.sum(axis=-1))
        partial = jnp.einsum("nkgb,nbkd->nkgd", weights, values)
        out = (out * decay[..., None]).at[sequence].add(partial)
        return done + lanes, new_max, running_sum, out

    start_max, start_sum = _softmax_start(options, num_kv_heads, group)
    start = (
        jnp.int32(0),
        jnp.broadcast_to(start_max, (num_seqs, num_kv_heads, group)),
        jnp.broadcast_to(start_sum, (num_seqs, num_kv_heads, group)),
        jnp.zeros((num_seqs, num_kv_heads, group, blocks.value_dim), jnp.float32),
    )
    _, maximum, weight_sum, out = lax.while_loop(lambda carry: carry[0] < total, next_pairs, start)
    lse = maximum + jnp.log(weight_sum) if options.return_lse else None
    return out / jnp.where(weight_sum > 0, weight_sum, 1)[..., None], lse


def _attend_prefills(
    q: jax.Array,
    blocks: PagedBlocks,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    options: AttentionOptions,
    tiling: Tiling,
) -> tuple[jax.Array, jax.Array | None]:
    """Sequences with two queries or more: q [kv_heads, head_dim, group, T], scaled.

    Returns [kv_heads, value_dim, group, T] and, where asked for, log-sum-exp [kv_heads, group, T]. Columns
    of other sequences hold numbers of no meaning.
    """

    def in_tiles(sizes: tuple[int, int]) -> tuple[jax.Array, jax.Array | None]:
        return _attend_in_tiles(q, blocks, page_table, seq_lens, query_starts, options, *sizes)

    if q.shape[3] <= SHORT_PREFILL:
        return in_tiles(tiling.short_tiles)
    longest = jnp.max(query_starts[1:] - query_starts[:-1])
    is_long = longest > SHORT_PREFILL
    return lax.cond(is_long, lambda: in_tiles(tiling.long_tiles), lambda: in_tiles(tiling.short_tiles))


@dataclass(frozen=True)
class _Tile:
    """What decides which keys the queries of one tile see; C = group * tile columns.

    Attributes:
        position: int32[C] of each query in its sequence.
        first_block: int32[], no query sees a key of the blocks before.
        key_end: int32[], no query sees a key from here on.
        span_end: int32[C], None without spans.
        tree: bool[D, C], which of the new tokens each query sees; None without a tree mask.
        new_start: int32[], where the new tokens begin that `tree` speaks of; past every key where the
            sequence has more than D of them.
    """

    position: jax.Array
    first_block: jax.Array
    key_end: jax.Array
    span_end: jax.Array | None
    tree: jax.Array | None
    new_start: jax.Array

    def sees(self, key_position: jax.Array, exists: jax.Array, options: AttentionOptions) -> jax.Array:
        """bool[keys, C] of key_position int32[keys], where exists bool[keys] are before key_end."""
        key_position = key_position[:, None]
        visible = exists[:, None] & options.visible(key_position, self.position, self.span_end)
        if self.tree is None:
            return visible
        column = jnp.clip(key_position[:, 0] - self.new_start, 0, self.tree.shape[0] - 1)
        allowed = options.within_window(exists[:, None] & self.tree[column], key_position, self.position)
        return jnp.where(key_position >= self.new_start, allowed, visible)


def _attend_in_tiles(
    q: jax.Array,
    blocks: PagedBlocks,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    options: AttentionOptions,
    tile: int,
    block: int,
) -> tuple[jax.Array, jax.Array | None]:
    """Queries are columns here: logits are [kv_heads, keys, queries], so that maxima and sums run over rows.

    q is [kv_heads, head_dim, group, T], the result [kv_heads, value_dim, group, T].
    """
    num_kv_heads, head_dim, group, num_tokens = q.shape
    value_dim = blocks.value_dim
    page_size = blocks.page_size
    tile = min(tile, num_tokens)
    pages_per_block = max(1, block // page_size)
    block_size = pages_per_block * page_size
    # Room past the end, so that neither a tile nor a block is ever shifted back to fit.
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, tile)))
    page_table = jnp.pad(page_table, ((0, 0), (0, pages_per_block)))
    span_ends, tree = options.span_ends, options.tree_mask
    if span_ends is not None:
        span_ends = jnp.pad(span_ends, (0, tile))
    if tree is not None:
        tree = jnp.pad(tree.T, ((0, 0), (0, tile)))
    slopes = _grouped_slopes(options, num_kv_heads)
    if slopes is not None:
        slopes = jnp.repeat(slopes, tile, axis=1)[:, None]  # [kv_heads, 1, C]

    query_lens = query_starts[1:] - query_starts[:-1]
    num_tiles = jnp.where(query_lens > 1, -(-query_lens // tile), 0)
    list_end = jnp.cumsum(num_tiles)

    def describe_tile(sequence: jax.Array, row_in_sequence: jax.Array, row: jax.Array) -> _Tile:
        new_start = seq_lens[sequence] - query_lens[sequence]
        first_position = new_start + row_in_sequence
        first_block = jnp.int32(0)
        if options.window is not None:
            first_block = jnp.maximum(first_position - options.window + 1, 0) // block_size
        key_end, span_end, seen_of_tree = first_position + tile, None, None
        if span_ends is not None:
            # Rows past the sequence's end are another's.
            is_own = row_in_sequence + jnp.arange(tile) < query_lens[sequence]
            span_end = jnp.where(is_own, lax.dynamic_slice_in_dim(span_ends, row, tile), 0)
            key_end = jnp.maximum(key_end, span_end.max())
            span_end = jnp.tile(span_end, group)
        if tree is not None:
            is_tree = query_lens[sequence] <= tree.shape[0]
            seen_of_tree = jnp.tile(lax.dynamic_slice_in_dim(tree, row, tile, axis=1), (1, group))
            key_end = jnp.where(is_tree, seq_lens[sequence], key_end)
            new_start = jnp.where(is_tree, new_start, seq_lens[sequence])
        key_end = jnp.minimum(seq_lens[sequence], key_end)
        position = jnp.tile(first_position + jnp.arange(tile), group)
        return _Tile(position, first_block, key_end, span_end, seen_of_tree, new_start)

    def next_tile(carry):  # type: ignore[no-untyped-def]
        index, out, lse = carry
        sequence = jnp.sum(list_end <= index)
        row_in_sequence = (index - (list_end - num_tiles)[sequence]) * tile
        row = query_starts[sequence] + row_in_sequence
        queries = lax.dynamic_slice_in_dim(q, row, tile, axis=3).reshape(num_kv_heads, head_dim, -1)
        here = describe_tile(sequence, row_in_sequence, row)
        table = page_table[sequence]

        def next_block(carry):  # type: ignore[no-untyped-def]
            block, running_max, running_sum, acc = carry
            pages = lax.dynamic_slice_in_dim(table, block * pages_per_block, pages_per_block)
            key_position = block * block_size + jnp.arange(block_size)
            exists = key_position < here.key_end
            keys, values = blocks.gather(pages, exists)
            logits = options.cap(jnp.einsum("bkd,kdq->kbq", keys, queries))
            if slopes is not None:
                logits += slopes * (key_position[:, None] - here.position)
            visible = here.sees(key_position, exists, options)
            logits = jnp.where(visible, logits, MASKED)
            new_max = jnp.maximum(running_max, logits.max(axis=1))
            weights = jnp.exp(logits - new_max[:, None])
            if tree is not None:  # only then may a query see no key at all
                weights = jnp.where(visible, weights, 0)
            decay = jnp.exp(running_max - new_max)
            running_sum = running_sum * decay + weights.sum(axis=1)
            acc = acc * decay[:, None] + jnp.einsum("bkd,kbq->kdq", values, weights)
            return block + 1, new_max, running_sum, acc

        start_max, start_sum = _softmax_start(options, num_kv_heads, group)
        start = (
            here.first_block,
            jnp.repeat(start_max, tile, axis=1),
            jnp.repeat(start_sum, tile, axis=1),
            jnp.zeros((num_kv_heads, value_dim, group * tile), jnp.float32),
        )
        _, maximum, weight_sum, acc = lax.while_loop(
            lambda carry: carry[0] * block_size < here.key_end, next_block, start
        )
        acc = acc / jnp.where(weight_sum > 0, weight_sum, 1)[:, None]
        # Columns past the sequence's end belong to later tiles, which overwrite them.
        acc = acc.reshape(num_kv_heads, value_dim, group, tile)
        out = lax.dynamic_update_slice_in_dim(out, acc, row, axis=3)
        if lse is not None:
            new = (maximum + jnp.log(weight_sum)).reshape(num_kv_heads, group, tile)
            lse = lax.dynamic_update_slice_in_dim(lse, new, row, axis=2)
        return index + 1, out, lse

    start_lse = jnp.zeros((num_kv_heads, group, num_tokens + tile)) if options.return_lse else None
    start_out = jnp.zeros((num_kv_heads, value_dim, *q.shape[2:]))
    start = (jnp.int32(0), start_out, start_lse)
    _, out, lse = lax.while_loop(lambda carry: carry[0] < list_end[-1], next_tile, start)
    return out[..., :num_tokens], None if lse is None else lse[..., :num_tokens]

"""The portable fast path: blockwise online softmax (FlashAttention-2, Dao 2023, section 3.1) in XLA.

Work is proportional to the tokens that are there, not to the padded shapes, because both loops run
for as many trips as the real lengths ask for:

- Sequences with one query (decodes) are cut into blocks of keys. The (sequence, block) pairs of the
  whole batch form one list, and a trip takes the next few pairs side by side; partial results meet
  in per-sequence running maxima, sums and outputs.
- Sequences with more queries (prefill chunks) are cut into tiles of queries; each tile walks over
  the blocks of keys it can see.

A block is gathered from its pages once, as one copy per page, and masked values are replaced by
zero, since what an unused slot holds (NaN included) must not reach the result.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.ragged_paged_attention.cache import write_new_tokens

# Finite, so that a row that has seen nothing yet gives exp(MASKED - MASKED) and not NaN.
MASKED = -1e30
DECODE_BLOCK = 64
DECODE_LANES = (4, 32)
# (queries in a tile, keys in a block) of prefills; the short ones where no sequence has more queries
# than SHORT_PREFILL, since a tile costs the same whether it is full or not.
SHORT_PREFILL = 128
SHORT_TILES = (64, 128)
LONG_TILES = (256, 256)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    *,
    scale: float,
    window: int | None,
    decode_only: bool,
) -> tuple[jax.Array, jax.Array]:
    """See `ragged_paged_attention`."""
    num_kv_heads = k.shape[1]
    kv_pages = write_new_tokens(k, v, kv_pages, layer, page_table, seq_lens, query_starts)
    grouped = (q.astype(jnp.float32) * scale).reshape(q.shape[0], num_kv_heads, -1, q.shape[2])
    query_lens = query_starts[1:] - query_starts[:-1]
    decode_lens = jnp.where(query_lens == 1, seq_lens, 0)
    if decode_only:
        out = _attend_decodes(grouped, kv_pages, layer, page_table, decode_lens, window)
    else:
        columns = grouped.transpose(1, 3, 2, 0)
        out = _attend_prefills(columns, kv_pages, layer, page_table, seq_lens, query_starts, window)
        rows = query_starts[:-1]
        decodes = _attend_decodes(
            grouped[jnp.minimum(rows, q.shape[0] - 1)], kv_pages, layer, page_table, decode_lens, window
        )
        target = jnp.where(query_lens == 1, rows, q.shape[0])
        out = out.at[..., target].set(decodes.transpose(1, 3, 2, 0), mode="drop").transpose(3, 0, 2, 1)
    return out.reshape(q.shape).astype(q.dtype), kv_pages


def _gather_blocks(
    kv_pages: jax.Array, layer: jax.Array | int, pages: jax.Array, visible: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Pages [..., b] to keys and values [..., b * page_size, kv_heads, head_dim] in float32.

    visible is [..., b * page_size]: which positions any query may see.
    """
    _, _, page_size, heads, head_dim = kv_pages.shape
    block = kv_pages[layer, pages]
    block = block.reshape(*pages.shape[:-1], pages.shape[-1] * page_size, heads // 2, 2, head_dim)
    keys, values = block[..., 0, :], block[..., 1, :]
    return keys.astype(jnp.float32), jnp.where(visible[..., None, None], values, 0).astype(jnp.float32)


def _attend_decodes(
    q: jax.Array,
    kv_pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    seq_lens: jax.Array,
    window: int | None,
) -> jax.Array:
    """One query per sequence: q [S, kv_heads, group, head_dim], scaled; seq_lens 0 leaves a row at zero."""
    num_seqs, num_kv_heads, group, head_dim = q.shape
    page_size = kv_pages.shape[2]
    pages_per_block = max(1, DECODE_BLOCK // page_size)
    block_size = pages_per_block * page_size
    lanes = min(max(4 * num_seqs, DECODE_LANES[0]), DECODE_LANES[1])

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
        keys, values = _gather_blocks(kv_pages, layer, pages, visible)

        logits = jnp.einsum("nkgd,nbkd->nkgb", q[sequence], keys)
        logits = jnp.where(visible[:, None, None], logits, MASKED)
        new_max = running_max.at[sequence].max(logits.max(axis=-1))
        weights = jnp.exp(logits - new_max[sequence][..., None])
        decay = jnp.exp(running_max - new_max)
        running_sum = (running_sum * decay).at[sequence].add(weights.sum(axis=-1))
        partial = jnp.einsum("nkgb,nbkd->nkgd", weights, values)
        out = (out * decay[..., None]).at[sequence].add(partial)
        return done + lanes, new_max, running_sum, out

    start = (
        jnp.int32(0),
        jnp.full((num_seqs, num_kv_heads, group), MASKED, jnp.float32),
        jnp.zeros((num_seqs, num_kv_heads, group), jnp.float32),
        jnp.zeros((num_seqs, num_kv_heads, group, head_dim), jnp.float32),
    )
    _, _, weight_sum, out = lax.while_loop(lambda carry: carry[0] < total, next_pairs, start)
    return out / jnp.where(weight_sum > 0, weight_sum, 1)[..., None]


def _attend_prefills(
    q: jax.Array,
    kv_pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    window: int | None,
) -> jax.Array:
    """Sequences with two queries or more: q [kv_heads, head_dim, group, T], scaled; returns the same shape.

    Columns of other sequences hold numbers of no meaning.
    """

    def in_tiles(sizes: tuple[int, int]) -> jax.Array:
        return _attend_in_tiles(q, kv_pages, layer, page_table, seq_lens, query_starts, window, *sizes)

    if q.shape[3] <= SHORT_PREFILL:
        return in_tiles(SHORT_TILES)
    longest = jnp.max(query_starts[1:] - query_starts[:-1])
    return lax.cond(longest > SHORT_PREFILL, lambda: in_tiles(LONG_TILES), lambda: in_tiles(SHORT_TILES))


def _attend_in_tiles(
    q: jax.Array,
    kv_pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    window: int | None,
    tile: int,
    block: int,
) -> jax.Array:
    """Queries are columns here: logits are [kv_heads, keys, queries], so that maxima and sums run over rows.

    q and the result are [kv_heads, head_dim, group, T].
    """
    num_kv_heads, head_dim, group, num_tokens = q.shape
    page_size = kv_pages.shape[2]
    tile = min(tile, num_tokens)
    pages_per_block = max(1, block // page_size)
    block_size = pages_per_block * page_size
    # Room past the end, so that neither a tile nor a block is ever shifted back to fit.
    q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, tile)))
    page_table = jnp.pad(page_table, ((0, 0), (0, pages_per_block)))

    query_lens = query_starts[1:] - query_starts[:-1]
    num_tiles = jnp.where(query_lens > 1, -(-query_lens // tile), 0)
    list_end = jnp.cumsum(num_tiles)

    def next_tile(carry):  # type: ignore[no-untyped-def]
        index, out = carry
        sequence = jnp.sum(list_end <= index)
        row_in_sequence = (index - (list_end - num_tiles)[sequence]) * tile
        row = query_starts[sequence] + row_in_sequence
        first_position = seq_lens[sequence] - query_lens[sequence] + row_in_sequence
        queries = lax.dynamic_slice_in_dim(q, row, tile, axis=3).reshape(num_kv_heads, head_dim, -1)
        query_position = jnp.tile(first_position + jnp.arange(tile), group)
        key_end = jnp.minimum(seq_lens[sequence], first_position + tile)
        table = page_table[sequence]

        def next_block(carry):  # type: ignore[no-untyped-def]
            block, running_max, running_sum, acc = carry
            pages = lax.dynamic_slice_in_dim(table, block * pages_per_block, pages_per_block)
            key_position = block * block_size + jnp.arange(block_size)
            exists = key_position < key_end
            keys, values = _gather_blocks(kv_pages, layer, pages, exists)
            logits = jnp.einsum("bkd,kdq->kbq", keys, queries)
            visible = exists[:, None] & (key_position[:, None] <= query_position)
            if window is not None:
                visible &= key_position[:, None] > query_position - window
            logits = jnp.where(visible, logits, MASKED)
            new_max = jnp.maximum(running_max, logits.max(axis=1))
            weights = jnp.exp(logits - new_max[:, None])
            decay = jnp.exp(running_max - new_max)
            running_sum = running_sum * decay + weights.sum(axis=1)
            acc = acc * decay[:, None] + jnp.einsum("bkd,kbq->kdq", values, weights)
            return block + 1, new_max, running_sum, acc

        first_block = jnp.int32(0)
        if window is not None:
            first_block = jnp.maximum(first_position - window + 1, 0) // block_size
        start = (
            first_block,
            jnp.full((num_kv_heads, group * tile), MASKED, jnp.float32),
            jnp.zeros((num_kv_heads, group * tile), jnp.float32),
            jnp.zeros((num_kv_heads, head_dim, group * tile), jnp.float32),
        )
        _, _, weight_sum, acc = lax.while_loop(
            lambda carry: carry[0] * block_size < key_end, next_block, start
        )
        acc = acc / jnp.where(weight_sum > 0, weight_sum, 1)[:, None]
        # Columns past the sequence's end belong to later tiles, which overwrite them.
        acc = acc.reshape(num_kv_heads, head_dim, group, tile)
        return index + 1, lax.dynamic_update_slice_in_dim(out, acc, row, axis=3)

    start = (jnp.int32(0), jnp.zeros_like(q))
    _, out = lax.while_loop(lambda carry: carry[0] < list_end[-1], next_tile, start)
    return out[..., :num_tokens]

"""Prefill attention on a CPU over float32 pages, compiled by numba: a tile of queries of one key-value head.

FlashAttention-2 (Dao 2023, section 3.1), its two products by a tile product in registers. Queries are
columns: a vector has WIDTH queries of one head, a panel VECTORS of these, so that both products read and
write panels by vectors, and the softmax runs down each column without a sum across a vector. Vectors stand by
their queries first and heads second: those of a panel see about as many keys, and a panel goes no further.

For each block of keys a tile gathers its keys and values from their pages once, then for each panel: logits
= keys x queries, softmax, outputs += values^T x weights. A panel's queries, logits and outputs stay in the
nearest caches. What no query of the tile sees is not read, since it may hold anything, but taken as zero.
Blocks begin at multiples of BLOCK, and a masked key weighs exactly nothing: the result of a query does not
depend on how its sequence is cut into chunks and tiles, nor on other sequences.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from pallas_kernels.native.columns import Vectors, walk
from pallas_kernels.native.pointers import bytes_at, floats_at, ints_at, memcpy, record_at, words_at
from pallas_kernels.native.tiles import REGISTERS, WIDTH, tile_product
from pallas_kernels.ragged_paged_attention.cpu_call import MASKED, ONE, ZERO, cap, compiled

ROWS, VECTORS = REGISTERS // 4, 3  # of a tile product
COLUMNS = VECTORS * WIDTH
BLOCK = 64  # keys
_TILE_COLUMNS = 192

# What a thread works with. Addresses of its scratch.
TILE = np.dtype(
    [
        ("queries", "i8"),  # [panels, head_dim, COLUMNS], scaled
        ("outputs", "i8"),  # [panels, value_rows, COLUMNS], a sum so far
        ("keys", "i8"),  # [BLOCK, head_dim]
        ("values", "i8"),  # [BLOCK, value_rows]
        ("logits", "i8"),  # [BLOCK, COLUMNS], then weights
        # Of each column: the keys [first, end) that its query sees, its position, the softmax's maximum and
        # sum so far, and its head's slope.
        *((name, "i8") for name in ("first", "end", "position", "maxima", "sums", "slopes")),
        ("new_maxima", "i8"),  # [COLUMNS]
        # Of each panel: keys that some column sees, and those that every one does.
        *((name, "i8") for name in ("some_first", "some_end", "all_first", "all_end")),
        ("value_rows", "i8"),  # head_dim in whole tile products
        ("rows", "i8"),  # queries
        ("row", "i8"),  # the first one's, in the batch
        ("new_start", "i8"),  # where the tokens begin of which a tree mask speaks; past every key without
    ],
    align=True,
)
tile_at = record_at(TILE)
_TILE_BYTES = -(-TILE.itemsize // 64) * 64
_NEVER = np.int64(1 << 30)


_product = tile_product(ROWS, VECTORS, WIDTH)


def _step(*kinds: str) -> Callable[[Callable[..., tuple[Any, ...]]], Any]:
    """What a step makes of the rows of a panel: see `columns.walk`."""
    return lambda step: walk(step, kinds, VECTORS, WIDTH)


@_step("floats", "floats")
def _add_bias(vectors: Vectors, key: Any, logits: Any, slopes: Any, positions: Any) -> tuple[Any, ...]:
    """Adds each head's slope times how far a key is from the query."""
    distance = vectors.subtract(vectors.as_floats(key), positions)
    return vectors.add(logits, vectors.multiply(slopes, distance)), slopes, positions


@_step("ints", "ints")
def _mask(vectors: Vectors, key: Any, logits: Any, first: Any, end: Any) -> tuple[Any, ...]:
    """Minus infinity where a query does not see a key by its position."""
    return vectors.where(vectors.within(first, key, end), logits, vectors.number(-math.inf)), first, end


@_step("floats")
def _raise_maxima(vectors: Vectors, key: Any, logits: Any, maxima: Any) -> tuple[Any, ...]:
    """The largest logits of each query."""
    return None, vectors.larger(logits, maxima)


@_step("floats", "floats")
def _to_decay(vectors: Vectors, key: Any, new_maxima: Any, maxima: Any, sums: Any) -> tuple[Any, ...]:
    """One row: new maxima become what the sums so far are to be multiplied by; sums and maxima follow."""
    decay = vectors.exp(vectors.subtract(maxima, new_maxima))
    return decay, new_maxima, vectors.multiply(sums, decay)


def _multiply(vectors: Vectors, key: Any, row: Any, factors: Any) -> tuple[Any, ...]:
    return vectors.multiply(row, factors), factors


_scale = _step("floats")(_multiply)
_scale_vectors = walk(_multiply, ("floats",), 1, WIDTH)


@_step("floats", "floats")
def _to_weights(vectors: Vectors, key: Any, logits: Any, maxima: Any, sums: Any) -> tuple[Any, ...]:
    """e^(logit - maximum), and its sum."""
    weights = vectors.exp(vectors.subtract(logits, maxima))
    return weights, maxima, vectors.add(sums, weights)


@compiled
def queries_of(group):  # type: ignore[no-untyped-def]
    """Queries of a tile, where so many heads share a key-value head."""
    return max((_TILE_COLUMNS // group + WIDTH // 2) // WIDTH, 1) * WIDTH


@compiled
def lay_out(address, group, head_dim):  # type: ignore[no-untyped-def]
    """Places a thread's scratch at an address, unless that is 0, and gives its bytes."""
    panels = (queries_of(group) // WIDTH * group + VECTORS - 1) // VECTORS
    value_rows = (head_dim + ROWS - 1) // ROWS * ROWS
    columns = panels * COLUMNS * 4
    panel_words = (panels * 8 + 63) // 64 * 64
    if address != 0:
        tile = tile_at(address)
        end = address + _TILE_BYTES
        tile.queries, end = end, end + columns * head_dim
        tile.outputs, end = end, end + columns * value_rows
        tile.keys, end = end, end + BLOCK * head_dim * 4
        tile.values, end = end, end + BLOCK * value_rows * 4
        tile.logits, end = end, end + BLOCK * COLUMNS * 4
        tile.first, end = end, end + columns
        tile.end, end = end, end + columns
        tile.position, end = end, end + columns
        tile.maxima, end = end, end + columns
        tile.sums, end = end, end + columns
        tile.slopes, end = end, end + columns
        tile.new_maxima, end = end, end + COLUMNS * 4
        tile.some_first, end = end, end + panel_words
        tile.some_end, end = end, end + panel_words
        tile.all_first, end = end, end + panel_words
        tile.all_end, end = end, end + panel_words
        tile.value_rows = value_rows
    numbers = columns * (head_dim + value_rows + 6) + BLOCK * (head_dim + value_rows + COLUMNS) * 4
    return _TILE_BYTES + numbers + COLUMNS * 4 + 4 * panel_words


@compiled
def _pack(this, tile, kv_head, lanes):  # type: ignore[no-untyped-def]
    """Queries to panels; zeros where a vector has fewer."""
    group, head_dim, row = this.group, this.head_dim, COLUMNS * 4
    scales = floats_at(tile.new_maxima)
    for i in range(WIDTH):
        scales[i] = this.scale
    for vector in range((lanes * group + VECTORS - 1) // VECTORS * VECTORS):
        begin = vector // group * WIDTH
        feature = (kv_head * group + vector % group) * head_dim
        source = this.q + (feature * this.tokens + tile.row + begin) * 4
        target = tile.queries + vector // VECTORS * head_dim * row + vector % VECTORS * WIDTH * 4
        if begin + WIDTH <= tile.rows:
            _scale_vectors(source, this.tokens * 4, target, row, 0, head_dim, (tile.new_maxima,))
            continue
        for d in range(head_dim):
            queries, packed = floats_at(source + d * this.tokens * 4), floats_at(target + d * row)
            for i in range(WIDTH):
                packed[i] = ZERO
            for i in range(tile.rows - begin):
                packed[i] = queries[i] * this.scale


@compiled
def _describe(this, tile, sequence, kv_head, lanes, panels):  # type: ignore[no-untyped-def]
    """What each column sees, and where its softmax starts. Columns without a query see everything."""
    group = this.group
    length = np.int64(ints_at(this.lens)[sequence])
    end_row = np.int64(ints_at(this.starts)[sequence + 1])
    queries = end_row - ints_at(this.starts)[sequence]
    tile.new_start = _NEVER
    if this.tree != 0 and queries <= this.tree_width:
        tile.new_start = length - queries
    first, end, position = ints_at(tile.first), ints_at(tile.end), floats_at(tile.position)
    maxima, sums, slopes = floats_at(tile.maxima), floats_at(tile.sums), floats_at(tile.slopes)
    for panel in range(panels):
        some_first, some_end, all_first, all_end = _NEVER, np.int64(0), np.int64(0), _NEVER
        for within in range(VECTORS):
            vector = panel * VECTORS + within
            head = kv_head * group + vector % group
            for i in range(WIDTH):
                c = vector * WIDTH + i
                query = vector // group * WIDTH + i
                maxima[c], sums[c], slopes[c] = MASKED, ZERO, ZERO
                first[c], end[c], position[c] = 0, _NEVER, 0
                if query >= tile.rows or vector >= lanes * group:
                    continue
                own = length - (end_row - tile.row) + query
                its_first, its_end = np.int64(0), own + 1
                if tile.new_start != _NEVER:
                    its_end = length
                elif this.span_ends != 0:
                    its_end = max(its_end, np.int64(ints_at(this.span_ends)[tile.row + query]))
                    its_end = min(its_end, length)
                if this.window > 0:
                    its_first = max(own + 1 - this.window, np.int64(0))
                first[c], end[c], position[c] = its_first, its_end, np.float32(own)
                some_first, some_end = min(some_first, its_first), max(some_end, its_end)
                all_first, all_end = max(all_first, its_first), min(all_end, its_end)
                if this.sinks != 0:  # a key without a value; minus infinity is none
                    maxima[c], sums[c] = max(floats_at(this.sinks)[head], MASKED), ONE
                if this.slopes != 0:
                    slopes[c] = floats_at(this.slopes)[head]
        words_at(tile.some_first)[panel], words_at(tile.some_end)[panel] = some_first, some_end
        words_at(tile.all_first)[panel] = all_first
        words_at(tile.all_end)[panel] = min(all_end, tile.new_start)


@compiled
def _gather(this, tile, sequence, kv_head, start, first, count):  # type: ignore[no-untyped-def]
    """The keys and values [start, start + count) from their pages, zeros before `first` and up to ROWS."""
    head_dim, value_rows = this.head_dim, tile.value_rows
    table = ints_at(this.table + sequence * this.columns * 4)
    column, slot = start // this.page_size, start % this.page_size
    for j in range((count + ROWS - 1) // ROWS * ROWS):
        key = floats_at(tile.keys + j * head_dim * 4)
        value = floats_at(tile.values + j * value_rows * 4)
        if j < count and start + j >= first:
            token = (this.first_page + table[column]) * this.page_size + slot
            source = this.pages + (token * this.kv_heads + kv_head) * 2 * head_dim * 4
            memcpy(tile.keys + j * head_dim * 4, source, head_dim * 4)
            memcpy(tile.values + j * value_rows * 4, source + head_dim * 4, head_dim * 4)
        else:
            for i in range(head_dim):
                key[i] = ZERO
            for i in range(head_dim):
                value[i] = ZERO
        for i in range(head_dim, value_rows):
            value[i] = ZERO
        slot += 1
        if slot == this.page_size:
            column, slot = column + 1, 0


@compiled
def _mask_tree(this, tile, panel, start, count):  # type: ignore[no-untyped-def]
    """Minus infinity where a query does not see a new key by the tree mask."""
    group, logits = this.group, floats_at(tile.logits)
    for j in range(max(tile.new_start - start, 0), count):
        for c in range(COLUMNS):
            vector = panel * VECTORS + c // WIDTH
            query = vector // group * WIDTH + c % WIDTH
            if query < tile.rows:
                row = bytes_at(this.tree + (tile.row + query) * this.tree_width)
                if row[start + j - tile.new_start] == 0:
                    logits[j * COLUMNS + c] = np.float32(-np.inf)


@compiled
def _soften(tile, panel, count):  # type: ignore[no-untyped-def]
    """Logits become weights; the running maxima, sums and outputs follow."""
    logits, row, column = tile.logits, COLUMNS * 4, panel * COLUMNS * 4
    maxima, new = floats_at(tile.maxima + column), floats_at(tile.new_maxima)
    for c in range(COLUMNS):
        new[c] = maxima[c]
    _raise_maxima(logits, row, logits, row, 0, count, (tile.new_maxima,))
    changes = False
    for c in range(COLUMNS):
        changes |= new[c] != maxima[c]
    if changes:
        decays = tile.new_maxima
        _to_decay(decays, row, decays, row, 0, 1, (tile.maxima + column, tile.sums + column))
        outputs = tile.outputs + panel * tile.value_rows * row
        _scale(outputs, row, outputs, row, 0, tile.value_rows, (decays,))
    _to_weights(logits, row, logits, row, 0, count, (tile.maxima + column, tile.sums + column))


@compiled
def _attend_block(this, tile, panel, start, count):  # type: ignore[no-untyped-def]
    """The keys [start, start + count) for the queries of a panel."""
    head_dim, value_rows, row = this.head_dim, tile.value_rows, COLUMNS * 4
    queries = tile.queries + panel * head_dim * row
    outputs = tile.outputs + panel * value_rows * row
    column, logits = panel * row, tile.logits
    for j in range(0, count, ROWS):
        keys, into = tile.keys + j * head_dim * 4, logits + j * row
        _product(keys, head_dim * 4, 4, queries, row, into, row, head_dim, 0, keys, 0)
    if this.soft_cap > ZERO:
        cap(floats_at(logits), count * COLUMNS, this.soft_cap)
    if this.slopes != 0:
        _add_bias(logits, row, logits, row, start, count, (tile.slopes + column, tile.position + column))
    if start < words_at(tile.all_first)[panel] or start + count > words_at(tile.all_end)[panel]:
        _mask(logits, row, logits, row, start, count, (tile.first + column, tile.end + column))
        if start + count > tile.new_start:
            _mask_tree(this, tile, panel, start, count)
    _soften(tile, panel, count)
    for d in range(0, value_rows, ROWS):
        values, into = tile.values + d * 4, outputs + d * row
        _product(values, 4, value_rows * 4, logits, row, into, row, count, 1, values, 0)


@compiled
def _write(this, tile, kv_head, lanes):  # type: ignore[no-untyped-def]
    """The outputs, divided by the sums of their weights, and log-sum-exps of all queries."""
    group, head_dim, row = this.group, this.head_dim, COLUMNS * 4
    for vector in range(lanes * group):
        begin, head = vector // group * WIDTH, kv_head * group + vector % group
        count = min(WIDTH, tile.rows - begin)
        place = tile.row + begin
        sums, maxima = floats_at(tile.sums + vector * WIDTH * 4), floats_at(tile.maxima + vector * WIDTH * 4)
        for i in range(count):
            total = sums[i]
            if this.lse != 0:
                lse = maxima[i] + np.float32(math.log(total)) if total != ZERO else np.float32(-np.inf)
                floats_at(this.lse)[head * this.tokens + place + i] = lse
            sums[i] = ONE / total if total != ZERO else ONE
        source = tile.outputs + vector // VECTORS * tile.value_rows * row + vector % VECTORS * WIDTH * 4
        target = this.out + (head * head_dim * this.tokens + place) * 4
        if count == WIDTH:
            shares = tile.sums + vector * WIDTH * 4
            _scale_vectors(source, row, target, this.tokens * 4, 0, head_dim, (shares,))
            continue
        for d in range(head_dim):
            outputs, written = floats_at(source + d * row), floats_at(target + d * this.tokens * 4)
            for i in range(count):
                written[i] = outputs[i] * sums[i]


@compiled
def attend_tile(this, scratch, sequence, kv_head, row, rows):  # type: ignore[no-untyped-def]
    """Queries [row, row + rows) of a sequence, for the heads of one key-value head."""
    tile = tile_at(scratch)
    tile.row, tile.rows = row, rows
    lanes = (rows + WIDTH - 1) // WIDTH
    panels = (lanes * this.group + VECTORS - 1) // VECTORS
    _pack(this, tile, kv_head, lanes)
    _describe(this, tile, sequence, kv_head, lanes, panels)
    outputs = floats_at(tile.outputs)
    for i in range(panels * tile.value_rows * COLUMNS):
        outputs[i] = ZERO
    some_first, some_end = words_at(tile.some_first), words_at(tile.some_end)
    first, end = _NEVER, np.int64(0)
    for panel in range(panels):
        first, end = min(first, some_first[panel]), max(end, some_end[panel])
    for start in range(first // BLOCK * BLOCK, end, BLOCK):
        count = min(BLOCK, end - start)
        _gather(this, tile, sequence, kv_head, start, first, count)
        for panel in range(panels):
            seen = min(count, some_end[panel] - start)
            if seen > 0 and start + seen > some_first[panel]:
                _attend_block(this, tile, panel, start, seen)
    _write(this, tile, kv_head, lanes)

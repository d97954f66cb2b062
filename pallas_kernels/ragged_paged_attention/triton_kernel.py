"""The attention of `gpu_tiles.py` as a kernel in Triton, for GPUs that have no wgmma and no TMA.

Computes softmax(q k^T) v for tiles of query rows (`gpu_schedule.py`) in one pass over their keys, with a
running maximum and sum (Milakov & Gimelshein 2018; Dao 2023, section 3.1), float32.

Grid: one program for each (item, key-value head), those of long context first. A program walks the blocks
of B keys of its item; blocks that all rows see whole are computed without a mask.

    HBM        q, pages, results; the page table and the items, read as scalars and, a block of keys at a
               time, as vectors of pages.
    SMEM       Triton's pipeline keeps `num_stages` blocks of keys and of values [B, D] on their way
               (cp.async). At D = 128 and 16 bits, B 64 and 2 stages: 64 KiB, of the 99 KiB that every
               GPU from Ampere on has at least.
    registers  the tile's queries [R, D], logits [R, B], the weighted sum of values [R, D] in float32, and
               the maximum and sum of each row.

Why it cannot race: a program writes results that no other one writes; what it reads, nobody writes.

Pages of 8 bits are read as bytes and widened here, exactly: an Ampere GPU has no float8.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Stands for minus infinity, whose difference with itself would be NaN.
MASKED = tl.constexpr(-2.0e38)


@triton.jit
def _widened(x, FORMAT: tl.constexpr):
    """What the bytes of a page say; x itself where FORMAT is none of those of 8 bits."""
    if FORMAT == "int8":
        x = x.to(tl.float32)
    elif FORMAT == "float8_e5m2":  # the upper half of a float16
        x = (x.to(tl.int16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == "float8_e4m3fn":  # a float16 with an exponent that is 8 too large, but for NaN
        bits = x.to(tl.int16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        x = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
        x = tl.where((bits & 0x7F) == 0x7F, float("nan"), x)
    return x


@triton.jit
def _attend_blocks(
    total, most, mass, first, last,
    q, pages_ptr, table_ptr, first_row, start, stop, product_scale, unit,
    row_begin, row_end, row_position, row_slope, row_tree, tree_bits_ptr, rows, dims,
    soft_cap: tl.constexpr, FORMAT: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_TREE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PAGE_SIZE: tl.constexpr, PAGE_ROW: tl.constexpr,
    HEAD_DIM: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Takes the blocks [first, last) of an item into (total, most, mass), the state of the softmax."""
    for i in range(first, last):
        key = start + i * KEYS + tl.arange(0, KEYS)
        # Past the last page the table may say anything, and so may the rows of a page past the last key.
        is_key = key < stop
        page = tl.load(table_ptr + key // PAGE_SIZE, mask=is_key, other=0)
        place = (first_row + page * PAGE_SIZE + key % PAGE_SIZE) * PAGE_ROW
        is_some = is_key[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(pages_ptr + place[:, None] + dims[None, :], mask=is_some, other=0)
        v = tl.load(pages_ptr + place[:, None] + (dims + HEAD_DIM)[None, :], mask=is_some, other=0)
        k, v = _widened(k, FORMAT).to(q.dtype), _widened(v, FORMAT).to(q.dtype)
        logits = tl.dot(q, tl.trans(k), input_precision="ieee")
        if soft_cap is not None:
            # tanh through exp2: the hardware's own tanh is good to 11 bits.
            squared = tl.exp2(logits * (product_scale * (2 * LOG2E / soft_cap)))
            logits = soft_cap * (1 - 2 / (1 + squared))
        if HAS_SLOPES:
            distance = key[None, :] - row_position[:, None]
            logits += row_slope[:, None] * distance.to(tl.float32)
        if IS_MASKED:
            seen = (key[None, :] >= row_begin[:, None]) & (key[None, :] < row_end[:, None])
            if HAS_TREE:
                column = key[None, :] - row_tree[:, None]
                in_tree = seen & (column >= 0)
                word = tl.load(tree_bits_ptr + (column >> 5) * ROWS + rows[:, None], mask=in_tree, other=-1)
                seen &= ((word >> (column & 31)) & 1) == 1
            logits = tl.where(seen, logits, MASKED)
        new_most = tl.maximum(most, tl.max(logits, axis=1))
        fade = tl.exp2((most - new_most) * (unit * LOG2E))
        weights = tl.exp2((logits - new_most[:, None]) * (unit * LOG2E))
        mass = mass * fade + tl.sum(weights, axis=1)
        total = tl.dot(weights.to(q.dtype), v, total * fade[:, None], input_precision="ieee")
        most = new_most
    return total, most, mass


@triton.jit
def paged_attention(
    q_ptr, pages_ptr, layer_ptr, table_ptr, items_ptr, begin_ptr, end_ptr,
    tree_ptr, tree_bits_ptr, position_ptr, slopes_ptr, sinks_ptr, factors_ptr,
    out_ptr, lse_ptr,
    scale: tl.constexpr, soft_cap: tl.constexpr, FORMAT: tl.constexpr,
    HAS_TREE: tl.constexpr, HAS_SLOPES: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_FACTORS: tl.constexpr,
    ITEMS: tl.constexpr, TILES: tl.constexpr, KV_HEADS: tl.constexpr, PAGES: tl.constexpr,
    PAGES_PER_SEQ: tl.constexpr, PAGE_SIZE: tl.constexpr, TREE_WORDS: tl.constexpr,
    ROWS: tl.constexpr, GIVEN: tl.constexpr, KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """One item of one key-value head; see `gpu_tiles.TileKernel` for the operands.

    Those of options that were not asked for (HAS_...) point anywhere. FORMAT is of pages of 8 bits, which
    are given as bytes. DIMS is HEAD_DIM rounded up to a power of two.
    """
    unit_of_work = tl.program_id(0)
    item = ITEMS - 1 - unit_of_work // KV_HEADS
    head = unit_of_work % KV_HEADS
    columns = items_ptr + item * 7
    tile, sequence = tl.load(columns), tl.load(columns + 1)
    start, stop = tl.load(columns + 2), tl.load(columns + 3)
    full_start, full_stop, piece = tl.load(columns + 4), tl.load(columns + 5), tl.load(columns + 6)
    if stop <= start:
        return
    blocks = (stop - start + KEYS - 1) // KEYS

    rows, dims = tl.arange(0, ROWS), tl.arange(0, DIMS)
    is_given = (rows < GIVEN)[:, None] & (dims < HEAD_DIM)[None, :]
    own = rows[:, None] * HEAD_DIM + dims[None, :]
    q_tile = (tile * KV_HEADS + head).to(tl.int64) * (GIVEN * HEAD_DIM)
    q = tl.load(q_ptr + q_tile + own, mask=is_given, other=0)
    row_begin = tl.load(begin_ptr + tile * ROWS + rows)
    row_end = tl.load(end_ptr + tile * ROWS + rows)
    of_head = (head * TILES + tile) * ROWS + rows

    # Logits are kept in units of `unit`. Scaling them before the maximum is taken would let the compiler
    # round the difference from it otherwise than the maximum, by more than 1 where they are huge.
    product_scale = scale
    value_scale = 1.0
    if HAS_FACTORS:
        product_scale = scale * tl.load(factors_ptr)
        value_scale = tl.load(factors_ptr + 1)
    unit = product_scale
    if soft_cap is not None:
        unit = 1.0
    most = tl.full((ROWS,), MASKED, tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    if HAS_SINKS:
        # A sink is a key with no value, that the first piece of a tile begins with.
        sink = tl.maximum(tl.load(sinks_ptr + of_head) / unit, MASKED)
        most = tl.where(piece == 0, sink, most)
        mass = tl.where(piece == 0, 1.0, mass)
    row_position = row_begin
    row_slope = mass
    if HAS_SLOPES:
        row_position = tl.load(position_ptr + tile * ROWS + rows)
        row_slope = tl.load(slopes_ptr + of_head) / unit
    row_tree = row_begin
    if HAS_TREE:
        row_tree = tl.load(tree_ptr + tile * ROWS + rows)
    total = tl.zeros((ROWS, DIMS), tl.float32)

    first_row = tl.load(layer_ptr).to(tl.int64) * (PAGES * PAGE_SIZE)
    head_pages = pages_ptr + 2 * head * HEAD_DIM
    table = table_ptr + sequence * PAGES_PER_SEQ
    tree_bits = tree_bits_ptr + tile * (TREE_WORDS * ROWS)
    for phase in tl.static_range(3):
        first = 0 if phase == 0 else (full_start if phase == 1 else full_stop)
        last = full_start if phase == 0 else (full_stop if phase == 1 else blocks)
        total, most, mass = _attend_blocks(
            total, most, mass, first, last,
            q, head_pages, table, first_row, start, stop, product_scale, unit,
            row_begin, row_end, row_position, row_slope, row_tree, tree_bits, rows, dims,
            soft_cap, FORMAT, HAS_SLOPES, HAS_TREE,
            ROWS, KEYS, PAGE_SIZE, 2 * KV_HEADS * HEAD_DIM, HEAD_DIM, phase != 1,
        )  # fmt: skip

    # A row whose tree is empty may have seen nothing.
    is_some = most > MASKED / 2
    results = (item * KV_HEADS + head).to(tl.int64)
    lse = tl.where(is_some, most * unit + tl.log(mass), float("-inf"))
    tl.store(lse_ptr + results * ROWS + rows, lse)
    share = tl.where(is_some, value_scale / mass, 0.0)
    out = total * share[:, None]
    tl.store(out_ptr + results * (GIVEN * HEAD_DIM) + own, out.to(out_ptr.dtype.element_ty), mask=is_given)

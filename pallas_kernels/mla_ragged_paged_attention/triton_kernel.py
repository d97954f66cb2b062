"""Latent attention of the tiles of `gpu_tiles.py` as a kernel in Triton.

Computes softmax(q k^T) v for tiles of query rows (`gpu_schedule.py`) in one pass over their keys, with a
running maximum and sum (Milakov & Gimelshein 2018; Dao 2023, section 3.1), float32. A row is one head of
one token; all of them read the same keys: a key is a token's latent and its rotated key, its value the
latent, which is fetched once for both products.

Grid: one program for each item, those of long context first. A program walks the blocks of B keys of its
item; blocks that all rows see whole are computed without a mask.

    HBM        q, pages, results; the page table and the items, read as scalars and, a block of keys at a
               time, as vectors of pages.
    SMEM       Triton's pipeline keeps `num_stages` blocks of latents [B, rank] and of rotated keys on their
               way (cp.async). At rank 512, rope 64, 16 bits and B 32: 36 KiB a stage, of the 99 KiB that
               every GPU from Ampere on has at least; beside them the queries, where they are not in
               registers.
    registers  the weighted sum of latents [R, rank] in float32, logits [R, B], and the maximum and sum of
               each row.

Why it cannot race: a program writes results that no other one writes; what it reads, nobody writes.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
# Stands for minus infinity, whose difference with itself would be NaN.
MASKED = tl.constexpr(-2.0e38)


@triton.jit
def _attend_blocks(
    total, most, mass, first, last,
    q_latent, q_rope, pages_ptr, table_ptr, first_row, start, stop, unit, row_end, dims, rope_dims,
    scale: tl.constexpr, soft_cap: tl.constexpr, KEYS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    WIDTH: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr, IS_MASKED: tl.constexpr,
):  # fmt: skip
    """Takes the blocks [first, last) of an item into (total, most, mass), the state of the softmax."""
    for i in range(first, last):
        key = start + i * KEYS + tl.arange(0, KEYS)
        # Past the last page the table may say anything, and so may the rows of a page past the last key.
        is_key = key < stop
        page = tl.load(table_ptr + key // PAGE_SIZE, mask=is_key, other=0)
        row = pages_ptr + (first_row + page * PAGE_SIZE + key % PAGE_SIZE)[:, None] * WIDTH
        latent = tl.load(row + dims[None, :], mask=is_key[:, None] & (dims < RANK)[None, :], other=0)
        is_rope = is_key[:, None] & (rope_dims < ROPE)[None, :]
        rope = tl.load(row + RANK + rope_dims[None, :], mask=is_rope, other=0)
        latent, rope = latent.to(q_latent.dtype), rope.to(q_rope.dtype)
        logits = tl.dot(q_rope, tl.trans(rope), input_precision="ieee")
        logits = tl.dot(q_latent, tl.trans(latent), logits, input_precision="ieee")
        if soft_cap is not None:
            # tanh through exp2: the hardware's own tanh is good to 11 bits.
            squared = tl.exp2(logits * (scale * (2 * LOG2E / soft_cap)))
            logits = soft_cap * (1 - 2 / (1 + squared))
        if IS_MASKED:
            logits = tl.where(key[None, :] < row_end[:, None], logits, MASKED)
        new_most = tl.maximum(most, tl.max(logits, axis=1))
        fade = tl.exp2((most - new_most) * (unit * LOG2E))
        weights = tl.exp2((logits - new_most[:, None]) * (unit * LOG2E))
        mass = mass * fade + tl.sum(weights, axis=1)
        total = tl.dot(weights.to(q_latent.dtype), latent, total * fade[:, None], input_precision="ieee")
        most = new_most
    return total, most, mass


@triton.jit
def latent_attention(
    q_ptr, pages_ptr, layer_ptr, table_ptr, items_ptr, end_ptr,
    out_ptr, lse_ptr,
    scale: tl.constexpr, soft_cap: tl.constexpr,
    ITEMS: tl.constexpr, PAGES: tl.constexpr, PAGES_PER_SEQ: tl.constexpr, PAGE_SIZE: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, GIVEN: tl.constexpr, KEYS: tl.constexpr,
    RANK: tl.constexpr, RANK_DIMS: tl.constexpr, ROPE: tl.constexpr, ROPE_DIMS: tl.constexpr,
):  # fmt: skip
    """One item; see `gpu_tiles.TileKernel` for the operands, of one key-value head.

    q is [tiles, 1, GIVEN, RANK + ROPE], out [items, 1, GIVEN, RANK]. A row of the pages has WIDTH numbers.
    RANK_DIMS and ROPE_DIMS are RANK and ROPE rounded up to powers of two.
    """
    item = ITEMS - 1 - tl.program_id(0)
    columns = items_ptr + item * 7
    tile, sequence = tl.load(columns), tl.load(columns + 1)
    start, stop = tl.load(columns + 2), tl.load(columns + 3)
    full_start, full_stop = tl.load(columns + 4), tl.load(columns + 5)
    if stop <= start:
        return
    blocks = (stop - start + KEYS - 1) // KEYS

    rows, dims, rope_dims = tl.arange(0, ROWS), tl.arange(0, RANK_DIMS), tl.arange(0, ROPE_DIMS)
    is_given, is_latent = (rows < GIVEN)[:, None], (dims < RANK)[None, :]
    q_rows = q_ptr + tile.to(tl.int64) * (GIVEN * (RANK + ROPE)) + rows[:, None] * (RANK + ROPE)
    q_latent = tl.load(q_rows + dims[None, :], mask=is_given & is_latent, other=0)
    q_rope = tl.load(q_rows + RANK + rope_dims[None, :], mask=is_given & (rope_dims < ROPE)[None, :], other=0)
    row_end = tl.load(end_ptr + tile * ROWS + rows)

    # Logits are kept in units of `unit`. Scaling them before the maximum is taken would let the compiler
    # round the difference from it otherwise than the maximum, by more than 1 where they are huge.
    unit = scale
    if soft_cap is not None:
        unit = 1.0
    most = tl.full((ROWS,), MASKED, tl.float32)
    mass = tl.zeros((ROWS,), tl.float32)
    total = tl.zeros((ROWS, RANK_DIMS), tl.float32)
    first_row = tl.load(layer_ptr).to(tl.int64) * (PAGES * PAGE_SIZE)
    table = table_ptr + sequence * PAGES_PER_SEQ
    for phase in tl.static_range(3):
        first = 0 if phase == 0 else (full_start if phase == 1 else full_stop)
        last = full_start if phase == 0 else (full_stop if phase == 1 else blocks)
        total, most, mass = _attend_blocks(
            total, most, mass, first, last,
            q_latent, q_rope, pages_ptr, table, first_row, start, stop, unit, row_end, dims, rope_dims,
            scale, soft_cap, KEYS, PAGE_SIZE, WIDTH, RANK, ROPE, phase != 1,
        )  # fmt: skip

    item_rows = item.to(tl.int64) * ROWS
    tl.store(lse_ptr + item_rows + rows, most * unit + tl.log(mass))
    out = total / mass[:, None]
    own = item.to(tl.int64) * (GIVEN * RANK) + rows[:, None] * RANK + dims[None, :]
    tl.store(out_ptr + own, out.to(out_ptr.dtype.element_ty), mask=is_given & is_latent)

"""A weight times tokens on a CPU, in float32, compiled by numba; see `cpu_handler`.

The result is cut into blocks of rows, and these into groups of columns, which are tokens. Within a group of a
block, strips of a few rows of the weight stream by while the group's tokens stay in the second cache (Goto
and van de Geijn 2008). The weight is read where it lies; the strip after the one that is multiplied is
fetched meanwhile.

- Few tokens: a task is a block, and its weights are read from memory once. Tokens are read where they lie,
  and take vectors no wider than they need: up to 16 of them cost the time of reading the weight.
- Many tokens: a task is a group of a block. Its tokens are packed first, since a row of all tokens would be
  too long a step.

A task alone writes what it computes. Every number is summed in the order of the depth, so that a token's
result is the same whatever the others are, bit for bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from pallas_kernels.native.pointers import floats_at, record_at
from pallas_kernels.native.tasks import COUNTERS, claim, enter, finish, inlined, leave
from pallas_kernels.native.tiles import REGISTERS, WIDTH, tile_product

_compiled = njit(error_model="numpy", no_cpython_wrapper=True)
# As tiles do it, multiplies and adds in one operation.
_rounded_once = njit(error_model="numpy", fastmath={"contract"}, no_cpython_wrapper=True)

COLUMNS = 2 * WIDTH  # of a group
STRIP = 16  # a multiple of the rows of any tile, as those of a block are
FEW_TOKENS = 64
PANEL_DEPTH = 4096  # of packed tokens: at most 512 KiB for a group, half of a usual second cache

_PANEL_BYTES = PANEL_DEPTH * COLUMNS * 4
_ZERO = np.float32(0)

# What is asked for. Addresses are of what XLA holds.
CALL = np.dtype(
    [
        ("counters", COUNTERS),
        *((name, "i8") for name in ("weight", "x", "y", "rows", "depth", "tokens", "tokens_first")),
        *((name, "i8") for name in ("block", "groups", "scratch")),
    ],
    align=True,
)
call_at = record_at(CALL)


@_rounded_once
def _multiply_rest(a, a_row, rows, b, b_depth, c, c_row, columns, depth, add):  # type: ignore[no-untyped-def]
    """Rows that fill no tile, one by one."""
    for m in range(rows):
        numbers, sums = floats_at(a + m * a_row), floats_at(c + m * c_row)
        if add == 0:
            for j in range(columns):
                sums[j] = _ZERO
        for d in range(depth):
            number, tokens = numbers[d], floats_at(b + d * b_depth)
            for j in range(columns):
                sums[j] += number * tokens[j]


def _multiplier(most: int) -> Any:
    """Strip by strip: c[count, columns] (+)= a[count, depth] b[depth, columns].

    Args:
        most: columns that there may be, a power of two from 4 on; half of them and so on, too.
    """
    vectors = max(most // WIDTH, 1)
    rows = REGISTERS // 2 // vectors  # half of the registers are sums
    tile = tile_product(rows, vectors, most // vectors)

    @inlined
    def multiply(a, a_row, count, b, b_depth, c, c_row, columns, depth, add, after):  # type: ignore[no-untyped-def]
        """`after` is the strip that follows the last one of these."""
        ahead_depth = rows * 4 if a_row == depth * 4 else 0  # else it is not in one piece
        for m in range(0, count, rows):
            strip, target = a + m * a_row, c + m * c_row
            ahead = strip + rows * a_row if m + rows < count else after
            tile(strip, a_row, 4, b, b_depth, target, c_row, depth, add, ahead, ahead_depth)

    if most == 4:
        return multiply
    narrower = _multiplier(most // 2)

    @inlined
    def multiply_some(a, a_row, count, b, b_depth, c, c_row, columns, depth, add, after):  # type: ignore[no-untyped-def]
        if columns == most:
            multiply(a, a_row, count, b, b_depth, c, c_row, columns, depth, add, after)
        else:
            narrower(a, a_row, count, b, b_depth, c, c_row, columns, depth, add, after)

    return multiply_some


_multiply_strips = _multiplier(COLUMNS)


@inlined
def _pack(x, tokens, depth, count, columns, panel):  # type: ignore[no-untyped-def]
    """`count` columns of x[depth, tokens] to panel[depth, columns], filled up with zeros."""
    source, target = floats_at(x), floats_at(panel)
    for d in range(depth):
        for j in range(count):
            target[d * columns + j] = source[d * tokens + j]
        for j in range(count, columns):
            target[d * columns + j] = _ZERO


@inlined
def _store(this, tile, columns, first_row, rows, first_token, count):  # type: ignore[no-untyped-def]
    """A block's group to where it belongs in the result."""
    source = floats_at(tile)
    if this.tokens_first:
        for j in range(count):
            target = floats_at(this.y + ((first_token + j) * this.rows + first_row) * 4)
            for m in range(rows):
                target[m] = source[m * columns + j]
    else:
        for m in range(rows):
            target = floats_at(this.y + ((first_row + m) * this.tokens + first_token) * 4)
            for j in range(count):
                target[j] = source[m * columns + j]


@inlined
def _multiply_group(this, first_row, rows, group, panel, packed, tile, after):  # type: ignore[no-untyped-def]
    """A group of a block of rows; gives the group that `panel` holds then, or -1."""
    first_token = group * COLUMNS
    count = min(COLUMNS, this.tokens - first_token)
    columns = 4
    while columns < count:
        columns *= 2
    is_direct = count == columns and this.tokens <= FEW_TOKENS
    is_whole = count == columns and not this.tokens_first
    c = this.y + (first_row * this.tokens + first_token) * 4 if is_whole else tile
    c_row = this.tokens * 4 if is_whole else columns * 4
    a_row = this.depth * 4
    for start in range(0, this.depth, PANEL_DEPTH):
        depth = min(PANEL_DEPTH, this.depth - start)
        a, add = this.weight + first_row * a_row + start * 4, 1 if start > 0 else 0
        b, b_depth = this.x + (start * this.tokens + first_token) * 4, this.tokens * 4
        if not is_direct:
            if packed != group:
                _pack(b, this.tokens, depth, count, columns, panel)
                packed = group if depth == this.depth else -1
            b, b_depth = panel, columns * 4
        strips = rows // STRIP * STRIP
        _multiply_strips(a, a_row, strips, b, b_depth, c, c_row, columns, depth, add, after)
        if strips < rows:
            a, rest = a + strips * a_row, c + strips * c_row
            _multiply_rest(a, a_row, rows - strips, b, b_depth, rest, c_row, columns, depth, add)
    if not is_whole:
        _store(this, tile, columns, first_row, rows, first_token, count)
    return packed


@_compiled
def work(address):  # type: ignore[no-untyped-def]
    """Claims tasks until there are no more: what every thread of a call does."""
    this = call_at(address)
    panel = this.scratch + enter(address) * scratch_bytes(this.block)
    groups_of_task = this.groups if this.tokens <= FEW_TOKENS else 1
    tasks_of_block = this.groups // groups_of_task
    packed, task = -1, claim(address)
    while task < this.counters.tasks:
        # Short tasks are claimed one ahead, so that the next one's first strip is fetched in time.
        following = claim(address) if tasks_of_block == 1 else task
        first_row, first_group = task // tasks_of_block * this.block, task % tasks_of_block * groups_of_task
        rows = min(this.block, this.rows - first_row)
        own = this.weight + first_row * this.depth * 4
        after = this.weight + following // tasks_of_block * this.block * this.depth * 4
        for group in range(first_group, first_group + groups_of_task):
            is_last = group == first_group + groups_of_task - 1
            packed = _multiply_group(
                this, first_row, rows, group, panel, packed, panel + _PANEL_BYTES, after if is_last else own
            )
        finish(address)
        task = following if tasks_of_block == 1 else claim(address)
    leave(address)


@inlined
def scratch_bytes(block):  # type: ignore[no-untyped-def]
    """Of a thread: packed tokens, and a block's group of the result."""
    return _PANEL_BYTES + block * COLUMNS * 4

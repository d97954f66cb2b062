"""A weight times tokens on a CPU, in float32, compiled by numba; see `cpu_handler`.

The result is cut into blocks of rows, and these into groups of columns, which are tokens: a task is a group
of a block, and writes it alone. Within it, strips of a few rows of the weight stream by, each once, while the
group's tokens stay in the second cache: beside each other where there are few, so that they are read where
they lie, and packed where a row of them would be too long a step (Goto and van de Geijn 2008). The weight is
never packed: fetching the strip after next while one is multiplied hides where it comes from.

Few tokens take narrower vectors: with up to 16 of them the time is that of reading the weight. Every number
is summed in the order of the depth, so that a token's result is the same whatever the others are, bit for
bit.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from pallas_kernels.native.pointers import floats_at, record_at
from pallas_kernels.native.tasks import COUNTERS, claim, enter, finish, leave
from pallas_kernels.native.tiles import tile_product

_compiled = njit(error_model="numpy", no_cpython_wrapper=True)
_part = njit(error_model="numpy", inline="always")

COLUMNS = 32  # of a group
STRIP = 16  # the rows of blocks are a multiple of the rows of any tile
DIRECT = 64  # from more tokens than that on, they are packed
PANEL_DEPTH = 4096  # of packed tokens: 512 KiB for a group, half of the second cache that is usual

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

# Tiles by the tokens of a group, and a row at a time for what is left of a block.
_eight_by_32, _one_by_32 = tile_product(8, 2, 16), tile_product(1, 2, 16)
_sixteen_by_16, _one_by_16 = tile_product(16, 1, 16), tile_product(1, 1, 16)
_sixteen_by_8, _one_by_8 = tile_product(16, 1, 8), tile_product(1, 1, 8)
_sixteen_by_4, _one_by_4 = tile_product(16, 1, 4), tile_product(1, 1, 4)


def _multiplier(tile, one_row, rows, columns):  # type: ignore[no-untyped-def]
    """Strip by strip: c[block rows, columns] (+)= a[block rows, depth] b[depth, columns]."""

    @_part
    def multiply(a, a_row, count, b, b_depth, c, c_row, depth, add):  # type: ignore[no-untyped-def]
        full = count // rows * rows
        # Whole rows lie one after the other: the next strip is where this one ends.
        ahead_depth = rows * 4 if a_row == depth * 4 else 0
        for m in range(0, full, rows):
            strip = a + m * a_row
            tile(
                strip,
                a_row,
                4,
                b,
                b_depth,
                c + m * c_row,
                c_row,
                depth,
                add,
                strip + rows * a_row,
                ahead_depth,
            )
        for m in range(full, count):
            strip = a + m * a_row
            one_row(strip, a_row, 4, b, b_depth, c + m * c_row, c_row, depth, add, strip, 0)

    return multiply


_by_32 = _multiplier(_eight_by_32, _one_by_32, 8, 32)
_by_16 = _multiplier(_sixteen_by_16, _one_by_16, 16, 16)
_by_8 = _multiplier(_sixteen_by_8, _one_by_8, 16, 8)
_by_4 = _multiplier(_sixteen_by_4, _one_by_4, 16, 4)


@_part
def _pack(x, tokens, depth, count, columns, panel):  # type: ignore[no-untyped-def]
    """`count` columns of x[depth, tokens] to panel[depth, columns], filled up with zeros."""
    source, target = floats_at(x), floats_at(panel)
    for d in range(depth):
        for j in range(count):
            target[d * columns + j] = source[d * tokens + j]
        for j in range(count, columns):
            target[d * columns + j] = _ZERO


@_part
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


@_part
def _multiply_group(this, block, group, panel, packed, tile):  # type: ignore[no-untyped-def]
    """One task; gives the group that `panel` holds then, or -1."""
    first_row = block * this.block
    rows = min(this.block, this.rows - first_row)
    first_token = group * COLUMNS
    count = min(COLUMNS, this.tokens - first_token)
    columns = 32 if count > 16 else 16 if count > 8 else 8 if count > 4 else 4
    is_direct = count == columns and this.tokens <= DIRECT
    is_whole = count == columns and not this.tokens_first
    c = this.y + (first_row * this.tokens + first_token) * 4 if is_whole else tile
    c_row = this.tokens * 4 if is_whole else columns * 4
    for start in range(0, this.depth, PANEL_DEPTH):
        depth = min(PANEL_DEPTH, this.depth - start)
        b, b_depth = this.x + (start * this.tokens + first_token) * 4, this.tokens * 4
        if not is_direct:
            if packed != group:
                _pack(b, this.tokens, depth, count, columns, panel)
                packed = group if depth == this.depth else -1
            b, b_depth = panel, columns * 4
        a, a_row = this.weight + (first_row * this.depth + start) * 4, this.depth * 4
        add = 1 if start > 0 else 0
        if columns == 32:
            _by_32(a, a_row, rows, b, b_depth, c, c_row, depth, add)
        elif columns == 16:
            _by_16(a, a_row, rows, b, b_depth, c, c_row, depth, add)
        elif columns == 8:
            _by_8(a, a_row, rows, b, b_depth, c, c_row, depth, add)
        else:
            _by_4(a, a_row, rows, b, b_depth, c, c_row, depth, add)
    if not is_whole:
        _store(this, tile, columns, first_row, rows, first_token, count)
    return packed


@_compiled
def work(address):  # type: ignore[no-untyped-def]
    """Claims tasks until there are no more: what every thread of a call does."""
    this = call_at(address)
    panel = this.scratch + enter(address) * scratch_bytes(this.block)
    packed = -1
    while True:
        task = claim(address)
        if task >= this.counters.tasks:
            break
        block, group = task // this.groups, task % this.groups
        packed = _multiply_group(this, block, group, panel, packed, panel + _PANEL_BYTES)
        finish(address)
    leave(address)


@_part
def scratch_bytes(block):  # type: ignore[no-untyped-def]
    """Of a thread: packed tokens, and a block's group of the result."""
    return _PANEL_BYTES + block * COLUMNS * 4

"""Decode attention on a CPU: one query per sequence over float32 pages, compiled by numba; see `cpu_handler`.

Split over keys as Flash-Decoding does (Dao et al. 2023), with the online softmax of FlashAttention-2: each
sequence is cut into chunks of keys, of a length that depends on the layer's shape alone, so that a result
never depends on the other sequences nor on how many threads there are. Threads claim chunks (`native.tasks`),
each chunk has partial results of its own, and whoever ends the last chunk of a sequence merges them in their
order. Two threads never write the same number: only counters are shared, and those are atomic.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from pallas_kernels.native.pointers import (
    fetch_add,
    float_of_bits,
    floats_at,
    ints_at,
    record_at,
    words_at,
)
from pallas_kernels.native.tasks import COUNTERS, claim, finish, leave

# Sums may be reordered and multiplications fused with them. What is NaN stays NaN.
_FAST = {"reassoc", "contract", "nsz", "arcp"}
_compiled = njit(fastmath=_FAST, error_model="numpy", no_cpython_wrapper=True)

BLOCK = 32  # keys whose softmax is computed together: their rows and logits stay in the nearest cache
CHUNK_BYTES = 1 << 18  # of keys and values that a thread claims at a time
SCRATCH_BYTES = BLOCK * (8 + 4)  # of a chunk: where a block's rows are, and its logits

_MASKED = np.float32(-1e30)
_LOG2_E = np.float32(math.log2(math.e))
_HALF, _ZERO, _ONE, _TWO = (np.float32(x) for x in (0.5, 0, 1, 2))
# Of 2^f for |f| <= 1/2: the Taylor series, whose first missing term is 5e-9.
_E7, _E6, _E5, _E4, _E3, _E2, _E1 = (
    np.float32(math.log(2) ** n / math.factorial(n)) for n in range(7, 0, -1)
)

# One call: what is asked for, and how far it is. Addresses point to what XLA holds, or follow in the same
# allocation.
CALL = np.dtype(
    [
        ("counters", COUNTERS),
        *((name, "i8") for name in ("q", "pages", "table", "first", "end", "lens", "sinks", "slopes")),
        *((name, "i8") for name in ("out", "lse", "chunk_ends", "unmerged", "scratch", "partials")),
        *((name, "i8") for name in ("sequences", "columns", "first_page", "page_size")),
        *((name, "i8") for name in ("kv_heads", "group", "head_dim", "chunk")),
        ("soft_cap", "f4"),
    ],
    align=True,
)
call_at = record_at(CALL)


@_compiled
def _exp(x):  # type: ignore[no-untyped-def]
    """e^x of a float32 that is at most 0, within 2e-7 of it; at least 2^-126."""
    y = x * _LOG2_E
    y = y if not y < np.float32(-126) else np.float32(-126)
    whole = np.int32(y - _HALF)  # rounds to nearest, since y is not positive
    f = y - np.float32(whole)
    power = ((((((_E7 * f + _E6) * f + _E5) * f + _E4) * f + _E3) * f + _E2) * f + _E1) * f + _ONE
    return power * float_of_bits(np.int32((whole + np.int32(127)) << np.int32(23)))


@_compiled
def _score(q, pages, rows, count, logits, head_dim):  # type: ignore[no-untyped-def]
    """Products of one query with the keys at `rows`, four at a time."""
    fours = count // 4 * 4
    for j in range(0, fours, 4):
        a, b, c, d = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
        sum_a = sum_b = sum_c = sum_d = _ZERO
        for i in range(head_dim):
            x = q[i]
            sum_a += x * pages[a + i]
            sum_b += x * pages[b + i]
            sum_c += x * pages[c + i]
            sum_d += x * pages[d + i]
        logits[j], logits[j + 1], logits[j + 2], logits[j + 3] = sum_a, sum_b, sum_c, sum_d
    for j in range(fours, count):
        row, total = rows[j], _ZERO
        for i in range(head_dim):
            total += q[i] * pages[row + i]
        logits[j] = total


@_compiled
def _cap(logits, count, soft_cap):  # type: ignore[no-untyped-def]
    """soft_cap * tanh(logits / soft_cap), by e^(-2|x|)."""
    for j in range(count):
        x = logits[j] / soft_cap
        small = _exp(-_TWO * abs(x))
        size = soft_cap * (_ONE - small) / (_ONE + small)
        logits[j] = size if x > _ZERO else -size


@_compiled
def _weigh(logits, count, maximum):  # type: ignore[no-untyped-def]
    """Logits become e^(logit - maximum); gives their sum."""
    total = _ZERO
    for j in range(count):
        weight = _exp(logits[j] - maximum)
        logits[j] = weight
        total += weight
    return total


@_compiled
def _add_values(weights, pages, rows, count, out, head_dim):  # type: ignore[no-untyped-def]
    """Adds the values at `rows`, weighted, to the output, four at a time."""
    fours = count // 4 * 4
    for j in range(0, fours, 4):
        a, b, c, d = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
        of_a, of_b, of_c, of_d = weights[j], weights[j + 1], weights[j + 2], weights[j + 3]
        for i in range(head_dim):
            out[i] += (of_a * pages[a + i] + of_b * pages[b + i]) + (
                of_c * pages[c + i] + of_d * pages[d + i]
            )
    for j in range(fours, count):
        row, weight = rows[j], weights[j]
        for i in range(head_dim):
            out[i] += weight * pages[row + i]


@_compiled
def _attend_chunk(this, sequence, first, end, partial, scratch):  # type: ignore[no-untyped-def]
    """Running output, maximum and sum of the keys [first, end) of a sequence, for each head, to `partial`."""
    kv_heads, group, head_dim = this.kv_heads, this.group, this.head_dim
    heads, width = kv_heads * group, 2 * kv_heads * head_dim
    table = ints_at(this.table + sequence * this.columns * 4)
    position = ints_at(this.lens)[sequence] - 1
    rows, logits = words_at(scratch), floats_at(scratch + BLOCK * 8)
    maxima = floats_at(partial + heads * head_dim * 4)
    sums = floats_at(partial + heads * (head_dim + 1) * 4)
    for head in range(heads):
        maxima[head], sums[head] = _MASKED, _ZERO
    out = floats_at(partial)
    for i in range(heads * head_dim):
        out[i] = _ZERO
    for start in range(first, end, BLOCK):
        count = min(BLOCK, end - start)
        column, slot = start // this.page_size, start % this.page_size
        for j in range(count):
            rows[j] = ((this.first_page + table[column]) * this.page_size + slot) * width
            slot += 1
            if slot == this.page_size:
                column, slot = column + 1, 0
        for kv_head in range(kv_heads):
            keys = floats_at(this.pages + 2 * kv_head * head_dim * 4)
            values = floats_at(this.pages + (2 * kv_head + 1) * head_dim * 4)
            for head in range(kv_head * group, (kv_head + 1) * group):
                _score(
                    floats_at(this.q + (sequence * heads + head) * head_dim * 4),
                    keys,
                    rows,
                    count,
                    logits,
                    head_dim,
                )
                if this.soft_cap > _ZERO:
                    _cap(logits, count, this.soft_cap)
                if this.slopes != 0:
                    slope = floats_at(this.slopes)[head]
                    for j in range(count):
                        logits[j] += slope * np.float32(start + j - position)
                old = maxima[head]
                new = old
                for j in range(count):
                    new = logits[j] if not logits[j] <= new else new
                out = floats_at(partial + head * head_dim * 4)
                if new != old:
                    decay = _exp(old - new)
                    maxima[head] = new
                    sums[head] *= decay
                    for i in range(head_dim):
                        out[i] *= decay
                sums[head] += _weigh(logits, count, new)
                _add_values(logits, values, rows, count, out, head_dim)


@_compiled
def merge(this, sequence, first_chunk, end_chunk):  # type: ignore[no-untyped-def]
    """The output of a sequence from the partial results of its chunks, none of which there may be."""
    heads, head_dim = this.kv_heads * this.group, this.head_dim
    partial_floats = heads * (head_dim + 2)
    for head in range(heads):
        out = floats_at(this.out + (sequence * heads + head) * head_dim * 4)
        maximum, total = _MASKED, _ZERO
        if this.sinks != 0:  # a key without a value; minus infinity is none
            maximum, total = max(floats_at(this.sinks)[head], _MASKED), _ONE
        start = maximum
        for chunk in range(first_chunk, end_chunk):
            partial = floats_at(this.partials + chunk * partial_floats * 4)
            found = partial[heads * head_dim + head]
            maximum = found if not found <= maximum else maximum
        total *= _exp(start - maximum)
        for i in range(head_dim):
            out[i] = _ZERO
        for chunk in range(first_chunk, end_chunk):
            partial = floats_at(this.partials + chunk * partial_floats * 4)
            weight = _exp(partial[heads * head_dim + head] - maximum)
            total += weight * partial[heads * (head_dim + 1) + head]
            values = floats_at(this.partials + (chunk * partial_floats + head * head_dim) * 4)
            for i in range(head_dim):
                out[i] += weight * values[i]
        share = _ONE / total if total != _ZERO else _ONE
        for i in range(head_dim):
            out[i] *= share
        if this.lse != 0:
            lse = maximum + np.float32(math.log(total)) if total != _ZERO else np.float32(-np.inf)
            floats_at(this.lse)[sequence * heads + head] = lse


@_compiled
def work(address):  # type: ignore[no-untyped-def]
    """Claims chunks until there are no more: what every thread of a call does."""
    this = call_at(address)
    chunk_ends, unmerged = words_at(this.chunk_ends), this.unmerged
    first, end = ints_at(this.first), ints_at(this.end)
    partial_bytes = this.kv_heads * this.group * (this.head_dim + 2) * 4
    sequence, first_chunk = 0, 0
    while True:
        chunk = claim(address)
        if chunk >= this.counters.tasks:
            break
        while chunk_ends[sequence] <= chunk:
            first_chunk = chunk_ends[sequence]
            sequence += 1
        start = first[sequence] + (chunk - first_chunk) * this.chunk
        stop = min(start + this.chunk, np.int64(end[sequence]))
        partial, scratch = this.partials + chunk * partial_bytes, this.scratch + chunk * SCRATCH_BYTES
        _attend_chunk(this, sequence, start, stop, partial, scratch)
        if fetch_add(unmerged + sequence * 8, -1) == 1:
            merge(this, sequence, first_chunk, chunk_ends[sequence])
        finish(address)
    leave(address)

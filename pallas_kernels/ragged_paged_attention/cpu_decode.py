"""Decode attention on a CPU: one query per sequence over float32 pages, compiled by numba; see `cpu_handler`.

Split over keys as Flash-Decoding does (Dao et al. 2023), with the online softmax of FlashAttention-2: each
sequence is cut into chunks of keys, of a length that depends on the layer's shape alone, so that a result
never depends on the other sequences nor on how many threads there are. Threads claim chunks (`native.tasks`),
each chunk has partial results of its own, and whoever ends the last chunk of a sequence merges them in their
order. Two threads never write the same number: only counters are shared, and those are atomic.

Memory is the limit, and pages lie anywhere in it: while a block of keys is computed, the next one is fetched,
and at the end of a chunk the first one of the chunk that the thread has next.
"""

from __future__ import annotations

import math

import numpy as np

from pallas_kernels.native.pointers import bytes_at, floats_at, ints_at, prefetch, words_at
from pallas_kernels.ragged_paged_attention.cpu_call import MASKED, ONE, ZERO, cap, compiled, exp

BLOCK = 32  # keys whose softmax is computed together: their rows and logits stay in the nearest cache
CHUNK_BYTES = 1 << 18  # of keys and values that a thread claims at a time
_LINE = 64  # bytes that are fetched together


@compiled
def scratch_bytes(heads, head_dim):  # type: ignore[no-untyped-def]
    """Of a thread: where the rows of a block and of the next one are, a block's logits, each head's query."""
    return BLOCK * (8 + 8 + 4) + heads * head_dim * 4


@compiled
def partial_bytes(this):  # type: ignore[no-untyped-def]
    """Of a chunk: for each head an output, a maximum and a sum."""
    return this.kv_heads * this.group * (this.head_dim + 2) * 4


@compiled
def keys_of(kv_heads, head_dim):  # type: ignore[no-untyped-def]
    """Keys of a chunk."""
    return max(CHUNK_BYTES // (2 * kv_heads * head_dim * 4) // BLOCK, 1) * BLOCK


@compiled
def first_key(this, sequence):  # type: ignore[no-untyped-def]
    """The first key that the only query of a sequence sees."""
    return max(ints_at(this.lens)[sequence] - this.window, 0) if this.window > 0 else 0


@compiled
def end_key(this, sequence):  # type: ignore[no-untyped-def]
    """Past the last key that it sees, which is its own unless a tree mask says otherwise."""
    length = np.int64(ints_at(this.lens)[sequence])
    if this.tree != 0:
        row = np.int64(ints_at(this.starts)[sequence])
        if bytes_at(this.tree + row * this.tree_width)[0] == 0:
            return length - 1
    return length


@compiled
def _score(q, pages, rows, count, logits, head_dim):  # type: ignore[no-untyped-def]
    """Products of one query with the keys at `rows`, four at a time."""
    fours = count // 4 * 4
    for j in range(0, fours, 4):
        a, b, c, d = rows[j], rows[j + 1], rows[j + 2], rows[j + 3]
        sum_a = sum_b = sum_c = sum_d = ZERO
        for i in range(head_dim):
            x = q[i]
            sum_a += x * pages[a + i]
            sum_b += x * pages[b + i]
            sum_c += x * pages[c + i]
            sum_d += x * pages[d + i]
        logits[j], logits[j + 1], logits[j + 2], logits[j + 3] = sum_a, sum_b, sum_c, sum_d
    for j in range(fours, count):
        row, total = rows[j], ZERO
        for i in range(head_dim):
            total += q[i] * pages[row + i]
        logits[j] = total


@compiled
def _weigh(logits, count, maximum):  # type: ignore[no-untyped-def]
    """Logits become e^(logit - maximum); gives their sum."""
    total = ZERO
    for j in range(count):
        weight = exp(logits[j] - maximum)
        logits[j] = weight
        total += weight
    return total


@compiled
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


@compiled
def _find_rows(this, sequence, first, end, rows):  # type: ignore[no-untyped-def]
    """Where the keys [first, end) of a sequence are, as numbers from the first of all pages; how many."""
    table = ints_at(this.table + sequence * this.columns * 4)
    width = 2 * this.kv_heads * this.head_dim
    column, slot = first // this.page_size, first % this.page_size
    for j in range(max(end - first, 0)):
        rows[j] = ((this.first_page + table[column]) * this.page_size + slot) * width
        slot += 1
        if slot == this.page_size:
            column, slot = column + 1, 0
    return max(end - first, 0)


@compiled
def attend_chunk(this, scratch, sequence, first, end, partial, next_sequence, next_first, next_end):  # type: ignore[no-untyped-def]
    """Running output, maximum and sum of the keys [first, end) of a sequence, for each head, to `partial`.

    Of the keys [next_first, next_end) of another sequence, which there need not be, a block is fetched.
    """
    kv_heads, group, head_dim = this.kv_heads, this.group, this.head_dim
    heads, width = kv_heads * group, 2 * kv_heads * head_dim
    position = ints_at(this.lens)[sequence] - 1
    rows, next_rows = words_at(scratch), words_at(scratch + BLOCK * 8)
    logits = floats_at(scratch + BLOCK * (8 + 8))
    queries = scratch + BLOCK * (8 + 8 + 4)
    column = floats_at(this.q + np.int64(ints_at(this.starts)[sequence]) * 4)
    for i in range(heads * head_dim):
        floats_at(queries)[i] = column[i * this.tokens] * this.scale
    maxima = floats_at(partial + heads * head_dim * 4)
    sums = floats_at(partial + heads * (head_dim + 1) * 4)
    for head in range(heads):
        maxima[head], sums[head] = MASKED, ZERO
    out = floats_at(partial)
    for i in range(heads * head_dim):
        out[i] = ZERO
    count = _find_rows(this, sequence, first, min(first + BLOCK, end), rows)
    for start in range(first, end, BLOCK):
        ahead = np.int64(start + BLOCK)
        if ahead < end:
            ahead = _find_rows(this, sequence, ahead, min(ahead + BLOCK, end), next_rows)
        else:
            ahead = _find_rows(this, next_sequence, next_first, min(next_first + BLOCK, next_end), next_rows)
        for kv_head in range(kv_heads):
            keys = floats_at(this.pages + 2 * kv_head * head_dim * 4)
            values = floats_at(this.pages + (2 * kv_head + 1) * head_dim * 4)
            for head in range(kv_head * group, (kv_head + 1) * group):
                for j in range(head, ahead, heads):
                    for line in range(0, width * 4, _LINE):
                        prefetch(this.pages + next_rows[j] * 4 + line)
                query = floats_at(queries + head * head_dim * 4)
                _score(query, keys, rows, count, logits, head_dim)
                if this.soft_cap > ZERO:
                    cap(logits, count, this.soft_cap)
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
                    decay = exp(old - new)
                    maxima[head] = new
                    sums[head] *= decay
                    for i in range(head_dim):
                        out[i] *= decay
                sums[head] += _weigh(logits, count, new)
                _add_values(logits, values, rows, count, out, head_dim)
        rows, next_rows, count = next_rows, rows, ahead


@compiled
def merge(this, sequence, first_chunk, end_chunk):  # type: ignore[no-untyped-def]
    """The output of a sequence from the partial results of its chunks."""
    heads, head_dim, size = this.kv_heads * this.group, this.head_dim, partial_bytes(this)
    row = np.int64(ints_at(this.starts)[sequence])
    for head in range(heads):
        maximum, total = MASKED, ZERO
        if this.sinks != 0:  # a key without a value; minus infinity is none
            maximum, total = max(floats_at(this.sinks)[head], MASKED), ONE
        start = maximum
        for chunk in range(first_chunk, end_chunk):
            found = floats_at(this.partials + chunk * size)[heads * head_dim + head]
            maximum = found if not found <= maximum else maximum
        total *= exp(start - maximum)
        values = floats_at(this.partials + first_chunk * size + head * head_dim * 4)
        for chunk in range(first_chunk, end_chunk):
            partial = floats_at(this.partials + chunk * size)
            weight = exp(partial[heads * head_dim + head] - maximum)
            total += weight * partial[heads * (head_dim + 1) + head]
            if chunk == first_chunk:
                for i in range(head_dim):
                    values[i] *= weight
            else:
                more = floats_at(this.partials + chunk * size + head * head_dim * 4)
                for i in range(head_dim):
                    values[i] += weight * more[i]
        share = ONE / total if total != ZERO else ONE
        out = floats_at(this.out + (head * head_dim * this.tokens + row) * 4)
        for i in range(head_dim):
            out[i * this.tokens] = values[i] * share
        if this.lse != 0:
            lse = maximum + np.float32(math.log(total)) if total != ZERO else np.float32(-np.inf)
            floats_at(this.lse)[head * this.tokens + row] = lse

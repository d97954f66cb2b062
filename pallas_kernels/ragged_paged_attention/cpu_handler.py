"""What XLA calls for attention on a CPU: reads its operands, and shares the work of the kernels.

A sequence with one query is cut into chunks of keys (`cpu_decode`), one with more into tiles of queries for
each key-value head (`cpu_prefill`); threads claim those of all sequences one after the other.
"""

from __future__ import annotations

import numpy as np
from numba import cfunc, types

from pallas_kernels.native.pointers import (
    address_of_text,
    fetch_add,
    floats_at,
    free,
    ints_at,
    malloc,
    words_at,
)
from pallas_kernels.native.tasks import (
    ARGUMENT_BYTES,
    buffer_at,
    claim,
    enter,
    finish,
    frame_at,
    inlined,
    is_execution,
    leave,
    out_of_memory,
    reset,
    sharing,
    threads_for,
)
from pallas_kernels.ragged_paged_attention import cpu_decode, cpu_prefill
from pallas_kernels.ragged_paged_attention.cpu_call import CALL, ZERO, call_at, compiled

# Another thread is woken for each so many bytes of keys and values that decodes read, or as much work.
_WAKING_BYTES = 1 << 16
_FLOPS_PER_BYTE = 10  # of prefills, in the time in which a decode reads a byte

_CALL_BYTES = -(-CALL.itemsize // 64) * 64
_no_memory = address_of_text("attention: no memory for what its threads work with")
_chunk_of, _first_key, _end_key = cpu_decode.keys_of, cpu_decode.first_key, cpu_decode.end_key
_chunk_scratch, _tile_scratch = cpu_decode.scratch_bytes, cpu_prefill.lay_out
_queries_of, _attend_tile = cpu_prefill.queries_of, cpu_prefill.attend_tile
_attend_chunk, _merge, _partial_bytes = cpu_decode.attend_chunk, cpu_decode.merge, cpu_decode.partial_bytes
_LINE = 64


@inlined
def _tile(this, scratch, task, sequence, first_task):  # type: ignore[no-untyped-def]
    """One task of a sequence's tiles: the last ones first, which see the most keys."""
    starts = ints_at(this.starts)
    start, end = np.int64(starts[sequence]), np.int64(starts[sequence + 1])
    tiles = (end - start + this.tile - 1) // this.tile
    row = start + (tiles - 1 - (task - first_task) // this.kv_heads) * this.tile
    _attend_tile(this, scratch, sequence, (task - first_task) % this.kv_heads, row, min(this.tile, end - row))


@inlined
def _keys(this, sequence, number):  # type: ignore[no-untyped-def]
    """The keys of a sequence's chunk of that number."""
    start = _first_key(this, sequence) + number * this.chunk
    return start, min(start + this.chunk, _end_key(this, sequence))


@inlined
def _chunk(this, scratch, chunk, following, sequence, first_chunk):  # type: ignore[no-untyped-def]
    """One chunk of a sequence's keys; and all of them merged, if it is the last one to be done."""
    chunk_ends = words_at(this.chunk_ends)
    start, stop = _keys(this, sequence, chunk - first_chunk)
    next_sequence, next_first_chunk, next_start, next_stop = sequence, first_chunk, np.int64(0), np.int64(0)
    if chunk < following < this.chunks:
        while chunk_ends[next_sequence] <= following:
            next_first_chunk = chunk_ends[next_sequence]
            next_sequence += 1
        next_start, next_stop = _keys(this, next_sequence, following - next_first_chunk)
    partial = this.partials + chunk * _partial_bytes(this)
    _attend_chunk(this, scratch, sequence, start, stop, partial, next_sequence, next_start, next_stop)
    if fetch_add(this.unmerged + sequence * 8, -1) == 1:
        _merge(this, sequence, first_chunk, chunk_ends[sequence])


@inlined
def _clear_padding(this, kv_head):  # type: ignore[no-untyped-def]
    """Zeros where there is no query."""
    features = this.group * this.head_dim
    for i in range(kv_head * features, (kv_head + 1) * features):
        out = floats_at(this.out + i * this.tokens * 4)
        for row in range(ints_at(this.starts)[this.sequences], this.tokens):
            out[row] = ZERO


@compiled
def _work(address):  # type: ignore[no-untyped-def]
    """Claims tasks until there are no more: what every thread of a call does."""
    this = call_at(address)
    scratch = this.scratch + enter(address) * this.scratch_bytes
    tile_ends, chunk_ends = words_at(this.tile_ends), words_at(this.chunk_ends)
    tile_sequence, first_task, chunk_sequence, first_chunk = 0, 0, 0, 0
    # Short tasks are claimed one ahead, so that what the next one reads first is there in time.
    is_short, task = this.tile_tasks == 0, claim(address)
    while task < this.counters.tasks:
        following = claim(address) if is_short else task
        chunk = task - this.tile_tasks
        if chunk < 0:
            while tile_ends[tile_sequence] <= task:
                first_task = tile_ends[tile_sequence]
                tile_sequence += 1
            _tile(this, scratch, task, tile_sequence, first_task)
        elif chunk < this.chunks:
            while chunk_ends[chunk_sequence] <= chunk:
                first_chunk = chunk_ends[chunk_sequence]
                chunk_sequence += 1
            _chunk(this, scratch, chunk, following - this.tile_tasks, chunk_sequence, first_chunk)
        else:
            _clear_padding(this, chunk - this.chunks)
        finish(address)
        task = following if is_short else claim(address)
    leave(address)


_share = sharing(_work)


@inlined
def _or_none(operand):  # type: ignore[no-untyped-def]
    """The address of what an operand holds, 0 where it is of no element."""
    return operand.data if words_at(operand.dims)[0] > 0 else 0


@inlined
def _read(this, frame):  # type: ignore[no-untyped-def]
    """Notes the operands, which the handler describes."""
    operands, results = words_at(frame.operands.items), words_at(frame.results.items)
    q, pages, table = buffer_at(operands[0]), buffer_at(operands[1]), buffer_at(operands[2])
    q_dims, page_dims, table_dims = words_at(q.dims), words_at(pages.dims), words_at(table.dims)
    this.q, this.pages, this.table = q.data, pages.data, table.data
    this.lens, this.starts = buffer_at(operands[4]).data, buffer_at(operands[5]).data
    this.window = ints_at(buffer_at(operands[6]).data)[0]
    this.scale = floats_at(buffer_at(operands[7]).data)[0]
    this.soft_cap = floats_at(buffer_at(operands[8]).data)[0]
    this.sinks, this.slopes = _or_none(buffer_at(operands[9])), _or_none(buffer_at(operands[10]))
    this.span_ends = _or_none(buffer_at(operands[11]))
    tree = buffer_at(operands[12])
    this.tree, this.tree_width = _or_none(tree), words_at(tree.dims)[1]
    this.out = buffer_at(results[0]).data
    this.lse = buffer_at(results[1]).data if frame.results.size > 1 else 0
    this.kv_heads, this.group, this.head_dim, this.tokens = q_dims[0], q_dims[1], q_dims[2], q_dims[3]
    this.sequences, this.columns = table_dims[0], table_dims[1]
    this.first_page = ints_at(buffer_at(operands[3]).data)[0] * page_dims[1]
    this.page_size = page_dims[2]


@inlined
def _attend(frame, argument):  # type: ignore[no-untyped-def]
    """Plans the tasks of a call and runs them; False where there is no memory for it."""
    dims = words_at(buffer_at(words_at(frame.operands.items)[2]).dims)
    address = malloc(_CALL_BYTES + 3 * dims[0] * 8)
    if address == 0:
        return False
    this = call_at(address)
    _read(this, frame)
    sequences, kv_heads, group, head_dim = this.sequences, this.kv_heads, this.group, this.head_dim
    this.tile_ends = address + _CALL_BYTES
    this.chunk_ends = this.tile_ends + sequences * 8
    this.unmerged = this.chunk_ends + sequences * 8
    this.tile, this.chunk = _queries_of(group), _chunk_of(kv_heads, head_dim)
    tile_ends, chunk_ends = words_at(this.tile_ends), words_at(this.chunk_ends)
    unmerged = words_at(this.unmerged)
    starts, lens = ints_at(this.starts), ints_at(this.lens)
    tile_tasks, chunks, pairs = 0, 0, 0
    for s in range(sequences):
        queries = np.int64(starts[s + 1]) - starts[s]
        unmerged[s] = 0
        if queries == 1:
            keys = _end_key(this, s) - _first_key(this, s)
            unmerged[s] = max((keys + this.chunk - 1) // this.chunk, 1)
            chunks += unmerged[s]
        elif queries > 1:
            tile_tasks += (queries + this.tile - 1) // this.tile * kv_heads
            pairs += queries * (lens[s] - queries // 2)
        tile_ends[s], chunk_ends[s] = tile_tasks, chunks
    padding = kv_heads if starts[sequences] < this.tokens else 0
    tasks = tile_tasks + chunks + padding
    reset(this.counters, tasks)
    this.tile_tasks, this.chunks = tile_tasks, chunks

    flops = pairs * kv_heads * group * head_dim * 4
    cost = chunks * this.chunk * kv_heads * head_dim * 8 + flops // _FLOPS_PER_BYTE
    workers = threads_for(frame, tasks, cost // _WAKING_BYTES, argument)
    scratch_bytes = _chunk_scratch(kv_heads * group, head_dim)
    if tile_tasks > 0:
        scratch_bytes = max(scratch_bytes, _tile_scratch(0, group, head_dim))
    scratch_bytes = (scratch_bytes + _LINE - 1) // _LINE * _LINE
    memory = malloc(_LINE + workers * scratch_bytes + chunks * _partial_bytes(this))
    if memory == 0:
        free(address)
        return False
    this.scratch, this.scratch_bytes = (memory + _LINE - 1) // _LINE * _LINE, scratch_bytes
    this.partials = this.scratch + workers * scratch_bytes
    if tile_tasks > 0:
        for thread in range(workers):
            _tile_scratch(this.scratch + thread * scratch_bytes, group, head_dim)
    _share(frame, address, workers, argument)
    free(memory)
    return True


@cfunc(types.intp(types.intp), error_model="numpy", cache=True)
def handle(frame_address):  # type: ignore[no-untyped-def]
    """The handler.

    Operands: q float32[kv_heads, group, head_dim, T]; pages float32[layers, pages, page_size, 2 * kv_heads,
    head_dim]; page_table int32[S, P]; layer int32[]; seq_lens int32[S]; query_starts int32[S + 1]; window
    int32[], 0 for none; scale float32[]; soft_cap float32[], 0 for none; sinks and slopes float32[heads];
    span_ends int32[T]; tree_mask bool[T, D]. The last four are of no element where there are none.
    Results: out like q, and if wanted lse float32[kv_heads, group, T].
    """
    frame = frame_at(frame_address)
    if not is_execution(frame):
        return 0
    argument = malloc(ARGUMENT_BYTES)
    error = 0
    if not _attend(frame, argument):
        error = out_of_memory(frame, _no_memory(), argument)
    free(argument)
    return error

"""What XLA calls for decode attention on a CPU: reads its operands, and shares the work of `cpu_kernel`."""

from __future__ import annotations

from numba import cfunc, types

from pallas_kernels.native.pointers import address_of_text, floats_at, free, ints_at, malloc, words_at
from pallas_kernels.native.tasks import (
    ARGUMENT_BYTES,
    buffer_at,
    frame_at,
    inlined,
    is_execution,
    out_of_memory,
    reset,
    sharing,
    threads_for,
)
from pallas_kernels.ragged_paged_attention.cpu_kernel import (
    BLOCK,
    CALL,
    CHUNK_BYTES,
    SCRATCH_BYTES,
    call_at,
    merge,
    work,
)

WAKING_BYTES = 1 << 16  # another thread is woken for each so many of keys and values

_CALL_BYTES = CALL.itemsize
_share = sharing(work)
_no_memory = address_of_text("decode attention: no memory for the partial results of its chunks")


@inlined
def _chunks_of(first, end, chunk):  # type: ignore[no-untyped-def]
    return max(end - first + chunk - 1, 0) // chunk


@inlined
def _attend(frame, argument):  # type: ignore[no-untyped-def]
    """Reads the operands, and runs the call; False where there is no memory for it."""
    operands, results = words_at(frame.operands.items), words_at(frame.results.items)
    q, pages, table = buffer_at(operands[0]), buffer_at(operands[1]), buffer_at(operands[2])
    layer, sinks, slopes = buffer_at(operands[3]), buffer_at(operands[7]), buffer_at(operands[8])
    q_dims, page_dims, table_dims = words_at(q.dims), words_at(pages.dims), words_at(table.dims)
    sequences, kv_heads, group, head_dim = q_dims[0], q_dims[1], q_dims[2], q_dims[3]
    heads = kv_heads * group
    first_address, end_address = buffer_at(operands[4]).data, buffer_at(operands[5]).data
    first, end = ints_at(first_address), ints_at(end_address)
    token_bytes = 2 * kv_heads * head_dim * 4
    chunk = max(CHUNK_BYTES // token_bytes // BLOCK, 1) * BLOCK
    chunks = 0
    for s in range(sequences):
        chunks += _chunks_of(first[s], end[s], chunk)

    partial_bytes = heads * (head_dim + 2) * 4
    address = malloc(_CALL_BYTES + 2 * sequences * 8 + chunks * (SCRATCH_BYTES + partial_bytes))
    if address == 0:
        return False
    this = call_at(address)
    reset(this.counters, chunks)
    this.q, this.pages, this.table = q.data, pages.data, table.data
    this.first, this.end, this.lens = first_address, end_address, buffer_at(operands[6]).data
    this.sinks = sinks.data if words_at(sinks.dims)[0] > 0 else 0
    this.slopes = slopes.data if words_at(slopes.dims)[0] > 0 else 0
    this.soft_cap = floats_at(buffer_at(operands[9]).data)[0]
    this.out = buffer_at(results[0]).data
    this.lse = buffer_at(results[1]).data if frame.results.size > 1 else 0
    this.chunk_ends = address + _CALL_BYTES
    this.unmerged = this.chunk_ends + sequences * 8
    this.scratch = this.unmerged + sequences * 8
    this.partials = this.scratch + chunks * SCRATCH_BYTES
    this.sequences, this.columns = sequences, table_dims[1]
    this.first_page, this.page_size = ints_at(layer.data)[0] * page_dims[1], page_dims[2]
    this.kv_heads, this.group, this.head_dim, this.chunk = kv_heads, group, head_dim, chunk

    chunk_ends, unmerged, done = words_at(this.chunk_ends), words_at(this.unmerged), 0
    for s in range(sequences):
        unmerged[s] = _chunks_of(first[s], end[s], chunk)
        done += unmerged[s]
        chunk_ends[s] = done
        if unmerged[s] == 0:
            merge(this, s, done, done)
    worth = chunks * chunk * token_bytes // WAKING_BYTES
    _share(frame, address, threads_for(frame, chunks, worth, argument), argument)
    return True


@cfunc(types.intp(types.intp), error_model="numpy", cache=True)
def handle(frame_address):  # type: ignore[no-untyped-def]
    """The handler. Operands: q float32[S, kv_heads, group, head_dim], scaled; pages float32[layers, pages,
    page_size, 2 * kv_heads, head_dim]; page_table int32[S, P]; layer int32[]; first, end, lens int32[S], the
    keys seen and the tokens there are; sinks and slopes float32[heads], or of no element; soft_cap
    float32[1], 0 for none. Results: out like q, and if wanted lse float32[S, kv_heads, group].
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

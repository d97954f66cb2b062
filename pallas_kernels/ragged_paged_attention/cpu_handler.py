"""What XLA calls for decode attention on a CPU: shares the work of `cpu_kernel` among threads of XLA's."""

from __future__ import annotations

from numba import cfunc, njit, types

from pallas_kernels import xla_ffi
from pallas_kernels.native import (
    address_of_task,
    address_of_text,
    call,
    fetch_add,
    floats_at,
    free,
    ints_at,
    malloc,
    record_at,
    sched_yield,
    words_at,
)
from pallas_kernels.ragged_paged_attention.cpu_kernel import (
    BLOCK,
    CALL,
    CHUNK_BYTES,
    DONE,
    HOLDERS,
    SCRATCH_BYTES,
    call_at,
    merge,
    work,
)

# Compiled as a part of the handler: what is compiled apart is optimised anew with each that calls it.
_inlined = njit(error_model="numpy", inline="always")

WAKING_BYTES = 1 << 16  # another thread is woken for each so many of keys and values
_SPINS = 2000  # before a waiting thread lets others run, which may be on its core

_CALL_BYTES = CALL.itemsize
_frame_at, _buffer_at, _api_at = (record_at(d) for d in (xla_ffi.CALL_FRAME, xla_ffi.BUFFER, xla_ffi.API))
_extension_at, _metadata_at = record_at(xla_ffi.EXTENSION), record_at(xla_ffi.HANDLER_METADATA)
_schedule_at, _num_threads_at = record_at(xla_ffi.SCHEDULE), record_at(xla_ffi.NUM_THREADS)
_error_create_at, _error_destroy_at = record_at(xla_ffi.ERROR_CREATE), record_at(xla_ffi.ERROR_DESTROY)
_METADATA, _EXECUTE, _EXHAUSTED = xla_ffi.METADATA, xla_ffi.EXECUTE, xla_ffi.RESOURCE_EXHAUSTED
_MAJOR, _MINOR = xla_ffi.VERSION
_SIZES = tuple(
    d.itemsize for d in (xla_ffi.SCHEDULE, xla_ffi.NUM_THREADS, xla_ffi.ERROR_CREATE, xla_ffi.ERROR_DESTROY)
)
_SCHEDULE_BYTES, _NUM_THREADS_BYTES, _ERROR_CREATE_BYTES, _ERROR_DESTROY_BYTES = _SIZES
_ARGUMENT_BYTES = max(_SIZES) + 8  # a pointer's target
_FRAME_BYTES = xla_ffi.CALL_FRAME.itemsize
_work_task = address_of_task(work)
_out_of_memory = address_of_text("decode attention: no memory for the partial results of its chunks")


@_inlined
def _destroy(api, error, argument):  # type: ignore[no-untyped-def]
    destroy = _error_destroy_at(argument)
    destroy.struct_size, destroy.extension, destroy.error = _ERROR_DESTROY_BYTES, 0, error
    call(api.error_destroy, argument)


@_inlined
def _threads(frame, api, argument):  # type: ignore[no-untyped-def]
    """How many threads XLA's pool has; 1 where there is none."""
    asked = _num_threads_at(argument)
    asked.struct_size, asked.extension = _NUM_THREADS_BYTES, 0
    asked.context, asked.num_threads = frame.context, argument + _NUM_THREADS_BYTES
    error = call(api.thread_pool_num_threads, argument)
    if error != 0:
        _destroy(api, error, argument)
        return 1
    return words_at(asked.num_threads)[0]


@_inlined
def _run(frame, address, argument):  # type: ignore[no-untyped-def]
    """Shares a call among threads, and returns when all of it is done."""
    this, api = call_at(address), _api_at(frame.api)
    chunk_bytes = this.chunk * 2 * this.kv_heads * this.head_dim * 4
    most = min(_threads(frame, api, argument), this.chunks, this.chunks * chunk_bytes // WAKING_BYTES) - 1
    this.holders = max(most, 0) + 2  # those, this thread at work, and this thread until it has seen the end
    schedule = _schedule_at(argument)
    for _ in range(most):
        schedule.struct_size, schedule.extension = _SCHEDULE_BYTES, 0
        schedule.context, schedule.task, schedule.data = frame.context, _work_task(), address
        error = call(api.thread_pool_schedule, argument)
        if error != 0:
            _destroy(api, error, argument)
            fetch_add(address + HOLDERS, -1)
    work(address)
    spins = 0
    while fetch_add(address + DONE, 0) < this.chunks:
        spins += 1
        if spins > _SPINS:
            sched_yield()
    if fetch_add(address + HOLDERS, -1) == 1:
        free(address)


@_inlined
def _chunks_of(first, end, chunk):  # type: ignore[no-untyped-def]
    return max(end - first + chunk - 1, 0) // chunk


@_inlined
def _attend(frame, argument):  # type: ignore[no-untyped-def]
    """Reads the operands, and runs the call; False where there is no memory for it."""
    operands, results = words_at(frame.operands.items), words_at(frame.results.items)
    q, pages, table = _buffer_at(operands[0]), _buffer_at(operands[1]), _buffer_at(operands[2])
    layer, sinks, slopes = _buffer_at(operands[3]), _buffer_at(operands[7]), _buffer_at(operands[8])
    q_dims, page_dims, table_dims = words_at(q.dims), words_at(pages.dims), words_at(table.dims)
    sequences, kv_heads, group, head_dim = q_dims[0], q_dims[1], q_dims[2], q_dims[3]
    heads = kv_heads * group
    first_address, end_address = _buffer_at(operands[4]).data, _buffer_at(operands[5]).data
    first, end = ints_at(first_address), ints_at(end_address)
    chunk = max(CHUNK_BYTES // (2 * kv_heads * head_dim * 4) // BLOCK, 1) * BLOCK
    chunks = 0
    for s in range(sequences):
        chunks += _chunks_of(first[s], end[s], chunk)

    partial_bytes = heads * (head_dim + 2) * 4
    address = malloc(_CALL_BYTES + 2 * sequences * 8 + chunks * (SCRATCH_BYTES + partial_bytes))
    if address == 0:
        return False
    this = call_at(address)
    this.claimed, this.done, this.chunks = 0, 0, chunks
    this.q, this.pages, this.table = q.data, pages.data, table.data
    this.first, this.end, this.lens = first_address, end_address, _buffer_at(operands[6]).data
    this.sinks = sinks.data if words_at(sinks.dims)[0] > 0 else 0
    this.slopes = slopes.data if words_at(slopes.dims)[0] > 0 else 0
    this.soft_cap = floats_at(_buffer_at(operands[9]).data)[0]
    this.out = _buffer_at(results[0]).data
    this.lse = _buffer_at(results[1]).data if frame.results.size > 1 else 0
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
    _run(frame, address, argument)
    return True


@cfunc(types.intp(types.intp), error_model="numpy", cache=True)
def attend_decodes(frame_address):  # type: ignore[no-untyped-def]
    """The handler. Operands: q float32[S, kv_heads, group, head_dim], scaled; pages float32[layers, pages,
    page_size, 2 * kv_heads, head_dim]; page_table int32[S, P]; layer int32[]; first, end, lens int32[S], the
    keys seen and the tokens there are; sinks and slopes float32[heads], or of no element; soft_cap
    float32[1], 0 for none. Results: out like q, and if wanted lse float32[S, kv_heads, group].
    """
    frame = _frame_at(frame_address)
    if frame.extension != 0:
        extension = _extension_at(frame.extension)
        if extension.kind == _METADATA:
            # A version that XLA refuses, where its structures are smaller than those that were read.
            fits = frame.struct_size >= _FRAME_BYTES
            metadata = _metadata_at(extension.metadata)
            metadata.version.major = _MAJOR if fits else -1
            metadata.version.minor = _MINOR
            metadata.traits = 0
            return 0
    if frame.stage != _EXECUTE:
        return 0
    argument = malloc(_ARGUMENT_BYTES)
    error = 0
    if not _attend(frame, argument):
        create = _error_create_at(argument)
        create.struct_size, create.extension = _ERROR_CREATE_BYTES, 0
        create.message, create.code = _out_of_memory(), _EXHAUSTED
        error = call(_api_at(frame.api).error_create, argument)
    free(argument)
    return error

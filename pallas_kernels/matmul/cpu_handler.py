"""What XLA calls for products with weights on a CPU: reads operands, and shares the work of `cpu_kernel`."""

from __future__ import annotations

from numba import cfunc, types

from pallas_kernels.matmul.cpu_kernel import CALL, COLUMNS, FEW_TOKENS, STRIP, call_at, scratch_bytes, work
from pallas_kernels.native.pointers import address_of_text, free, ints_at, malloc, words_at
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

WAKING_BYTES = 1 << 16  # another thread is woken for each so many of the weight
BLOCK_BYTES = 1 << 17  # of the weight, that a thread claims at a time where there are few tokens
TASKS_OF_THREAD = 8  # at least, where there are many

_CALL_BYTES = CALL.itemsize
_share = sharing(work)
_no_memory = address_of_text("matmul: no memory for the tokens of a task")


@inlined
def _multiply(frame, argument):  # type: ignore[no-untyped-def]
    """Reads the operands, and runs the call; False where there is no memory for it."""
    operands, results = words_at(frame.operands.items), words_at(frame.results.items)
    index, tokens_first, x = buffer_at(operands[0]), buffer_at(operands[1]), buffer_at(operands[2])
    weight, y = buffer_at(operands[3 + ints_at(index.data)[0]]), buffer_at(results[0])
    rows, depth, tokens = words_at(weight.dims)[0], words_at(weight.dims)[1], words_at(x.dims)[1]

    groups = (tokens + COLUMNS - 1) // COLUMNS
    threads = threads_for(frame, rows * groups, rows * depth * 4 // WAKING_BYTES, argument)
    if tokens > FEW_TOKENS:  # every block packs its group: no more of them than keep threads busy to the end
        blocks = (threads * TASKS_OF_THREAD + groups - 1) // groups
    else:
        blocks = (rows * depth * 4 + BLOCK_BYTES - 1) // BLOCK_BYTES
    block = ((rows + blocks - 1) // blocks + STRIP - 1) // STRIP * STRIP
    tasks = (rows + block - 1) // block * (groups if tokens > FEW_TOKENS else 1)
    address = malloc(_CALL_BYTES + threads * scratch_bytes(block))
    if address == 0:
        return False
    this = call_at(address)
    reset(this.counters, tasks)
    this.weight, this.x, this.y = weight.data, x.data, y.data
    this.rows, this.depth, this.tokens = rows, depth, tokens
    this.tokens_first = ints_at(tokens_first.data)[0]
    this.block, this.groups, this.scratch = block, groups, address + _CALL_BYTES
    _share(frame, address, threads, argument)
    return True


@cfunc(types.intp(types.intp), error_model="numpy", cache=True)
def handle(frame_address):  # type: ignore[no-untyped-def]
    """The handler. Operands: index int32[]; tokens_first int32[], 0 or 1; x float32[depth, tokens]; weights
    float32[rows, depth], of which the index picks one. Result: float32[rows, tokens], or [tokens, rows].
    """
    frame = frame_at(frame_address)
    if not is_execution(frame):
        return 0
    argument = malloc(ARGUMENT_BYTES)
    error = 0
    if not _multiply(frame, argument):
        error = out_of_memory(frame, _no_memory(), argument)
    free(argument)
    return error

"""Work that a handler shares among threads of XLA's own pool.

A call is a record in one allocation, which begins with COUNTERS. Threads claim its tasks one after the other,
in order; only the counters are written by several, and those are atomic. The calling thread works too, and
waits only for tasks that others have begun: it ends though no other thread is free. Who leaves last frees
the record, which may be a thread that XLA's pool ran when all was done.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from pallas_kernels.native import xla_ffi
from pallas_kernels.native.pointers import (
    address_of_task,
    call,
    fetch_add,
    free,
    record_at,
    sched_yield,
    words_at,
)

# Compiled as a part of its caller: what is compiled apart is optimised anew with each that calls it.
inlined = njit(error_model="numpy", inline="always")

# Claimed stands on a cache line of its own.
COUNTERS = np.dtype(
    [
        ("claimed", "i8"),  # tasks that some thread has begun
        ("_apart", "i8", (7,)),
        ("done", "i8"),
        ("entered", "i8"),  # threads that have begun to work
        ("holders", "i8"),  # threads that may still look at the record
        ("tasks", "i8"),
    ]
)
_DONE, _ENTERED, _HOLDERS = (COUNTERS.fields[name][1] for name in ("done", "entered", "holders"))  # type: ignore[index]
_SPINS = 2000  # before a waiting thread lets others run, which may be on its core

frame_at, buffer_at = record_at(xla_ffi.CALL_FRAME), record_at(xla_ffi.BUFFER)
_counters_at, _api_at = record_at(COUNTERS), record_at(xla_ffi.API)
_extension_at, _metadata_at = record_at(xla_ffi.EXTENSION), record_at(xla_ffi.HANDLER_METADATA)
_schedule_at, _num_threads_at = record_at(xla_ffi.SCHEDULE), record_at(xla_ffi.NUM_THREADS)
_error_create_at, _error_destroy_at = record_at(xla_ffi.ERROR_CREATE), record_at(xla_ffi.ERROR_DESTROY)
_METADATA, _EXECUTE, _EXHAUSTED = xla_ffi.METADATA, xla_ffi.EXECUTE, xla_ffi.RESOURCE_EXHAUSTED
_MAJOR, _MINOR = xla_ffi.VERSION
_SIZES = tuple(
    d.itemsize for d in (xla_ffi.SCHEDULE, xla_ffi.NUM_THREADS, xla_ffi.ERROR_CREATE, xla_ffi.ERROR_DESTROY)
)
_SCHEDULE_BYTES, _NUM_THREADS_BYTES, _ERROR_CREATE_BYTES, _ERROR_DESTROY_BYTES = _SIZES
ARGUMENT_BYTES = max(_SIZES) + 8  # of what XLA's functions are called with, and a pointer's target
_FRAME_BYTES = xla_ffi.CALL_FRAME.itemsize


@inlined
def is_execution(frame):  # type: ignore[no-untyped-def]
    """Whether XLA calls for the work itself; if it asks what the handler is, this answers."""
    if frame.extension != 0:
        extension = _extension_at(frame.extension)
        if extension.kind == _METADATA:
            # A version that XLA refuses, where its structures are smaller than those that were read.
            fits = frame.struct_size >= _FRAME_BYTES
            metadata = _metadata_at(extension.metadata)
            metadata.version.major = _MAJOR if fits else -1
            metadata.version.minor = _MINOR
            metadata.traits = 0
            return False
    return frame.stage == _EXECUTE


@inlined
def out_of_memory(frame, message, argument):  # type: ignore[no-untyped-def]
    """The error that a handler gives back where it could allocate nothing; message is an address."""
    create = _error_create_at(argument)
    create.struct_size, create.extension = _ERROR_CREATE_BYTES, 0
    create.message, create.code = message, _EXHAUSTED
    return call(_api_at(frame.api).error_create, argument)


@inlined
def _destroy(api, error, argument):  # type: ignore[no-untyped-def]
    destroy = _error_destroy_at(argument)
    destroy.struct_size, destroy.extension, destroy.error = _ERROR_DESTROY_BYTES, 0, error
    call(api.error_destroy, argument)


@inlined
def threads_for(frame, tasks, worth, argument):  # type: ignore[no-untyped-def]
    """How many threads to share tasks among: as many as XLA's pool has, and at most `worth`; 1 at least."""
    api = _api_at(frame.api)
    asked = _num_threads_at(argument)
    asked.struct_size, asked.extension = _NUM_THREADS_BYTES, 0
    asked.context, asked.num_threads = frame.context, argument + _NUM_THREADS_BYTES
    error = call(api.thread_pool_num_threads, argument)
    if error != 0:
        _destroy(api, error, argument)
        return 1
    return max(min(words_at(asked.num_threads)[0], tasks, worth), 1)


@inlined
def reset(counters, tasks):  # type: ignore[no-untyped-def]
    """A call's counters before it is shared; those that are not named here are set by `share`."""
    counters.claimed, counters.done, counters.entered, counters.tasks = 0, 0, 0, tasks


@inlined
def enter(address):  # type: ignore[no-untyped-def]
    """The first thing that a thread does with a call: its number among those that work, from 0."""
    return fetch_add(address + _ENTERED, 1)


@inlined
def claim(address):  # type: ignore[no-untyped-def]
    """The next task of a call; there is none left where it is not below `tasks`."""
    return fetch_add(address, 1)


@inlined
def finish(address):  # type: ignore[no-untyped-def]
    """Says that a claimed task is done."""
    fetch_add(address + _DONE, 1)


@inlined
def leave(address):  # type: ignore[no-untyped-def]
    """The last thing that a thread does with a call."""
    if fetch_add(address + _HOLDERS, -1) == 1:
        free(address)


def sharing(work: Any) -> Any:
    """A function for compiled code: shares a call among threads, and returns when all of it is done.

    Args:
        work: compiled; given the record's address, claims tasks until there are no more, and leaves.
    """
    task_of_work = address_of_task(work)

    @inlined
    def share(frame, address, threads, argument):  # type: ignore[no-untyped-def]
        """With so many threads, this one among them."""
        this, api = _counters_at(address), _api_at(frame.api)
        this.holders = threads + 1  # this thread holds on until it saw the end
        schedule = _schedule_at(argument)
        for _ in range(threads - 1):
            schedule.struct_size, schedule.extension = _SCHEDULE_BYTES, 0
            schedule.context, schedule.task, schedule.data = frame.context, task_of_work(), address
            error = call(api.thread_pool_schedule, argument)
            if error != 0:
                _destroy(api, error, argument)
                fetch_add(address + _HOLDERS, -1)
        work(address)
        spins = 0
        while fetch_add(address + _DONE, 0) < this.tasks:
            spins += 1
            if spins > _SPINS:
                sched_yield()
        leave(address)

    return share

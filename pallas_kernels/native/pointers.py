"""What numba's language lacks for C interfaces and threads: memory by address, atomics, function pointers."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_WORD = ir.IntType(64)


def _typed_at(pointer: types.Type) -> Any:
    @intrinsic
    def at(context, address):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.inttoptr(arguments[0], context.get_value_type(pointer))

        return pointer(types.intp), codegen

    return at


def record_at(dtype: np.dtype) -> Any:
    """A function for compiled code: the record of a structured dtype at an address."""
    return _typed_at(numba.from_dtype(dtype))


bytes_at = _typed_at(types.CPointer(types.uint8))
floats_at = _typed_at(types.CPointer(types.float32))
ints_at = _typed_at(types.CPointer(types.int32))
words_at = _typed_at(types.CPointer(types.int64))

malloc = types.ExternalFunction("malloc", types.intp(types.intp))  # type: ignore[no-untyped-call]
free = types.ExternalFunction("free", types.void(types.intp))  # type: ignore[no-untyped-call]
memcpy = types.ExternalFunction("memcpy", types.intp(types.intp, types.intp, types.intp))  # type: ignore[no-untyped-call]
sched_yield = types.ExternalFunction("sched_yield", types.int32())  # type: ignore[no-untyped-call]


@intrinsic
def fetch_add(context, address, value):  # type: ignore[no-untyped-def]
    """Adds to the int64 at an address, atomically and in one order for all threads; gives what was there."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = builder.inttoptr(arguments[0], ir.PointerType(_WORD))
        return builder.atomic_rmw("add", pointer, arguments[1], "seq_cst")

    return types.int64(types.intp, types.int64), codegen


@intrinsic
def call(context, function, argument):  # type: ignore[no-untyped-def]
    """Calls a C function at an address, from one word to another."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        pointer = ir.PointerType(ir.FunctionType(_WORD, [_WORD]))
        return builder.call(builder.inttoptr(arguments[0], pointer), [arguments[1]])

    return types.int64(types.intp, types.intp), codegen


@intrinsic
def prefetch(context, address):  # type: ignore[no-untyped-def]
    """Fetches the line at an address, which need not exist, into the second cache."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        build_prefetch(builder, arguments[0])
        return context.get_dummy_value()

    return types.void(types.intp), codegen


def build_prefetch(builder: Any, address: Any) -> None:
    """See `prefetch`; for code that is being built."""
    byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
    name = "llvm.prefetch.p0"
    known = builder.module.globals.get(name)
    function = known or ir.Function(
        builder.module, ir.FunctionType(ir.VoidType(), [byte, number, number, number]), name
    )
    read, second_cache, data = (ir.Constant(number, n) for n in (0, 2, 1))
    builder.call(function, [builder.inttoptr(address, byte), read, second_cache, data])


@intrinsic
def float_of_bits(context, bits):  # type: ignore[no-untyped-def]
    """The float32 that the bits of an int32 are."""

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), codegen


def address_of_text(text: str) -> Any:
    """A function for compiled code: the address of a C string."""

    @intrinsic
    def address(context):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            return builder.ptrtoint(context.insert_const_string(builder.module, text), _WORD)

        return types.intp(), codegen

    return address


def address_of_task(function: Any) -> Any:
    """A function for compiled code: the address of a C function from one word to nothing, of compiled Python.

    It is found when the program is loaded, so that the machine code may be kept on disk.
    """

    @intrinsic
    def address(context):  # type: ignore[no-untyped-def]
        def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
            function.compile((types.intp,))
            compiled = function.overloads[(types.intp,)]
            context.active_code_library.add_linking_library(compiled.library)
            name = f"{function.py_func.__name__}_task"
            task = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [_WORD]), name)
            task.linkage = "internal"
            body = ir.IRBuilder(task.append_basic_block())
            context.call_internal_no_propagate(body, compiled.fndesc, types.void(types.intp), task.args)
            body.ret_void()
            return builder.ptrtoint(task, _WORD)

        return types.intp(), codegen

    return address

"""Functions of each column of a panel, for compiled code: rows are walked once, by vectors.

A panel is float32[rows, vectors * width]. What numba makes of such loops is guarded against arrays that
overlap, and keeps running results in memory; here they stay in registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_WORD, _INT, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()
_FUSED = ("contract",)
# Of 2^f for |f| <= 1/2: the Taylor series from its seventh power down, whose first missing term is 5e-9.
POWERS_OF_TWO = [math.log(2) ** n / math.factorial(n) for n in range(7, -1, -1)]


class Vectors:
    """Arithmetic of vectors in code that is being built: `floats` are float32, `ints` int32."""

    def __init__(self, builder: Any, width: int) -> None:
        self.builder, self.width = builder, width
        self.floats, self.ints = ir.VectorType(_FLOAT, width), ir.VectorType(_INT, width)

    def number(self, value: float) -> Any:
        """A float everywhere, rounded to float32."""
        return ir.Constant(self.floats, [ir.Constant(_FLOAT, value)] * self.width)

    def integer(self, value: int) -> Any:
        """An integer everywhere."""
        return ir.Constant(self.ints, [value] * self.width)

    def add(self, a: Any, b: Any) -> Any:
        return self.builder.fadd(a, b, flags=_FUSED)

    def subtract(self, a: Any, b: Any) -> Any:
        return self.builder.fsub(a, b, flags=_FUSED)

    def multiply(self, a: Any, b: Any) -> Any:
        return self.builder.fmul(a, b, flags=_FUSED)

    def larger(self, a: Any, b: Any) -> Any:
        """The larger one; a where either is NaN."""
        return self.builder.select(self.builder.fcmp_unordered(">", a, b), a, b)

    def as_floats(self, ints: Any) -> Any:
        return self.builder.sitofp(ints, self.floats)

    def within(self, first: Any, x: Any, end: Any) -> Any:
        """Whether first <= x < end, of integers."""
        from_first = self.builder.icmp_signed("<=", first, x)
        return self.builder.and_(from_first, self.builder.icmp_signed("<", x, end))

    def where(self, condition: Any, a: Any, b: Any) -> Any:
        return self.builder.select(condition, a, b)

    def exp(self, x: Any) -> Any:
        """e^x where that is at most 1, within 2e-7 of it; 0 where it is below 2^-126.5."""
        build = self.builder
        # The least exponent's bits are those of zero.
        y = self.larger(self.multiply(x, self.number(math.log2(math.e))), self.number(-127))
        # To the nearest, since y is not positive.
        whole = build.fptosi(self.subtract(y, self.number(0.5)), self.ints)
        rest = self.subtract(y, build.sitofp(whole, self.floats))
        power = self.number(POWERS_OF_TWO[0])
        for coefficient in POWERS_OF_TWO[1:]:
            power = self.add(self.multiply(power, rest), self.number(coefficient))
        bits = build.shl(build.add(whole, self.integer(127)), self.integer(23))
        return self.multiply(power, build.bitcast(bits, self.floats))


Step = Callable[..., tuple[Any, ...]]


def walk(step: Step, kinds: Sequence[str], vectors: int, width: int) -> Any:
    """A function for compiled code: what `step` makes of the rows of a panel, from the first to the last.

    Args:
        step: (arithmetic, row's index int32 everywhere, row, *states) to (row or None, *states), each a
            vector. A row that is not None is written.
        kinds: of each state, which is an array [vectors * width]: "floats" or "ints".

    Returns:
        walk(source, source_row, target, target_row, first, count, states): the addresses of the panel and
            of what it becomes, which may be the same, and the bytes from row to row of each; the index of
            the first row; how many there are, at least one; and a tuple of the addresses of states, which
            are read before and written after, if they changed.
    """

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        source, source_row, target, target_row, first, count, packed = arguments
        arithmetic = Vectors(builder, width)
        addresses = [builder.extract_value(packed, i) for i in range(len(kinds))]

        def place(address: Any, vector: int, kind: Any) -> Any:
            offset = ir.Constant(_WORD, vector * width * 4)
            return builder.inttoptr(builder.add(address, offset), kind.as_pointer())

        def load(pointer: Any) -> Any:
            loaded = builder.load(pointer)
            loaded.align = 4
            return loaded

        types_of = [getattr(arithmetic, kind) for kind in kinds]
        starts = [
            [load(place(a, v, kind)) for a, kind in zip(addresses, types_of, strict=True)]
            for v in range(vectors)
        ]
        before, body = builder.block, builder.append_basic_block("rows")
        after = builder.append_basic_block("end")
        builder.branch(body)
        builder.position_at_end(body)
        done, row, into = builder.phi(_WORD), builder.phi(_WORD), builder.phi(_WORD)
        done.add_incoming(ir.Constant(_WORD, 0), before)
        row.add_incoming(source, before)
        into.add_incoming(target, before)
        states = [[builder.phi(kind) for kind in types_of] for _ in range(vectors)]
        lanes = ir.Constant(arithmetic.ints, [0] * width)
        undefined = ir.Constant(arithmetic.ints, ir.Undefined)
        index = builder.trunc(builder.add(first, done), _INT)
        index = builder.insert_element(undefined, index, ir.Constant(_INT, 0))
        index = builder.shuffle_vector(index, undefined, lanes)
        floats = arithmetic.floats
        results = [step(arithmetic, index, load(place(row, v, floats)), *own) for v, own in enumerate(states)]
        for v, (written, *_) in enumerate(results):
            if written is not None:
                builder.store(written, place(into, v, floats)).align = 4
        next_done = builder.add(done, ir.Constant(_WORD, 1))
        done.add_incoming(next_done, builder.block)
        row.add_incoming(builder.add(row, source_row), builder.block)
        into.add_incoming(builder.add(into, target_row), builder.block)
        for own, start, (_, *new) in zip(states, starts, results, strict=True):
            for phi, old, value in zip(own, start, new, strict=True):
                phi.add_incoming(old, before)
                phi.add_incoming(value, builder.block)
        builder.cbranch(builder.icmp_signed("<", next_done, count), body, after)
        builder.position_at_end(after)
        for v, (own, (_, *new)) in enumerate(zip(states, results, strict=True)):
            for phi, value, address, kind in zip(own, new, addresses, types_of, strict=True):
                if value is not phi:
                    builder.store(value, place(address, v, kind)).align = 4
        return context.get_dummy_value()

    @intrinsic
    def walk_rows(context, source, source_row, target, target_row, first, count, states):  # type: ignore[no-untyped-def]
        words = types.UniTuple(types.int64, len(kinds))
        return types.void(*(types.int64,) * 6, words), codegen

    return walk_rows

"""Matrix products of tiles that are held in vector registers, for compiled code.

A tile of the result is rows x columns accumulators, where columns are vectors that lie beside each other in
memory. Each step along the depth loads a row of B by vectors, broadcasts one number of A for each row of the
tile, and adds their products: the inner kernel of Goto and van de Geijn (2008, section 6), with A read where
it lies.
"""

from __future__ import annotations

import platform
from typing import Any

import numba
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba import types
from numba.extending import intrinsic

from pallas_kernels.native.pointers import build_prefetch

_WORD, _INT, _FLOAT = ir.IntType(64), ir.IntType(32), ir.FloatType()


def _has(feature: str) -> bool:
    """Whether the processor that numba compiles for has a feature, by LLVM's name of it."""
    asked_for = numba.config.CPU_FEATURES
    if asked_for is not None:
        return f"+{feature}" in asked_for.split(",")
    return bool(get_host_cpu_features().get(feature))


# Numbers of a vector, and vectors that registers hold.
WIDTH = 16 if _has("avx512f") else 8 if _has("avx2") else 4
REGISTERS = 16 if platform.machine() in ("x86_64", "AMD64") and WIDTH < 16 else 32


def tile_product(rows: int, vectors: int, width: int) -> Any:
    """A function for compiled code: C[rows, columns] (+)= A[rows, depth] B[depth, columns], all float32.

    Every number of C is summed in the order of the depth, whatever the tile, and what C held is added last: a
    column's result does not depend on which others there are.

    Args:
        rows: of a tile.
        vectors, width: vectors of a row, and numbers of a vector: vectors * width are the columns. With
            those of B and one more, rows * vectors of them should fit into REGISTERS.

    Returns:
        product(a, a_row, a_depth, b, b_depth, c, c_row, depth, add, ahead, ahead_depth), all int64.
            Addresses a, b, c; strides in bytes, from row to row and along the depth. `add` is 0 for = and
            1 for +=. The line at ahead + d * ahead_depth is fetched into the second cache at depth d.
    """
    vector = ir.VectorType(_FLOAT, width)

    def codegen(context, builder, signature, arguments):  # type: ignore[no-untyped-def]
        a, a_row, a_depth, b, b_depth, c, c_row, depth, add, ahead, ahead_depth = arguments

        def at(address, offset, pointer):  # type: ignore[no-untyped-def]
            return builder.inttoptr(builder.add(address, offset), pointer)

        def number(value):  # type: ignore[no-untyped-def]
            return ir.Constant(_WORD, value)

        def load(pointer):  # type: ignore[no-untyped-def]
            loaded = builder.load(pointer)
            loaded.align = 4
            return loaded

        a_rows = [builder.add(a, builder.mul(a_row, number(r))) for r in range(rows)]
        places = [
            at(builder.add(c, builder.mul(c_row, number(r))), number(v * width * 4), vector.as_pointer())
            for r in range(rows)
            for v in range(vectors)
        ]
        before = builder.block
        body, after, adding, end = (
            builder.append_basic_block(name) for name in ("depth", "after", "add", "end")
        )
        builder.branch(body)

        builder.position_at_end(body)

        def carried(kind, start):  # type: ignore[no-untyped-def]
            phi = builder.phi(kind)
            phi.add_incoming(start, before)
            return phi

        index, a_offset, b_offset, ahead_of = (carried(_WORD, number(0)) for _ in range(4))
        totals = [carried(vector, ir.Constant(vector, [0.0] * width)) for _ in places]
        columns = [
            load(at(builder.add(b, b_offset), number(v * width * 4), vector.as_pointer()))
            for v in range(vectors)
        ]
        build_prefetch(builder, builder.add(ahead, ahead_of))
        undefined = ir.Constant(vector, ir.Undefined)
        lanes = ir.Constant(ir.VectorType(_INT, width), [0] * width)
        results, to_store = [], []
        for r in range(rows):
            one = builder.load(at(a_rows[r], a_offset, _FLOAT.as_pointer()))
            first_lane = builder.insert_element(undefined, one, ir.Constant(_INT, 0))
            everywhere = builder.shuffle_vector(first_lane, undefined, lanes)
            for v in range(vectors):
                product = builder.fmul(everywhere, columns[v], flags=("contract",))
                results.append(builder.fadd(product, totals[r * vectors + v], flags=("contract",)))
        next_index = builder.add(index, number(1))
        for phi, value in (
            (index, next_index),
            (a_offset, builder.add(a_offset, a_depth)),
            (b_offset, builder.add(b_offset, b_depth)),
            (ahead_of, builder.add(ahead_of, ahead_depth)),
            *zip(totals, results, strict=True),
        ):
            phi.add_incoming(value, body)
        builder.cbranch(builder.icmp_signed("<", next_index, depth), body, after)

        builder.position_at_end(after)
        builder.cbranch(builder.icmp_signed("!=", add, number(0)), adding, end)
        builder.position_at_end(adding)
        with_before = [
            builder.fadd(load(place), result) for result, place in zip(results, places, strict=True)
        ]
        builder.branch(end)
        builder.position_at_end(end)
        for new, with_old, place in zip(results, with_before, places, strict=True):
            chosen = builder.phi(vector)
            chosen.add_incoming(new, after)
            chosen.add_incoming(with_old, adding)
            to_store.append((chosen, place))
        for chosen, place in to_store:
            builder.store(chosen, place).align = 4
        return context.get_dummy_value()

    @intrinsic
    def product(context, a, a_row, a_depth, b, b_depth, c, c_row, depth, add, ahead, ahead_depth):  # type: ignore[no-untyped-def]
        return types.void(*(types.int64,) * 11), codegen

    return product

"""What the CPU's kernels for decodes and prefills share: the record of a call, functions of numbers."""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from pallas_kernels.native.columns import POWERS_OF_TWO
from pallas_kernels.native.pointers import float_of_bits, record_at
from pallas_kernels.native.tasks import COUNTERS

# Sums may be reordered and multiplications fused with them. What is NaN stays NaN.
compiled = njit(fastmath={"reassoc", "contract", "nsz", "arcp"}, error_model="numpy", no_cpython_wrapper=True)

MASKED = np.float32(-1e30)  # where a maximum starts: finite, since minus infinity less itself is NaN
ZERO, ONE = np.float32(0), np.float32(1)
_LOG2_E = np.float32(math.log2(math.e))
_HALF, _TWO = np.float32(0.5), np.float32(2)
_E7, _E6, _E5, _E4, _E3, _E2, _E1, _ = map(np.float32, POWERS_OF_TWO)

# One call: what is asked for, and how far it is. Addresses point to what XLA holds, or follow in the same
# allocation; those of what there is none of are 0.
CALL = np.dtype(
    [
        ("counters", COUNTERS),
        # Operands and results, as the handler describes them.
        *((name, "i8") for name in ("q", "pages", "table", "lens", "starts", "sinks", "slopes")),
        *((name, "i8") for name in ("span_ends", "tree", "out", "lse")),
        *((name, "i8") for name in ("tokens", "sequences", "columns", "first_page", "page_size")),
        *((name, "i8") for name in ("kv_heads", "group", "head_dim", "window", "tree_width")),
        ("scale", "f4"),
        ("soft_cap", "f4"),
        # Tasks are tiles of prefills for each key-value head, then chunks of decodes, then the padding of
        # each key-value head.
        ("tile_tasks", "i8"),
        ("chunks", "i8"),
        ("tile_ends", "i8"),  # [sequences]: where the tasks of a sequence's tiles end
        ("chunk_ends", "i8"),  # [sequences]: where its chunks do
        ("unmerged", "i8"),  # [sequences]: chunks that are not computed yet
        ("tile", "i8"),  # queries of a tile
        ("chunk", "i8"),  # keys of a chunk
        ("partials", "i8"),  # [chunks, heads * (head_dim + 2)]
        ("scratch", "i8"),  # [threads, scratch_bytes]
        ("scratch_bytes", "i8"),
    ],
    align=True,
)
call_at = record_at(CALL)


@compiled
def exp(x):  # type: ignore[no-untyped-def]
    """e^x of a float32 that is at most 0, within 2e-7 of it; 0 where it is below 2^-126."""
    y = x * _LOG2_E
    y = y if not y < np.float32(-127) else np.float32(-127)  # whose exponent's bits are those of zero
    whole = np.int32(y - _HALF)  # rounds to nearest, since y is not positive
    f = y - np.float32(whole)
    power = ((((((_E7 * f + _E6) * f + _E5) * f + _E4) * f + _E3) * f + _E2) * f + _E1) * f + ONE
    return power * float_of_bits(np.int32((whole + np.int32(127)) << np.int32(23)))


@compiled
def cap(logits, count, soft_cap):  # type: ignore[no-untyped-def]
    """soft_cap * tanh(logits / soft_cap), by e^(-2|x|)."""
    for j in range(count):
        x = logits[j] / soft_cap
        small = exp(-_TWO * abs(x))
        size = soft_cap * (ONE - small) / (ONE + small)
        logits[j] = size if x > ZERO else -size

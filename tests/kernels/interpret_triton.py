"""Runs the Triton kernel in Triton's own interpreter (numpy) in place of a GPU, from within a JAX program."""

from __future__ import annotations

import os
from typing import Any

# Read once, when Triton is imported; it decides what `triton.jit` makes of a function.
os.environ.setdefault("TRITON_INTERPRET", "1")

import jax
import numpy as np

from pallas_kernels.ragged_paged_attention.triton import Launch

_TYPES = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "int32": "i32",
    "int8": "i8",
}


class _Tensor:
    """As much of a torch tensor as the interpreter asks of one: memory, and what is in it."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.dtype = array, _TYPES[array.dtype.name]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def untyped_storage(self) -> _Tensor:
        return self

    def cpu(self) -> _Tensor:
        return self

    def new_empty(self, size: int, device: str) -> _Tensor:
        return _Tensor(np.empty(size, self.array.dtype))

    def set_(self, storage: _Tensor, *place: Any) -> None:
        self.array = storage.array

    def storage_offset(self) -> int:
        return 0

    def size(self) -> tuple[int, ...]:
        return self.array.shape

    def stride(self) -> tuple[int, ...]:
        return self.array.strides

    def copy_(self, other: _Tensor) -> None:
        assert other.array is self.array, "the kernel writes where the caller reads"


def launch_interpreted(launch: Launch) -> tuple[jax.Array, jax.Array]:
    """A `triton.Launcher`; what no program writes is NaN."""

    def run(*operands: Any) -> tuple[np.ndarray, ...]:
        results = [np.full(result.shape, np.nan, result.dtype) for result in launch.results]
        given = [np.ascontiguousarray(operand) for operand in operands]
        launch.load()[(launch.programs,)](*map(_Tensor, (*given, *results)), **launch.constants)
        return tuple(results)

    return jax.pure_callback(run, launch.results, *launch.operands)

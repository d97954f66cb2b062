"""Products of a weight, one out of those of several layers, with tokens that are columns.

Backends: `xla`, and for float32 on CPUs `cpu`, compiled by numba, with which a token's results are the same
whatever the others are, bit for bit.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from pallas_kernels.matmul import cpu

Backend = Literal["cpu", "xla"]
BACKENDS: tuple[str, ...] = get_args(Backend)

# From this many tokens on, XLA on CPU is faster with the transpose folded into the product.
_FOLD_TRANSPOSE_FROM = 32


def matmul(
    weights: Sequence[jax.Array],
    index: jax.Array | int,
    x: jax.Array,
    *,
    tokens_first: bool = False,
    backend: Backend | None = None,
) -> jax.Array:
    """weights[index] @ x, summed in float32, where nothing of the weights is copied.

    Args:
        weights: each [out, in], of one shape and dtype.
        index: int32[], which of them.
        x: [in, T].
        tokens_first: return float32[T, out] instead of [out, T] of x's dtype, for logits.
        backend: which implementation runs; None is `cpu` where it can, else `xla`.

    Raises:
        ValueError: shapes or dtypes that do not fit together, an unknown backend, or one that cannot run.
    """
    shapes = {(weight.shape, weight.dtype) for weight in weights}
    if len(shapes) != 1 or x.ndim != 2 or weights[0].ndim != 2 or weights[0].shape[1] != x.shape[0]:
        found = ", ".join(sorted(f"{dtype.name}{list(shape)}" for shape, dtype in shapes)) or "none"
        raise ValueError(f"weights must be [out, in], all alike, and x [in, T]; got {found} and {x.shape}.")
    if weights[0].dtype != x.dtype:
        raise ValueError(
            f"weights and x must have one dtype; got {weights[0].dtype.name} and {x.dtype.name}."
        )
    if backend is None:
        backend = default_backend(x.dtype)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}; there are {', '.join(BACKENDS)}.")
    if backend == "cpu":
        return cpu.matmul(weights, jnp.asarray(index, jnp.int32), x, tokens_first)
    # A branch for each weight: a slice of a stack would be a copy of it.
    product = _tokens_first if tokens_first else _features_first
    return lax.switch(index, [functools.partial(product, weight) for weight in weights], x)


def default_backend(dtype: DTypeLike) -> Backend:
    """What multiplies on the devices that are JAX's default."""
    return "cpu" if jax.default_backend() == "cpu" and cpu.missing(dtype) is None else "xla"


def _features_first(weight: jax.Array, x: jax.Array) -> jax.Array:
    return lax.dot_general(weight, x, (((1,), (0,)), ((), ())))


def _tokens_first(weight: jax.Array, x: jax.Array) -> jax.Array:
    y = lax.dot_general(weight, x, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return (y if x.shape[1] >= _FOLD_TRANSPOSE_FROM else lax.optimization_barrier(y)).T

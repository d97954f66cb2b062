"""Products of rows with one matrix out of several: a run of consecutive rows for each matrix.

Rows are sorted by group: the first group_sizes[0] of them belong to the first matrix, the next
group_sizes[1] to the second, and so on; rows past the last group are padding. The cost follows the rows,
not rows times groups, and a matrix whose group is empty is not read.

Backends: `reference` (dense over all groups, the oracle), `tiles` (a loop over tiles of rows, one plain
product each, portable) and `xla` (XLA's own ragged dot: a kernel on TPU, dense over all groups elsewhere).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

Backend = Literal["reference", "tiles", "xla"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def grouped_matmul(
    rows: jax.Array,
    weights: jax.Array,
    group_sizes: jax.Array,
    *,
    first_group: jax.Array | int = 0,
    backend: Backend | None = None,
) -> jax.Array:
    """Multiplies every row with the matrix of its group.

    Args:
        rows: [R, in], sorted by group.
        weights: [matrices, in, out], of the same dtype.
        group_sizes: int32[groups], not negative; their sum is at most R.
        first_group: the matrix of the first group. Where there are more matrices than groups, those of
            several layers for instance, the others are neither read nor copied.
        backend: which implementation runs; None is `xla` on a TPU and `tiles` elsewhere.

    Returns:
        [R, out] of the rows' dtype, summed in float32; rows past the last group hold anything finite.

    Raises:
        ValueError: shapes or dtypes that do not fit together, or an unknown backend.
    """
    if rows.ndim != 2 or weights.ndim != 3 or rows.shape[1] != weights.shape[1]:
        raise ValueError(
            f"rows must be [R, in] and weights [matrices, in, out]; got {rows.shape} and {weights.shape}."
        )
    if group_sizes.ndim != 1 or group_sizes.shape[0] > weights.shape[0]:
        raise ValueError(
            f"group_sizes must be [groups] with at most {weights.shape[0]}, the number of matrices; got "
            f"{group_sizes.shape}."
        )
    if not jnp.issubdtype(group_sizes.dtype, jnp.integer):
        raise ValueError(f"group_sizes are counts of rows, so integers; got {group_sizes.dtype.name}.")
    if rows.dtype != weights.dtype or not jnp.issubdtype(rows.dtype, jnp.floating):
        raise ValueError(
            f"rows and weights must be of one floating dtype; got {rows.dtype.name} and {weights.dtype.name}."
        )
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}.")
    if 0 in (*rows.shape, *weights.shape, *group_sizes.shape):
        return jnp.zeros((rows.shape[0], weights.shape[2]), rows.dtype)
    operands = (rows, weights, group_sizes, jnp.asarray(first_group, jnp.int32))
    if backend is None:
        return lax.platform_dependent(*operands, tpu=_implementation("xla"), default=_implementation("tiles"))
    return _implementation(backend)(*operands)


def _implementation(backend: Backend) -> Callable[..., jax.Array]:
    multiply: Callable[..., jax.Array] = importlib.import_module(f"{__name__}.{backend}").multiply
    return multiply

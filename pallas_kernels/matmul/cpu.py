"""The backend of CPUs: `cpu_kernel`, which XLA calls by `cpu_handler`.

XLA's own products take as long for 8 tokens as for 16, and leave a third of the machine idle at 32; the
kernel reads a weight at the memory's speed up to 16 tokens, and multiplies at the cores' speed from then on.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.native import loading

_TARGET = "pallas_kernels_matmul"


def missing(dtype: DTypeLike) -> str | None:
    """What keeps the backend from running here, as the end of a sentence; None is nothing."""
    if jnp.dtype(dtype) != jnp.float32:
        return f"multiplies float32, and these are {jnp.dtype(dtype).name}"
    return loading.missing(_TARGET, f"{__package__}.cpu_handler")


def matmul(weights: Sequence[jax.Array], index: jax.Array, x: jax.Array, tokens_first: bool) -> jax.Array:
    """See `pallas_kernels.matmul.matmul`.

    Raises:
        ValueError: the dtype is not float32, or the kernel cannot be compiled here.
    """
    if (reason := missing(x.dtype)) is not None:
        raise ValueError(f"backend='cpu' {reason}; or take 'xla'.")
    rows, tokens = weights[0].shape[0], x.shape[1]
    shape = (tokens, rows) if tokens_first else (rows, tokens)
    if 0 in (*shape, x.shape[0]):
        return jnp.zeros(shape, jnp.float32)
    result = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.ffi.ffi_call(_TARGET, result)(index, np.int32(tokens_first), x, *weights)

"""XLA's ragged dot, which TPUs have a kernel for. Elsewhere XLA multiplies every row with every matrix."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


def multiply(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, first_group: jax.Array
) -> jax.Array:
    """See `grouped_matmul`.

    Matrices before and after the groups are groups without rows: the kernel reads its matrices in place,
    and a slice of them would be a copy.
    """
    sizes = jnp.zeros(weights.shape[0], jnp.int32)
    sizes = lax.dynamic_update_slice_in_dim(sizes, group_sizes.astype(jnp.int32), first_group, 0)
    out = lax.ragged_dot(rows, weights, sizes, preferred_element_type=jnp.float32).astype(rows.dtype)
    is_padding = jnp.arange(rows.shape[0]) >= jnp.sum(group_sizes)
    return jnp.where(is_padding[:, None], 0, out)

"""Token and position embeddings, and the product back to the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.layers.linear import declare

# From this many rows on, XLA on CPU is faster with the transpose folded into the product.
_FOLD_TRANSPOSE_FROM = 32


class Embedding(nnx.Module):
    """A table of rows [rows, width], looked up by id."""

    def __init__(self, rows: int, width: int, row_axis: str | None, dtype: jnp.dtype) -> None:
        self.weight = declare((rows, width), (row_axis, "embed"), dtype)

    def __call__(self, ids: jax.Array, feature_major: bool) -> jax.Array:
        """ids int32[T] to [T, width] or [width, T]."""
        x = self.weight[...][ids]
        return x.T if feature_major else x

    def logits(self, x: jax.Array, feature_major: bool) -> jax.Array:
        """x [width, S] or [S, width] to float32 logits [S, rows]."""
        weight = self.weight[...]
        if not feature_major:
            return jnp.einsum("sd,vd->sv", x, weight, preferred_element_type=jnp.float32)
        logits = lax.dot_general(weight, x, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
        return (logits if x.shape[1] >= _FOLD_TRANSPOSE_FROM else lax.optimization_barrier(logits)).T

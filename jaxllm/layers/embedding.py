"""Token and position embeddings, and the product back to the vocabulary."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.layers.linear import declare
from pallas_kernels.matmul import matmul
from sharding import MeshAxes


class Embedding(nnx.Module):
    """A table of rows [rows, width], looked up by id.

    Args:
        split_over: mesh axes that share the rows, if any; a shard has rows one after the other.
    """

    def __init__(
        self, rows: int, width: int, row_axis: str | None, dtype: jnp.dtype, split_over: MeshAxes = None
    ) -> None:
        self.weight = declare((rows, width), (row_axis, "embed"), dtype)
        self.split_over = split_over

    def __call__(self, ids: jax.Array, feature_major: bool) -> jax.Array:
        """ids int32[T] to [T, width] or [width, T]."""
        weight = self.weight[...]
        if self.split_over is None:
            x = weight[ids]
        else:
            # A row is a row of one shard and zeros of the others (Shoeybi et al. 2019, section 3).
            own = ids - self._first_row(weight)
            is_own = (own >= 0) & (own < weight.shape[0])
            x = jnp.where(is_own[:, None], weight[jnp.where(is_own, own, 0)], 0)
            x = lax.psum(x, self.split_over)
        return x.T if feature_major else x

    def _first_row(self, weight: jax.Array) -> jax.Array:
        return lax.axis_index(self.split_over) * weight.shape[0]

    def logits(self, x: jax.Array, feature_major: bool, num_rows: int) -> jax.Array:
        """x [width, S] or [S, width] to float32 logits [S, rows]; a shard's are of its own rows.

        Those of rows from `num_rows` on, which only fill up the shards, are -inf.
        """
        logits = self._products(x, feature_major)
        if self.split_over is None:
            return logits
        row = self._first_row(self.weight[...]) + jnp.arange(logits.shape[1])
        return jnp.where(row < num_rows, logits, -jnp.inf)

    def _products(self, x: jax.Array, feature_major: bool) -> jax.Array:
        weight = self.weight[...]
        if feature_major:
            return matmul([weight], 0, x, tokens_first=True)
        return jnp.einsum("sd,vd->sv", x, weight, preferred_element_type=jnp.float32)

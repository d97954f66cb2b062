"""Products with weights, and the parameters that they declare."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax


def declare(shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype) -> nnx.Param[jax.Array]:
    """A parameter without values: its shape, its dtype and the logical axis of each dimension."""
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype), logical_axes=axes)


class Linear(nnx.Module):
    """y = W x + b over the trailing dimensions of W.

    The weight is [out..., in...], with as many input dimensions as `in_axes` names.
    """

    def __init__(
        self,
        out_shape: tuple[int, ...],
        in_shape: tuple[int, ...],
        out_axes: tuple[str | None, ...],
        in_axes: tuple[str | None, ...],
        *,
        bias: bool,
        dtype: jnp.dtype,
        feature_major: bool,
    ) -> None:
        self.weight = declare(out_shape + in_shape, out_axes + in_axes, dtype)
        self.bias = declare(out_shape, out_axes, dtype) if bias else None
        self.num_inputs = len(in_shape)
        self.feature_major = feature_major

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [in..., T] or [T, in...]; returns [out..., T] or [T, out...] alike."""
        weight = self.weight[...]
        in_dims = tuple(range(weight.ndim - self.num_inputs, weight.ndim))
        first = 0 if self.feature_major else 1
        x_dims = tuple(range(first, first + self.num_inputs))
        if self.feature_major:
            y = lax.dot_general(weight, x, ((in_dims, x_dims), ((), ())))
        else:
            y = lax.dot_general(x, weight, ((x_dims, in_dims), ((), ())))
        if self.bias is not None:
            bias = self.bias[...]
            y = y + (bias[..., None] if self.feature_major else bias)
        return y


def to_token_major(x: jax.Array, feature_major: bool) -> jax.Array:
    """[features..., T] to [T, features...]; token-major input is returned as it is."""
    if not feature_major:
        return x
    # Without the barrier XLA folds the transpose into the product and gives up its fast form.
    return jnp.moveaxis(lax.optimization_barrier(x), -1, 0)

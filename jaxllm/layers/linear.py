"""Products with weights, and the parameters that they declare."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from pallas_kernels.matmul import matmul
from sharding import MeshAxes


def declare(
    shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype, *, exact: bool = False
) -> nnx.Param[jax.Array]:
    """A parameter without values: its shape, its dtype and the logical axis of each dimension.

    Args:
        exact: hold it in float32, whatever the dtype of the model.
    """
    declared = jax.ShapeDtypeStruct(shape, jnp.float32 if exact else dtype)
    return nnx.Param(declared, logical_axes=axes, exact=exact)  # type: ignore[arg-type]


@dataclass(frozen=True)
class OneOfLayers:
    """A layer's weight among those of all layers, where a loop over layers keeps them apart.

    A loop that sliced a stack would copy every weight on a CPU. Here it branches to a product with
    the right array instead: nothing is copied, and the loop's body is still compiled only once.
    """

    index: jax.Array
    arrays: Sequence[jax.Array]


@dataclass(frozen=True)
class OneOfStack:
    """A layer's weight within a stack [layers, ...], for kernels that read it there.

    A scan would slice the stack, and for a kernel that is not XLA's own the slice is a copy.
    """

    index: jax.Array
    stack: jax.Array


def apply_weight(
    function: Callable[[jax.Array, jax.Array], jax.Array], weight: jax.Array | OneOfLayers, x: jax.Array
) -> jax.Array:
    """function(weight, x)."""
    if isinstance(weight, OneOfLayers):
        return lax.switch(weight.index, [functools.partial(function, array) for array in weight.arrays], x)
    return function(weight, x)


class Linear(nnx.Module):
    """y = W x + b over the trailing dimensions of W.

    The weight is [out..., in...], with as many input dimensions as `in_axes` names.

    Args:
        sum_over: mesh axes that split the inputs, where the products of the shards are partial sums.
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
        sum_over: MeshAxes = None,
    ) -> None:
        self.weight = declare(out_shape + in_shape, out_axes + in_axes, dtype)
        self.bias = declare(out_shape, out_axes, dtype) if bias else None
        self.num_inputs = len(in_shape)
        self.feature_major = feature_major
        self.sum_over = sum_over

    def __call__(self, x: jax.Array) -> jax.Array:
        """x: [in..., T] or [T, in...]; returns [out..., T] or [T, out...] alike."""
        y = self.product(x)
        if self.sum_over is not None:
            y = lax.psum(y, self.sum_over)
        if self.bias is not None:
            bias = self.bias[...]
            y = y + (bias[..., None] if self.feature_major else bias)
        return y

    def product(self, x: jax.Array) -> jax.Array:
        """Of the weight alone, or a shard's part of it."""
        weight = self.weight.get_value()
        if not self.feature_major:
            return apply_weight(self._rows, weight, x)
        weights, index = (weight.arrays, weight.index) if isinstance(weight, OneOfLayers) else ([weight], 0)
        depth = math.prod(x.shape[: self.num_inputs])
        y = matmul([one.reshape(-1, depth) for one in weights], index, x.reshape(depth, -1))
        return y.reshape(*weights[0].shape[: -self.num_inputs], -1)

    def _rows(self, weight: jax.Array, x: jax.Array) -> jax.Array:
        in_dims = tuple(range(weight.ndim - self.num_inputs, weight.ndim))
        return lax.dot_general(x, weight, ((tuple(range(1, self.num_inputs + 1)), in_dims), ((), ())))

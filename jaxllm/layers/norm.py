"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.layers.linear import declare
from jaxllm.models.config import ModelConfig
from sharding import MeshAxes


class Norm(nnx.Module):
    """Normalises over the features, in float32, and scales (LayerNorm also shifts).

    Args:
        shape: of the features that are normalised together; one dimension, or several.
        kind: "rms", or "layer" which has a bias.
        feature_axis: which dimension holds the features, the last of them where they are several; -1, or
            -2 where tokens are the last.
        axes: logical axes of the features; None is never split.
        split_over: mesh axes that share the features, if any; for "rms" alone.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        kind: str,
        eps: float,
        dtype: jnp.dtype,
        feature_axis: int,
        axes: tuple[str | None, ...] | None = None,
        split_over: MeshAxes = None,
    ) -> None:
        axes = (None,) * len(shape) if axes is None else axes
        self.weight = declare(shape, axes, dtype)
        self.bias = declare(shape, axes, dtype) if kind == "layer" else None
        self.eps = eps
        self.split_over = split_over
        self.feature_axes = tuple(range(feature_axis - len(shape) + 1, feature_axis + 1))

    def __call__(self, x: jax.Array) -> jax.Array:
        axis = self.feature_axes
        centred = x.astype(jnp.float32)
        if self.bias is not None:
            centred = centred - jnp.mean(centred, axis=axis, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=axis, keepdims=True)
        if self.split_over is not None:
            variance = lax.pmean(variance, self.split_over)
        y = centred * lax.rsqrt(variance + self.eps) * self._along_features(self.weight[...])
        if self.bias is not None:
            y = y + self._along_features(self.bias[...])
        return y.astype(x.dtype)

    def _along_features(self, vector: jax.Array) -> jax.Array:
        vector = vector.astype(jnp.float32)
        return vector if self.feature_axes[-1] == -1 else vector[..., None]


def hidden_norm(config: ModelConfig, dtype: jnp.dtype, feature_major: bool) -> Norm:
    """A norm over the residual stream."""
    return Norm((config.hidden_size,), config.norm, config.norm_eps, dtype, -2 if feature_major else -1)

"""RMSNorm (Zhang and Sennrich 2019) and LayerNorm (Ba et al. 2016)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.layers.linear import declare
from jaxllm.models.config import ModelConfig


class Norm(nnx.Module):
    """Normalises over the features, in float32, and scales (LayerNorm also shifts).

    Args:
        size: features.
        kind: "rms", or "layer" which has a bias.
        feature_axis: which dimension holds the features; -1, or -2 where tokens are the last.
    """

    def __init__(self, size: int, kind: str, eps: float, dtype: jnp.dtype, feature_axis: int) -> None:
        self.weight = declare((size,), (None,), dtype)
        self.bias = declare((size,), (None,), dtype) if kind == "layer" else None
        self.eps = eps
        self.feature_axis = feature_axis

    def __call__(self, x: jax.Array) -> jax.Array:
        axis = self.feature_axis
        centred = x.astype(jnp.float32)
        if self.bias is not None:
            centred = centred - jnp.mean(centred, axis=axis, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=axis, keepdims=True)
        y = centred * lax.rsqrt(variance + self.eps) * self._along_features(self.weight[...])
        if self.bias is not None:
            y = y + self._along_features(self.bias[...])
        return y.astype(x.dtype)

    def _along_features(self, vector: jax.Array) -> jax.Array:
        vector = vector.astype(jnp.float32)
        return vector if self.feature_axis == -1 else vector[:, None]


def hidden_norm(config: ModelConfig, dtype: jnp.dtype, feature_major: bool) -> Norm:
    """A norm over the residual stream."""
    return Norm(config.hidden_size, config.norm, config.norm_eps, dtype, -2 if feature_major else -1)

"""What follows the hidden states in a pooling model: a dense layer, a classifier, or nothing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.layers.linear import Linear
from jaxllm.models.config import ModelConfig, Pooler


class PoolerHead(nnx.Module):
    """tanh(dense(x)) where the model has it, then the score of each label where there are any."""

    def __init__(self, config: ModelConfig, pooler: Pooler, dtype: jnp.dtype) -> None:
        def linear(width: int, *, bias: bool) -> Linear:
            hidden = (config.hidden_size,)
            return Linear((width,), hidden, (None,), ("embed",), bias=bias, dtype=dtype, feature_major=False)

        labels = len(pooler.labels)
        self.dense = linear(config.hidden_size, bias=True) if pooler.dense else None
        self.classifier = linear(labels, bias=pooler.classifier_bias) if labels else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32[rows, D] to float32[rows, D] or [rows, labels]."""
        if self.dense is not None:
            x = jnp.tanh(self.dense(x))
        return x if self.classifier is None else self.classifier(x)

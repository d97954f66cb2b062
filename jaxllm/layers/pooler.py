"""What follows the hidden states in a pooling model: dense layers, a classifier, or nothing."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.layers.linear import Linear
from jaxllm.models.config import ModelConfig, Pooler

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "identity": lambda x: x,
    "tanh": jnp.tanh,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
}


class PoolerHead(nnx.Module):
    """tanh(dense(x)) where the model has it, then the score of each label where there are any.

    Of a model that embeds, its projections instead.
    """

    def __init__(self, config: ModelConfig, pooler: Pooler, dtype: jnp.dtype) -> None:
        def linear(width: int, inputs: int, *, bias: bool) -> Linear:
            axes: tuple[tuple[str | None, ...], ...] = ((None,), ("embed",))
            return Linear((width,), (inputs,), *axes, bias=bias, dtype=dtype, feature_major=False)

        hidden, labels = config.hidden_size, len(pooler.labels)
        self.dense = linear(hidden, hidden, bias=True) if pooler.dense else None
        self.classifier = linear(labels, hidden, bias=pooler.classifier_bias) if labels else None
        self.activations = tuple(projection.activation for projection in pooler.projections)
        for i, projection in enumerate(pooler.projections):
            layer = linear(projection.out_features, projection.in_features, bias=projection.bias)
            setattr(self, f"projection_{i}", layer)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float32[rows, D] to float32[rows, width] or [rows, labels]."""
        if self.dense is not None:
            x = jnp.tanh(self.dense(x))
        for i, activation in enumerate(self.activations):
            x = _ACTIVATIONS[activation](getattr(self, f"projection_{i}")(x))
        return x if self.classifier is None else self.classifier(x)

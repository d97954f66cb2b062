"""The position-wise feed-forward network, gated (SwiGLU and kin, Shazeer 2020) or plain."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxllm.layers.linear import Linear
from jaxllm.models.config import Activation, ModelConfig
from sharding import MeshAxes

ACTIVATIONS: dict[Activation, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class MLP(nnx.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where the family is not gated.

    Args:
        inner: width between the products.
        split_over: mesh axes that share that width, if any.
    """

    def __init__(
        self,
        config: ModelConfig,
        inner: int,
        dtype: jnp.dtype,
        feature_major: bool,
        split_over: MeshAxes = None,
    ) -> None:
        hidden = config.hidden_size
        linear = functools.partial(Linear, bias=config.mlp_bias, dtype=dtype, feature_major=feature_major)
        if config.gated_mlp:
            self.gate_up = linear((2, inner), (hidden,), (None, "mlp"), ("embed",))
        else:
            self.up = linear((inner,), (hidden,), ("mlp",), ("embed",))
        self.down = linear((hidden,), (inner,), ("embed",), ("mlp",), sum_over=split_over)
        self.activation = config.activation
        self.gated = config.gated_mlp
        self.gate_axis = 0 if feature_major else 1

    def __call__(self, x: jax.Array) -> jax.Array:
        act = ACTIVATIONS[self.activation]
        if not self.gated:
            return self.down(act(self.up(x)))
        gate, up = jnp.moveaxis(self.gate_up(x), self.gate_axis, 0)
        return self.down(act(gate) * up)

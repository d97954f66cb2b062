"""Mixture of experts (Shazeer et al. 2017, section 2): each token takes the few that a router prefers.

No token is dropped and no expert has a capacity: the rows of a batch, one for each token and expert that
it takes, are sorted by expert, and a grouped product multiplies each run of them with its expert's weights.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.layers.linear import Linear, OneOfStack, apply_weight, declare
from jaxllm.layers.mlp import ACTIVATIONS, MLP
from jaxllm.models.config import ModelConfig, MoEConfig
from pallas_kernels.grouped_matmul import grouped_matmul
from sharding import MeshAxes


class GroupedLinear(nnx.Module):
    """y = x W_e for rows that are sorted by expert.

    The weight is [experts, in, out], or [parts, experts, in, out] where there are several such products.
    """

    def __init__(self, shape: tuple[int, ...], axes: tuple[str | None, ...], dtype: jnp.dtype) -> None:
        self.weight = declare(shape, axes, dtype)

    def __call__(self, rows: jax.Array, group_sizes: jax.Array, part: int = 0) -> jax.Array:
        """rows [R, in] and int32[experts], how many of them each expert has; returns [R, out]."""
        weight = self.weight.get_value()
        experts = group_sizes.shape[0]
        if isinstance(weight, OneOfStack):
            matrices = _matrices(weight.stack)
            per_layer = matrices.shape[0] // weight.stack.shape[0]
            first = weight.index * per_layer + part * experts
            return grouped_matmul(rows, matrices, group_sizes, first_group=first)

        def product(own: jax.Array, rows: jax.Array) -> jax.Array:
            return grouped_matmul(rows, _matrices(own), group_sizes, first_group=part * experts)

        return apply_weight(product, weight, rows)


def _matrices(weight: jax.Array) -> jax.Array:
    """[..., in, out] as one list of matrices: the last two dimensions are as they were, so nothing moves."""
    return weight.reshape(-1, *weight.shape[-2:])


class Experts(nnx.Module):
    """The gated MLPs of all experts.

    Args:
        whole: where devices share them, each has some of them whole, rather than a part of each.
    """

    def __init__(self, config: ModelConfig, moe: MoEConfig, dtype: jnp.dtype, *, whole: bool) -> None:
        experts, inner, hidden = moe.num_experts, moe.intermediate_size, config.hidden_size
        number, width = ("experts", None) if whole else (None, "mlp")
        self.gate_up = GroupedLinear((2, experts, hidden, inner), (None, number, "embed", width), dtype)
        self.down = GroupedLinear((experts, inner, hidden), (number, width, "embed"), dtype)
        self.activation = config.activation

    def __call__(self, rows: jax.Array, group_sizes: jax.Array) -> jax.Array:
        """rows [R, D], sorted by expert; returns [R, D]."""
        gate, up = (self.gate_up(rows, group_sizes, part) for part in range(2))
        return self.down(ACTIVATIONS[self.activation](gate) * up, group_sizes)


class MoE(nnx.Module):
    """The weighted sum of the experts that a token takes, and of a shared one where the family has it.

    Devices that share the experts all have all tokens, so that no token is sent anywhere: each device
    computes what its experts, or its part of every expert, have to say, and the sum over devices is all.

    Args:
        split_over: mesh axes that share the experts, if any.
        expert_parallel: by whole experts, rather than by the width of each.
    """

    def __init__(
        self,
        config: ModelConfig,
        moe: MoEConfig,
        dtype: jnp.dtype,
        feature_major: bool,
        split_over: MeshAxes = None,
        *,
        expert_parallel: bool = False,
    ) -> None:
        linear = functools.partial(Linear, bias=False, dtype=dtype, feature_major=feature_major)
        self.router = linear((moe.num_experts,), (config.hidden_size,), (None,), ("embed",))
        self.experts = Experts(config, moe, dtype, whole=expert_parallel)
        has_shared = moe.shared_intermediate_size > 0
        self.shared = MLP(config, moe.shared_intermediate_size, dtype, feature_major) if has_shared else None
        self.shared_gate = linear((1,), (config.hidden_size,), (None,), ("embed",)) if has_shared else None
        self.num_experts = moe.num_experts
        self.experts_per_token = moe.experts_per_token
        self.normalize_weights = moe.normalize_weights
        self.feature_major = feature_major
        self.split_over = split_over
        self.expert_parallel = expert_parallel

    def __call__(self, x: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """x: [T, D] or [D, T], of which only so many first tokens are real; returns the same shape."""
        out = self._routed(x, num_tokens)
        if self.shared is not None and self.shared_gate is not None:
            out = out + jax.nn.sigmoid(self.shared_gate(x)) * self.shared(x)
        return out if self.split_over is None else lax.psum(out, self.split_over)

    def _routed(self, x: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """What the experts of this device say, weighted and summed."""
        logits = self.router(x)
        tokens, logits = (x.T, logits.T) if self.feature_major else (x, logits)
        weights, chosen = self._route(logits)
        first, count = self._own_experts()
        is_own = (chosen >= first) & (chosen < first + count)
        is_own &= (jnp.arange(tokens.shape[0]) < num_tokens)[:, None]
        # Padding, and other devices' experts, go behind the last group, where no product is done.
        by_row = jnp.where(is_own, chosen - first, count).reshape(-1)
        order = jnp.argsort(by_row)
        group_sizes = jnp.zeros(count, jnp.int32).at[by_row].add(1, mode="drop")
        rows = self.experts(tokens[order // self.experts_per_token], group_sizes)
        # Summed token by token, in the order of its experts, whatever else is in the batch.
        mine = rows[jnp.argsort(order)].reshape(*chosen.shape, -1).astype(jnp.float32)
        mine = jnp.where(is_own[..., None], mine, 0)
        out = jnp.einsum("tk,tkd->td", weights, mine, precision=lax.Precision.HIGHEST).astype(x.dtype)
        return out.T if self.feature_major else out

    def _own_experts(self) -> tuple[jax.Array | int, int]:
        """The first one that this device computes, and how many."""
        if self.split_over is None or not self.expert_parallel:
            return 0, self.num_experts
        count = self.num_experts // lax.axis_size(self.split_over)
        return lax.axis_index(self.split_over) * count, count

    def _route(self, logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        """logits [T, experts] to weights float32[T, k] and numbers int32[T, k] of a token's experts."""
        probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        weights, chosen = lax.top_k(probabilities, self.experts_per_token)
        if self.normalize_weights:
            weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
        return weights, chosen

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

from jaxllm.layers.expert_exchange import block_size, exchange
from jaxllm.layers.linear import Linear, OneOfStack, apply_weight, declare
from jaxllm.layers.mlp import ACTIVATIONS, MLP
from jaxllm.layers.router import Router
from jaxllm.models.config import ModelConfig, MoEConfig
from pallas_kernels.grouped_matmul import grouped_matmul
from sharding import MeshAxes, names_of


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

    Devices of a replica that share the experts all have all its tokens, so that no token is sent among
    them: each computes what its experts, or its part of every expert, have to say, and the sum over devices
    is all. Where replicas share the experts as well, a token goes to the replicas that have its experts
    and back, from each device to the one in the same place of the other replica: what any device of a
    replica has to send or to hear, no other one of it has.

    Args:
        split_over: mesh axes of a replica's devices, which share the experts, if any.
        expert_parallel: by whole experts, rather than by the width of each.
        exchange_over: mesh axis of the replicas that share the experts, if there are several.
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
        exchange_over: str | None = None,
    ) -> None:
        linear = functools.partial(Linear, bias=False, dtype=dtype, feature_major=feature_major)
        self.router = Router(config.hidden_size, moe, dtype, feature_major)
        self.experts = Experts(config, moe, dtype, whole=expert_parallel)
        has_shared = moe.shared_intermediate_size > 0
        self.shared = MLP(config, moe.shared_intermediate_size, dtype, feature_major) if has_shared else None
        has_gate = has_shared and moe.shared_gate
        self.shared_gate = linear((1,), (config.hidden_size,), (None,), ("embed",)) if has_gate else None
        self.num_experts = moe.num_experts
        self.experts_per_token = moe.experts_per_token
        self.feature_major = feature_major
        self.split_over = split_over
        self.expert_parallel = expert_parallel
        self.exchange_over = exchange_over

    def __call__(self, x: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """x: [T, D] or [D, T], of which only so many first tokens are real; returns the same shape."""
        out = self._routed(x, num_tokens)
        if self.shared is not None:
            shared = self.shared(x)
            if self.shared_gate is not None:
                shared = jax.nn.sigmoid(self.shared_gate(x)) * shared
            out = out + shared
        return out if self.split_over is None else lax.psum(out, self.split_over)

    def _routed(self, x: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """What the experts of this device say, weighted and summed."""
        weights, chosen = self.router.choose(x)
        tokens = x.T if self.feature_major else x
        is_real = (jnp.arange(tokens.shape[0]) < num_tokens)[:, None]
        # Padding, and experts that others add, are nobody's.
        through = self._through_own if self.exchange_over is None else self._through_all
        mine, is_mine = through(tokens, chosen, is_real)
        # Summed token by token, in the order of its experts, whatever else is in the batch.
        mine = jnp.where(is_mine[..., None], mine.astype(jnp.float32), 0)
        out = jnp.einsum("tk,tkd->td", weights, mine, precision=lax.Precision.HIGHEST).astype(x.dtype)
        return out.T if self.feature_major else out

    def _through_own(
        self, tokens: jax.Array, chosen: jax.Array, is_real: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """[T, k, D] of this device's experts, and bool[T, k] of where these are."""
        index, count = self._own_experts()
        is_mine = is_real & (chosen // count == index)
        expert = jnp.where(is_mine, chosen - index * count, count).reshape(-1)
        return self._apply_experts(tokens, expert, count).reshape(*chosen.shape, -1), is_mine

    def _through_all(
        self, tokens: jax.Array, chosen: jax.Array, is_real: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """The same of the experts that the devices in this place of all replicas have."""
        assert self.exchange_over is not None
        replicas, devices, place = lax.axis_size(self.exchange_over), 1, jnp.int32(0)
        if self.split_over is not None:
            devices, place = lax.axis_size(self.split_over), lax.axis_index(self.split_over)
        count = self.num_experts // (replicas * devices)
        replica, at = jnp.divmod(chosen // count, devices)
        is_mine = is_real & (at == place)
        most = tokens.shape[0] * min(self.experts_per_token, count)
        mine = exchange(
            functools.partial(self._apply_experts, num_experts=count),
            tokens,
            jnp.where(is_mine, replica, replicas),
            chosen % count,
            num_experts=count,
            block=block_size(chosen.size, most, replicas * devices),
            most=most,
            axis=self.exchange_over,
            in_step=(self.exchange_over, *names_of(self.split_over)),
        )
        return mine, is_mine

    def _apply_experts(self, tokens: jax.Array, expert: jax.Array, num_experts: int) -> jax.Array:
        """[R, D]: each token through its experts, of which int32[R] has equally many for each, in order.

        No product is done where the expert is `num_experts`; there stands anything finite.
        """
        order = jnp.argsort(expert)
        group_sizes = jnp.zeros(num_experts, jnp.int32).at[expert].add(1, mode="drop")
        each = expert.shape[0] // tokens.shape[0]
        return self.experts(tokens[order // each], group_sizes)[jnp.argsort(order)]

    def _own_experts(self) -> tuple[jax.Array | int, int]:
        """This device's place among those that share the experts, and how many of them each has."""
        if self.split_over is None or not self.expert_parallel:
            return 0, self.num_experts
        return lax.axis_index(self.split_over), self.num_experts // lax.axis_size(self.split_over)

"""Which experts a token takes, and what they weigh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.layers.linear import Linear, declare
from jaxllm.models.config import MoEConfig

# A token that no expert scores is no reason to divide by zero.
_SMALLEST_SUM = 1e-20


class Router(Linear):
    """Scores every expert for every token, and takes the best; `MoEConfig` says how.

    Its bias, where it has one, is added to the scores and not to the logits, for the choice alone.
    """

    def __init__(self, hidden_size: int, moe: MoEConfig, dtype: jnp.dtype, feature_major: bool) -> None:
        super().__init__(
            (moe.num_experts,),
            (hidden_size,),
            (None,),
            ("embed",),
            bias=moe.selection_bias,
            dtype=dtype,
            feature_major=feature_major,
        )
        if moe.selection_bias:  # which experts are chosen may hang on its last digits
            self.bias = declare((moe.num_experts,), (None,), dtype, exact=True)
        self.moe = moe

    def choose(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [T, D] or [D, T] to weights float32[T, k] and numbers int32[T, k] of a token's experts."""
        moe, logits = self.moe, self.product(x)
        logits = (logits.T if self.feature_major else logits).astype(jnp.float32)
        score = jax.nn.sigmoid if moe.scoring == "sigmoid" else jax.nn.softmax
        scores = score(logits)
        preferred = scores if self.bias is None else scores + self.bias[...]
        if moe.groups_per_token < moe.num_groups:
            preferred = jnp.where(self._in_best_groups(preferred), preferred, -jnp.inf)
        _, chosen = lax.top_k(preferred, moe.experts_per_token)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        if moe.normalize_weights:
            weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + _SMALLEST_SUM)
        return weights * moe.weight_scale, chosen

    def _in_best_groups(self, preferred: jax.Array) -> jax.Array:
        """bool[T, experts]: whether an expert is in one of the groups that the token may take from."""
        moe = self.moe
        by_group = preferred.reshape(preferred.shape[0], moe.num_groups, -1)
        best, _ = lax.top_k(by_group, moe.group_experts)
        _, groups = lax.top_k(jnp.sum(best, axis=-1), moe.groups_per_token)
        is_best = jnp.any(jnp.arange(moe.num_groups) == groups[..., None], axis=1)
        return jnp.repeat(is_best, by_group.shape[2], axis=1)

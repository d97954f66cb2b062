"""What a call of the op asks for besides its operands, checked once and handed to the backend."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

_static = {"static": True}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionOptions:
    """Options of `ragged_paged_attention`, which explains each; plain numbers are static, arrays are not.

    Attributes:
        sinks, alibi_slopes: float32[num_heads] or None.
        k_scale, v_scale: float32[] or None.
        span_ends: int32[T] or None.
        tree_mask: bool[T, D] or None.
    """

    scale: float = field(metadata=_static)
    window: int | None = field(default=None, metadata=_static)
    soft_cap: float | None = field(default=None, metadata=_static)
    decode_only: bool = field(default=False, metadata=_static)
    return_lse: bool = field(default=False, metadata=_static)
    sinks: jax.Array | None = None
    alibi_slopes: jax.Array | None = None
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    span_ends: jax.Array | None = None
    tree_mask: jax.Array | None = None

    def cap(self, logits: jax.Array) -> jax.Array:
        """Squashes logits smoothly into (-soft_cap, soft_cap), as Gemma 2 does (section 2 of its report)."""
        if self.soft_cap is None:
            return logits
        return self.soft_cap * jnp.tanh(logits / self.soft_cap)

    def visible(
        self,
        key_position: jax.Array,
        query_position: jax.Array,
        span_end: jax.Array | int | None = None,
    ) -> jax.Array:
        """Whether a query may see a key, by position alone; the arguments broadcast. No tree mask.

        Args:
            span_end: the query's entry of `span_ends`, None where there are none.
        """
        seen = key_position <= query_position
        if span_end is not None:
            seen |= key_position < span_end
        return self.within_window(seen, key_position, query_position)

    def within_window(self, seen: jax.Array, key_position: jax.Array, query_position: jax.Array) -> jax.Array:
        """seen, less the keys that have left the query's window."""
        if self.window is None:
            return seen
        return seen & (key_position > query_position - self.window)

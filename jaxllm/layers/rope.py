"""Rotary position embedding (RoFormer, Su et al. 2021, section 3.2.2) with its long-context scalings."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.models.config import RopeConfig


def inverse_frequencies(rope: RopeConfig) -> np.ndarray:
    """float32[rotary_dim / 2] angles per position, for every scaling that does not depend on the length."""
    dim = rope.rotary_dim
    plain = 1.0 / rope.theta ** (np.arange(0, dim, 2, dtype=np.float64) / dim)
    match rope.scaling:
        case "linear":  # position interpolation, Chen et al. 2023, section 2.3
            scaled = plain / rope.factor
        case "llama3":
            # Waves that turn often within the training context stay, those that hardly turn are
            # interpolated, and between the two the change is gradual (Llama 3.1).
            turns = rope.original_max_position * plain / (2 * math.pi)
            keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
            keep = np.clip(keep, 0, 1)
            scaled = plain * (keep + (1 - keep) / rope.factor)
        case "yarn":  # Peng et al. 2023, section 3.2
            low = max(math.floor(_dimension_of(rope, rope.beta_fast)), 0)
            high = min(math.ceil(_dimension_of(rope, rope.beta_slow)), dim - 1)
            ramp = (np.arange(dim // 2) - low) / max(high - low, 0.001)
            ramp = np.clip(ramp, 0, 1)
            scaled = plain * (1 - ramp + ramp / rope.factor)
        case _:
            scaled = plain
    return scaled.astype(np.float32)


def _dimension_of(rope: RopeConfig, turns: float) -> float:
    """The (fractional) pair of dimensions that turns so often within the training context."""
    return (
        rope.rotary_dim
        * math.log(rope.original_max_position / (turns * 2 * math.pi))
        / (2 * math.log(rope.theta))
    )


def rotation_table(rope: RopeConfig, positions: jax.Array, lengths: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of a batch of tokens, computed once for all layers.

    Args:
        positions: int32[T].
        lengths: int32[T] length of the sequence when the token was first computed: that of the
            prompt, or position + 1 for an output token. Only `dynamic` scaling depends on it.

    Returns:
        (cos, sin), each float32[T, rotary_dim / 2].
    """
    if rope.scaling == "dynamic":  # NTK-aware, with the base growing with the length
        ratio = lengths.astype(jnp.float32) / rope.original_max_position
        growth = jnp.maximum(rope.factor * ratio - (rope.factor - 1), 1.0)
        dim = rope.rotary_dim
        base = rope.theta * growth ** (dim / (dim - 2))
        exponents = jnp.asarray(np.arange(0, dim, 2) / dim, jnp.float32)
        frequencies = base[:, None] ** -exponents
    else:
        frequencies = jnp.asarray(inverse_frequencies(rope))[None]
    angles = positions.astype(jnp.float32)[:, None] * frequencies
    # The barrier keeps XLA from computing the table again in every layer that reads it.
    return lax.optimization_barrier(
        (jnp.cos(angles) * rope.attention_factor, jnp.sin(angles) * rope.attention_factor)
    )


def rotate(
    x: jax.Array, table: tuple[jax.Array, jax.Array], feature_major: bool, *, interleaved: bool = False
) -> jax.Array:
    """Rotates the leading rotary_dim dimensions of heads, halves paired.

    x: [T, heads..., head_dim], or [heads..., head_dim, T] where `feature_major`. Where neighbours are
    paired, `interleaved`, they come out as halves, first ones first: in queries and keys alike, so that
    their products stay what they are.
    """
    if feature_major:
        cos, sin, axis = table[0].T, table[1].T, x.ndim - 2
    else:
        cos, sin = (t.reshape(t.shape[0], *[1] * (x.ndim - 2), t.shape[1]) for t in table)
        axis = x.ndim - 1
    half = table[0].shape[1]
    rotated, rest = jnp.split(x, [2 * half], axis=axis)
    if interleaved:
        first, second = (lax.slice_in_dim(rotated, i, None, stride=2, axis=axis) for i in range(2))
    else:
        first, second = jnp.split(rotated, 2, axis=axis)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=axis)
    return jnp.concatenate([rotated.astype(x.dtype), rest], axis=axis)

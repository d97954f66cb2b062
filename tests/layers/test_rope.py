"""Rotary embeddings against the angles written out in float64."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.layers.rope import inverse_frequencies, rotate, rotation_table
from jaxllm.models.config import RopeConfig
from tests.parity.reference_forward import inverse_frequencies as exact_frequencies

ROPES = {
    "none": RopeConfig(10000.0, 16),
    "odd pairs": RopeConfig(500000.0, 10),
    "linear": RopeConfig(10000.0, 8, "linear", factor=4.0),
    "llama3": RopeConfig(500.0, 16, "llama3", factor=8.0, original_max_position=32),
    "llama3, all long waves": RopeConfig(1e6, 16, "llama3", factor=8.0, original_max_position=4),
    "yarn": RopeConfig(100.0, 16, "yarn", factor=8.0, original_max_position=16, attention_factor=1.2),
    "yarn, no ramp": RopeConfig(
        10000.0, 16, "yarn", factor=4.0, original_max_position=64, beta_fast=2.0, beta_slow=2.0
    ),
    "dynamic": RopeConfig(10000.0, 16, "dynamic", factor=4.0, original_max_position=20),
}


@pytest.mark.parametrize("name", ROPES)
def test_table_is_that_of_the_definition(name: str) -> None:
    rope = ROPES[name]
    positions = np.array([0, 1, 2, 19, 20, 21, 63, 200, 1999, 7])
    # Of a prompt of 40 tokens, a short one, and output tokens beyond them.
    lengths = np.array([40, 40, 40, 40, 40, 40, 64, 201, 2000, 8])
    cos, sin = rotation_table(rope, jnp.asarray(positions), jnp.asarray(lengths))
    angles = np.stack(
        [p * exact_frequencies(rope, int(length)) for p, length in zip(positions, lengths, strict=True)]
    )
    # An angle of 2000 radians in float32 is off by 1e-4; its cosine by no more.
    atol = np.maximum(2e-6, 2e-7 * np.abs(angles)) * rope.attention_factor
    assert (np.abs(cos - np.cos(angles) * rope.attention_factor) <= atol).all()
    assert (np.abs(sin - np.sin(angles) * rope.attention_factor) <= atol).all()


@pytest.mark.parametrize("name", [name for name in ROPES if name != "dynamic"])
def test_frequencies_are_exact_to_float32(name: str) -> None:
    np.testing.assert_allclose(inverse_frequencies(ROPES[name]), exact_frequencies(ROPES[name], 1), rtol=2e-7)


def test_scalings_differ() -> None:
    """So that the tests above cannot pass by a scaling that never applies."""
    plain = inverse_frequencies(RopeConfig(500.0, 16))
    for name in ("linear", "llama3", "yarn"):
        scaled = inverse_frequencies(
            RopeConfig(500.0, 16, name, factor=8.0, original_max_position=32)  # type: ignore[arg-type]
        )
        assert not np.allclose(scaled, plain) and scaled[-1] == pytest.approx(plain[-1] / 8)


@pytest.mark.parametrize("rotary_dim", [4, 8])
def test_rotation_turns_pairs_of_halves_and_leaves_the_rest(rotary_dim: int) -> None:
    rng = np.random.default_rng(0)
    rope = RopeConfig(100.0, rotary_dim)
    positions = jnp.arange(5) * 3
    table = rotation_table(rope, positions, positions + 1)
    x = rng.normal(size=(5, 2, 3, 8)).astype(np.float32)
    half = rotary_dim // 2
    turns = np.exp(1j * np.asarray(positions)[:, None, None, None] * exact_frequencies(rope, 1))
    turned = (x[..., :half] + 1j * x[..., half:rotary_dim]) * turns
    exact = np.concatenate([turned.real, turned.imag, x[..., rotary_dim:]], axis=-1)
    np.testing.assert_allclose(rotate(jnp.asarray(x), table, False), exact, atol=1e-5)
    feature_major = rotate(jnp.moveaxis(jnp.asarray(x), 0, -1), table, True)
    np.testing.assert_allclose(jnp.moveaxis(feature_major, -1, 0), exact, atol=1e-5)
    assert rotate(jnp.asarray(x, jnp.bfloat16), table, False).dtype == jnp.bfloat16


def test_scores_depend_on_the_distance_alone() -> None:
    rope = ROPES["llama3"]
    q, k = jax.random.normal(jax.random.key(0), (2, 16))

    def score(at_query: int, at_key: int) -> float:
        positions = jnp.array([at_query, at_key])
        table = rotation_table(rope, positions, positions + 1)
        turned = rotate(jnp.stack([q, k])[:, None], table, False)
        return float(turned[0, 0] @ turned[1, 0])

    assert math.isclose(score(9, 4), score(105, 100), abs_tol=1e-4)
    assert not math.isclose(score(9, 4), score(9, 5), abs_tol=1e-3)

"""Mixture of experts: routing and the sum against float64, whatever the rest of the batch is."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.layers.moe import MoE
from jaxllm.layers.router import Router
from jaxllm.models.config import ModelConfig, MoEConfig

HIDDEN, INNER, SHARED = 11, 7, 5


def make_layer(
    experts: int, per_token: int, *, normalize: bool, shared: int = 0, feature_major: bool = False
) -> tuple[MoE, dict[str, np.ndarray]]:
    """A layer with random weights, and those by name."""
    moe = MoEConfig(experts, per_token, INNER, (0,), normalize, shared)
    config = ModelConfig(
        architecture="", vocab_size=2, hidden_size=HIDDEN, intermediate_size=0, num_layers=1, num_heads=1,
        num_kv_heads=1, head_dim=1, max_position_embeddings=1, moe=moe,
    )  # fmt: skip
    graph, state = nnx.split(MoE(config, moe, jnp.float32, feature_major))
    rng = np.random.default_rng(3)
    weights, flat = {}, []
    for path, param in nnx.to_flat_state(state):
        value = rng.standard_normal(param.get_value().shape, np.float32)
        weights[".".join(map(str, path)).removesuffix(".weight")] = value
        flat.append((path, param.replace(jnp.asarray(value))))
    return nnx.merge(graph, nnx.from_flat_state(flat)), weights


def make_router(moe: MoEConfig) -> tuple[Router, np.ndarray, np.ndarray]:
    """A router with random weights, those, and what is added to its scores."""
    graph, state = nnx.split(Router(HIDDEN, moe, jnp.float32, False))
    rng = np.random.default_rng(5)
    flat = [
        (path, param.replace(jnp.asarray(rng.standard_normal(param.get_value().shape, np.float32))))
        for path, param in nnx.to_flat_state(state)
    ]
    named = {str(path[-1]): np.asarray(param.get_value(), np.float64) for path, param in flat}
    router = nnx.merge(graph, nnx.from_flat_state(flat))
    return router, named["weight"], named.get("bias", np.zeros(moe.num_experts))


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("groups", "taken", "best", "bias"), [(4, 2, 1, False), (4, 3, 2, True), (6, 1, 2, True), (1, 1, 1, True)]
)
def test_a_router_with_groups(scoring: Any, groups: int, taken: int, best: int, bias: bool) -> None:
    """DeepSeek-V2 and V3, and what lies between: by brute force in float64, one token at a time."""
    moe = MoEConfig(
        12, 2, INNER, (0,), scoring == "sigmoid", shared_gate=False, scoring=scoring, selection_bias=bias,
        num_groups=groups, groups_per_token=taken, group_experts=best, weight_scale=1.7,
    )  # fmt: skip
    router, weight, added = make_router(moe)
    x = tokens(40)
    weights, chosen = (np.asarray(a) for a in jax.jit(router.choose)(x))
    for row, got, numbers in zip(x.astype(np.float64), weights, chosen, strict=True):
        logits = weight @ row
        scores = 1 / (1 + np.exp(-logits)) if scoring == "sigmoid" else np.exp(logits) / np.exp(logits).sum()
        size = 12 // groups
        judged = [sum(sorted((scores + added)[g * size :][:size])[-best:]) for g in range(groups)]
        allowed = sorted(range(groups), key=lambda g: -judged[g])[:taken]
        order = sorted((e for e in range(12) if e // size in allowed), key=lambda e: -(scores + added)[e])
        assert numbers.tolist() == order[:2]
        want = scores[order[:2]] / (scores[order[:2]].sum() if scoring == "sigmoid" else 1)
        np.testing.assert_allclose(got, 1.7 * want, rtol=1e-5)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def expected(x: np.ndarray, weights: dict[str, np.ndarray], per_token: int, *, normalize: bool) -> np.ndarray:
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    out = np.zeros(x.shape)
    for token, row in enumerate(x.astype(np.float64)):
        probabilities = np.exp(w["router"] @ row)
        probabilities /= probabilities.sum()
        chosen = sorted(range(len(probabilities)), key=lambda e: -probabilities[e])[:per_token]
        total = sum(probabilities[e] for e in chosen) if normalize else 1.0
        for e in chosen:
            gate, up = np.einsum("cdi,d->ci", w["experts.gate_up"][:, e], row)
            out[token] += probabilities[e] / total * ((silu(gate) * up) @ w["experts.down"][e])
        if "shared_gate" in w:
            gate, up = w["shared.gate_up"] @ row
            share = 1 / (1 + np.exp(-(w["shared_gate"] @ row)))
            out[token] += share * (w["shared.down"] @ (silu(gate) * up))
    return out


def run(layer: MoE, x: np.ndarray, num_tokens: int, feature_major: bool = False) -> np.ndarray:
    out = jax.jit(lambda x, n: layer(x, n))(x.T if feature_major else x, jnp.int32(num_tokens))
    return np.asarray(out.T if feature_major else out)


def tokens(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, HIDDEN), np.float32)


@pytest.mark.parametrize("feature_major", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("experts", "per_token", "count", "shared"),
    [(5, 2, 23, 0), (3, 3, 9, 0), (8, 1, 40, SHARED), (1, 1, 4, 0), (6, 4, 1, SHARED), (4, 2, 150, 0)],
)
def test_against_float64(
    experts: int, per_token: int, count: int, shared: int, normalize: bool, feature_major: bool
) -> None:
    options: dict[str, Any] = {"normalize": normalize, "shared": shared, "feature_major": feature_major}
    layer, weights = make_layer(experts, per_token, **options)
    x = tokens(count)
    exact = expected(x, weights, per_token, normalize=normalize)
    error = np.linalg.norm(run(layer, x, count, feature_major) - exact)
    assert error <= 1e-6 * np.linalg.norm(exact)  # three float32 products in a row


@pytest.mark.parametrize("num_tokens", [0, 1, 6])
def test_padding_takes_no_expert(num_tokens: int) -> None:
    """Whatever stands in its rows, and however much of it there is."""
    layer, weights = make_layer(5, 2, normalize=True)
    x = tokens(9)
    x[num_tokens:] = 1e30
    out = run(layer, x, num_tokens)
    exact = expected(x[:num_tokens], weights, 2, normalize=True)
    np.testing.assert_allclose(out[:num_tokens], exact, atol=1e-5, rtol=1e-5)
    assert not out[num_tokens:].any()


def test_all_tokens_to_the_same_experts() -> None:
    """No capacity: where every token wants the same two, every token gets them."""
    layer, weights = make_layer(6, 2, normalize=True)
    x = np.repeat(tokens(1), 64, axis=0)
    out = run(layer, x, 64)
    np.testing.assert_allclose(out, expected(x, weights, 2, normalize=True), atol=1e-5, rtol=1e-5)

"""The forward pass that the demo model is trained with: a plain Llama on whole sequences, in float32.

It shares nothing with the engine on purpose: `evaluate.py` compares both, and transformers' Llama,
on the weights that come out. Weights are kept `[in, out]` here and turned on export.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Parameters = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """Sizes of the demo model; the names are those of a Llama `config.json`."""

    vocab_size: int
    hidden_size: int = 160
    intermediate_size: int = 480
    num_hidden_layers: int = 6
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 2048


def initial_parameters(shape: Shape, seed: int) -> Parameters:
    """Random parameters: normal weights scaled by fan-in, and residual outputs that start at zero."""
    random = np.random.default_rng(seed)
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    hidden, inner = shape.hidden_size, shape.intermediate_size

    def normal(rows: int, columns: int) -> jax.Array:
        return jnp.asarray(random.normal(size=(rows, columns)) * rows**-0.5, jnp.float32)

    def layer() -> Parameters:
        return {
            "input_norm": jnp.ones(hidden),
            "q": normal(hidden, queries),
            "k": normal(hidden, keys),
            "v": normal(hidden, keys),
            "o": jnp.zeros((queries, hidden)),
            "post_norm": jnp.ones(hidden),
            "gate": normal(hidden, inner),
            "up": normal(hidden, inner),
            "down": jnp.zeros((inner, hidden)),
        }

    return {
        "embedding": jnp.asarray(random.normal(size=(shape.vocab_size, hidden)) * hidden**-0.5, jnp.float32),
        "layers": [layer() for _ in range(shape.num_hidden_layers)],
        "final_norm": jnp.ones(hidden),
    }


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotary embedding (Su et al. 2021) of `x[B, heads, T, D]` in the layout of Llama checkpoints."""
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def logits(
    parameters: Parameters, shape: Shape, token_ids: jax.Array, positions: jax.Array, segments: jax.Array
) -> jax.Array:
    """Next-token logits `[B, T, V]`; a token sees the earlier tokens of its own segment.

    Args:
        token_ids, positions, segments: `[B, T]`; documents packed in a row have different segments.
    """
    rows, length = token_ids.shape
    groups = shape.num_attention_heads // shape.num_key_value_heads
    frequencies = shape.rope_theta ** (-jnp.arange(0, shape.head_dim, 2) / shape.head_dim)
    angles = positions[:, None, :, None] * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    visible = (segments[:, :, None] == segments[:, None, :]) & jnp.tri(length, dtype=bool)
    bias = jnp.where(visible, 0.0, -1e30)[:, None]

    def by_head(projected: jax.Array) -> jax.Array:
        """`[B * T, heads * D]` to `[B, heads, T, D]`, the order that is fast on CPU."""
        return projected.reshape(rows, length, -1, shape.head_dim).transpose(0, 2, 1, 3)

    x = parameters["embedding"][token_ids].reshape(rows * length, -1)
    for layer in parameters["layers"]:
        h = rms_norm(x, layer["input_norm"], shape.rms_norm_eps)
        q = rotate(by_head(h @ layer["q"]), cos, sin) * shape.head_dim**-0.5
        k = jnp.repeat(rotate(by_head(h @ layer["k"]), cos, sin), groups, axis=1)
        v = jnp.repeat(by_head(h @ layer["v"]), groups, axis=1)
        weights = jax.nn.softmax(jnp.einsum("bhtd,bhsd->bhts", q, k) + bias, axis=-1)
        attended = jnp.einsum("bhts,bhsd->bhtd", weights, v)
        x = x + attended.transpose(0, 2, 1, 3).reshape(rows * length, -1) @ layer["o"]
        h = rms_norm(x, layer["post_norm"], shape.rms_norm_eps)
        x = x + (jax.nn.silu(h @ layer["gate"]) * (h @ layer["up"])) @ layer["down"]
    x = rms_norm(x, parameters["final_norm"], shape.rms_norm_eps)
    return (x @ parameters["embedding"].T).reshape(rows, length, -1)


def checkpoint_tensors(parameters: Parameters) -> dict[str, np.ndarray]:
    """The parameters under their names in a Llama checkpoint, products as `[out, in]`."""
    products = {
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    }
    norms = {"input_norm": "input_layernorm", "post_norm": "post_attention_layernorm"}
    tensors = {
        "model.embed_tokens.weight": np.asarray(parameters["embedding"]),
        "model.norm.weight": np.asarray(parameters["final_norm"]),
    }
    for index, layer in enumerate(parameters["layers"]):
        for ours, theirs in products.items():
            tensors[f"model.layers.{index}.{theirs}.weight"] = np.ascontiguousarray(np.asarray(layer[ours]).T)
        for ours, theirs in norms.items():
            tensors[f"model.layers.{index}.{theirs}.weight"] = np.asarray(layer[ours])
    return tensors

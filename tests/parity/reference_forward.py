"""The forward pass of a `ModelConfig`, written out plainly in numpy: no cache, no batch, no tricks.

It is the oracle for everything that reads our parameters: the translation of configs, the tables
of tensors and the loader (against Hugging Face), and the decoder (against this).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxllm.models.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig

_erf = np.vectorize(math.erf)
_ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: 0.5 * x * (1 + _erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def inverse_frequencies(rope: RopeConfig, length: int) -> np.ndarray:
    """Radians per position of each pair of dimensions.

    Only `dynamic` scaling depends on the length: that of the sequence when the token was computed.
    """
    dim = rope.rotary_dim
    theta = rope.theta
    if rope.scaling == "dynamic" and length > rope.original_max_position:
        ratio = rope.factor * length / rope.original_max_position - (rope.factor - 1)
        theta *= ratio ** (dim / (dim - 2))
    plain = 1.0 / theta ** (np.arange(0, dim, 2) / dim)
    if rope.scaling == "linear":
        return plain / rope.factor
    if rope.scaling == "llama3":
        turns = rope.original_max_position * plain / (2 * math.pi)
        span = rope.high_freq_factor - rope.low_freq_factor
        keep = np.clip((turns - rope.low_freq_factor) / span, 0, 1)
        return plain * (keep + (1 - keep) / rope.factor)
    if rope.scaling == "yarn":

        def dimension_of(turns: float) -> float:
            return dim * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(dimension_of(rope.beta_fast)), 0)
        high = min(math.ceil(dimension_of(rope.beta_slow)), dim - 1)
        interpolate = np.clip((np.arange(dim // 2) - low) / (high - low if high > low else 0.001), 0, 1)
        return plain * (1 - interpolate + interpolate / rope.factor)
    return plain


def forward(
    config: ModelConfig, parameters: Mapping[str, Any], token_ids: list[int], prompt_length: int | None = None
) -> np.ndarray:
    """Logits float64[tokens, vocabulary]; per-layer parameters are indexed by layer first.

    The first `prompt_length` tokens (None is all of them) are computed at once, the others one by
    one; with dynamic rope scaling it makes a difference.
    """
    p = {
        name: [np.asarray(x, np.float64) for x in value]
        if name.startswith("layers.")
        else np.asarray(value, np.float64)
        for name, value in parameters.items()
    }
    length = len(token_ids)
    positions = np.arange(length)

    def get(name: str, layer: int) -> Any:
        return p[name][layer] if name in p else 0.0

    def norm(x: np.ndarray, weight: np.ndarray, bias: Any, kind: str = config.norm) -> np.ndarray:
        if kind == "layer":
            x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * weight + bias

    def layer_norm(name: str, x: np.ndarray, layer: int) -> np.ndarray:
        return norm(x, p[f"{name}.weight"][layer], get(f"{name}.bias", layer))

    def rotate(x: np.ndarray) -> np.ndarray:
        """x [tokens, heads, head_dim], halves paired, or neighbours."""
        if config.rope is None:
            return x
        start = length if prompt_length is None else prompt_length
        angles = np.stack([i * inverse_frequencies(config.rope, max(start, i + 1)) for i in positions])
        cos = np.cos(angles)[:, None] * config.rope.attention_factor
        sin = np.sin(angles)[:, None] * config.rope.attention_factor
        if config.rope.interleaved:
            a, b = x[..., ::2], x[..., 1::2]
            return np.stack([a * cos - b * sin, b * cos + a * sin], -1).reshape(x.shape)
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def qk_norm(heads: np.ndarray, weight: np.ndarray) -> np.ndarray:
        """heads [tokens, ..., head_dim], each normalised by itself or all of a token's together."""
        if config.qk_norm == "head":
            return norm(heads, weight, 0.0, "rms")
        return norm(heads.reshape(length, -1), weight.reshape(-1), 0.0, "rms").reshape(heads.shape)

    def latent_attention(x: np.ndarray, mla: MLAConfig, layer: int) -> np.ndarray:
        """With keys and values of every head, as the paper has it before anything is absorbed."""

        def weight(name: str) -> np.ndarray:
            return p[f"layers.attention.{name}.weight"][layer]

        def rms(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale

        if mla.q_lora_rank:
            down = x @ weight("q_down").T + get("layers.attention.q_down.bias", layer)
            query = np.einsum("tj,awj->taw", rms(down, weight("q_norm")), weight("q_up"))
        else:
            query = np.einsum("td,awd->taw", x, weight("query"))
        down = x @ weight("kv_down").T + get("layers.attention.kv_down.bias", layer)
        latent, shared = np.split(down, [mla.kv_lora_rank], axis=-1)
        latent = rms(latent, weight("kv_norm"))
        key = np.einsum("tr,apr->tap", latent, weight("key_up"))
        value = np.einsum("tr,aur->tau", latent, weight("value_up"))
        query, turned = np.split(query, [mla.nope_head_dim], axis=-1)
        scores = np.einsum("tap,sap->ats", query, key)
        scores = scores + np.einsum("taw,sw->ats", rotate(turned), rotate(shared[:, None])[:, 0])
        scores = np.where(positions[None] <= positions[:, None], scores * config.attention_scale, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("ats,sau->tau", weights, value).reshape(length, -1)
        return mixed @ weight("output").T + get("layers.attention.output.bias", layer)

    def attention(x: np.ndarray, layer: int) -> np.ndarray:
        if config.mla is not None:
            return latent_attention(x, config.mla, layer)
        groups = config.queries_per_kv_head
        qkv = np.einsum("td,kghd->tkgh", x, p["layers.attention.qkv.weight"][layer])
        qkv = qkv + get("layers.attention.qkv.bias", layer)
        query, key, value = qkv[:, :, :groups], qkv[:, :, groups], qkv[:, :, groups + 1]
        if config.qk_norm:
            query, key = (
                qk_norm(heads, p[f"layers.attention.{name}_norm.weight"][layer])
                for name, heads in (("q", query), ("k", key))
            )
        if config.qkv_clip is not None:
            query, key, value = (x.clip(-config.qkv_clip, config.qkv_clip) for x in (query, key, value))
        heads = (length, config.num_kv_heads * groups, config.head_dim)
        query = rotate(query.reshape(heads)).reshape(query.shape)
        scores = np.einsum("tkgh,skh->kgts", query, rotate(key)) * config.attention_scale
        seen = positions[None] <= positions[:, None]
        window = config.layer_windows[layer]
        if window is not None:
            seen &= positions[None] > positions[:, None] - window
        scores = np.where(seen, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = np.einsum("kgts,skh->tkgh", weights, value)
        output = mixed.reshape(length, -1) @ p["layers.attention.output.weight"][layer].T
        return output + get("layers.attention.output.bias", layer)

    def gated(x: np.ndarray, gate_up: np.ndarray, down: np.ndarray, biases: Any = 0.0) -> np.ndarray:
        both = np.einsum("td,cfd->ctf", x, gate_up) + biases
        return _ACTIVATIONS[config.activation](both[0]) * both[1] @ down.T

    def mlp(x: np.ndarray, layer: int) -> np.ndarray:
        if config.moe is not None and layer in config.moe.layers:
            return experts(x, config.moe, config.moe.layers.index(layer))
        layer = config.mlp_layers.index(layer)
        down = p["layers.mlp.down.weight"][layer]
        if config.gated_mlp:
            biases = get("layers.mlp.gate_up.bias", layer)
            biases = biases[:, None] if isinstance(biases, np.ndarray) else biases
            out = gated(x, p["layers.mlp.gate_up.weight"][layer], down, biases)
        else:
            up = x @ p["layers.mlp.up.weight"][layer].T + get("layers.mlp.up.bias", layer)
            out = _ACTIVATIONS[config.activation](up) @ down.T
        return out + get("layers.mlp.down.bias", layer)

    def experts(x: np.ndarray, moe: MoEConfig, place: int) -> np.ndarray:
        def weight(name: str) -> np.ndarray:
            return p[f"layers.mlp.{name}.weight"][place]

        gate_up, down = weight("experts.gate_up"), weight("experts.down")
        out = np.zeros_like(x)
        for token, logits in enumerate(x @ weight("router").T):
            scores = np.exp(logits - np.logaddexp.reduce(logits))
            if moe.scoring == "sigmoid":
                scores = 1 / (1 + np.exp(-logits))
            preferred = scores + (p["layers.mlp.router.bias"][place] if moe.selection_bias else 0)
            groups = np.sort(preferred.reshape(moe.num_groups, -1), axis=1)[:, -moe.group_experts :].sum(1)
            out_of_groups = np.argsort(-groups, kind="stable")[moe.groups_per_token :]
            preferred.reshape(moe.num_groups, -1)[out_of_groups] = -np.inf
            chosen = np.argsort(-preferred, kind="stable")[: moe.experts_per_token]
            shares = scores[chosen] / (scores[chosen].sum() if moe.normalize_weights else 1)
            shares = shares * moe.weight_scale
            for expert, share in zip(chosen, shares, strict=True):
                up = gate_up[:, expert].transpose(0, 2, 1)
                out[token] += share * gated(x[token][None], up, down[expert].T)[0]
        if moe.shared_intermediate_size:
            shared = gated(x, weight("shared.gate_up"), weight("shared.down"))
            out += shared / (1 + np.exp(-(x @ weight("shared_gate").T))) if moe.shared_gate else shared
        return out

    x = p["embed.weight"][token_ids]
    if "embed_in.weight" in p:
        x = x @ p["embed_in.weight"].T
    if config.num_learned_positions:
        x = x + p["position_embed.weight"][positions + config.learned_position_offset]
    for layer in range(config.num_layers):
        for name, block in (("attention", attention), ("mlp", mlp)):
            if config.norm_placement == "pre":
                x = x + block(layer_norm(f"layers.{name}_norm", x, layer), layer)
            else:
                x = layer_norm(f"layers.{name}_norm", x + block(x, layer), layer)
    if config.final_norm:
        x = norm(x, p["final_norm.weight"], p.get("final_norm.bias", 0.0))
    if "embed_out.weight" in p:
        x = x @ p["embed_out.weight"].T
    return x @ p.get("lm_head.weight", p["embed.weight"]).T

"""What the attention ops are held against: attention over keys and values that have been gathered already.

`dense` is what plain JAX makes of it, two products and a softmax, with every option of the op; `cudnn` is
cuDNN's through JAX, `torch` PyTorch's scaled_dot_product_attention. They look up no pages and write none.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.attention import Dense, Passes, Setting, free_bytes

# Makes passes of what `Setting.dense` has gathered.
Peer = Callable[[list[Dense]], Passes]

PEERS = ("dense", "cudnn", "torch")
# Options of the op that only `dense` has.
_OF_DENSE = {"window", "soft_cap", "sinks", "alibi_slopes", "span_ends"}


def prepare_peer(peer: str, setting: Setting) -> Peer | str:
    """A peer, compiled for a setting, which need have no values; or why there is none."""
    parts = setting.dense()
    if peer == "dense":
        # Logits, their maximum's difference, weights: as many numbers as pairs, masked ones included.
        logits = max(math.prod(part.q.shape[:-1]) * part.layers[0][0].shape[1] for part in parts)
        if 3 * 4 * logits > free_bytes() // 2:
            return f"its logits of {4 * logits / 1e9:.1f} GB do not fit"
        return _jax_peer(plain_attention, setting, parts)
    if len(parts) > 1:
        return "its sequences differ in length"
    has = [name for name in sorted(_OF_DENSE) if setting.options.get(name) is not None]
    if has:
        return f"it has no {has[0]}"
    if peer == "torch":
        return _torch_peer(setting)
    if jax.default_backend() != "gpu" or parts[0].q.dtype == jnp.float32:
        return "cuDNN multiplies 16 bits, on a GPU"
    if parts[0].q.shape[-1] > 256:
        return "cuDNN takes heads of up to 256"
    return _jax_peer(_cudnn_attention, setting, parts)


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, options: dict[str, Any]) -> jax.Array:
    """Attention by its definition, softmax in float32: shapes as `Dense` has them.

    Returns [S, N, kv_heads, group, value_dim]. Spans, which reach no key ahead in a benchmark, are left out.
    """
    _, num_queries, kv_heads, group, _ = q.shape
    num_keys = k.shape[1]
    logits = jnp.einsum("snkgd,slkd->skgnl", q, k, preferred_element_type=jnp.float32) * options["scale"]
    soft_cap, window = options.get("soft_cap"), options.get("window")
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    distance = jnp.arange(num_keys) - (jnp.arange(num_queries) + num_keys - num_queries)[:, None]
    if options.get("alibi_slopes") is not None:
        logits += options["alibi_slopes"].reshape(kv_heads, group, 1, 1) * distance
    if num_queries > 1 or window is not None:
        seen = (distance <= 0) & (distance > -(window or num_keys))
        logits = jnp.where(seen, logits, -jnp.inf)
    if options.get("sinks") is not None:
        sinks = options["sinks"].reshape(kv_heads, group, 1, 1)
        sinks = jnp.broadcast_to(sinks, (*logits.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([logits, sinks], axis=-1))[..., :-1]
    else:
        weights = jax.nn.softmax(logits)
    return jnp.einsum("skgnl,slkd->snkgd", weights.astype(v.dtype), v)


def _cudnn_attention(q: jax.Array, k: jax.Array, v: jax.Array, options: dict[str, Any]) -> jax.Array:
    num_queries, num_keys = q.shape[1], k.shape[1]
    given: dict[str, Any] = {"is_causal": num_queries == num_keys, "scale": options["scale"]}
    if 1 < num_queries < num_keys:
        given["mask"] = jnp.tril(jnp.ones((1, 1, num_queries, num_keys), bool), num_keys - num_queries)
    heads = q.reshape(*q.shape[:2], -1, q.shape[-1])
    out = jax.nn.dot_product_attention(heads, k, v, implementation="cudnn", **given)
    return out.reshape(*q.shape[:-1], -1)


def _jax_peer(attend: Callable[..., jax.Array], setting: Setting, parts: list[Dense]) -> Peer:
    options = setting.options

    @jax.jit
    def run(parts):  # type: ignore[no-untyped-def]
        q, layers = [part.q for part in parts], [part.layers for part in parts]
        for layer in zip(*layers, strict=True):
            outs = [attend(x, k, v, options) for x, (k, v) in zip(q, layer, strict=True)]
            # A layer waits for the one before it, as in a model.
            q = [x + 1e-20 * out[..., :1].astype(x.dtype) for x, out in zip(q, outs, strict=True)]
        return q, outs

    compiled = run.lower(parts).compile()

    def bind(parts: list[Dense]) -> Passes:
        def passes(count: int) -> None:
            for _ in range(count):
                result = compiled(parts)
            jax.block_until_ready(result)

        return passes

    return bind


def _torch_peer(setting: Setting) -> Peer | str:
    try:
        import torch
        from torch.nn.attention.bias import causal_lower_right
    except ImportError:
        return "there is no torch"
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return "torch sees no GPU"

    def bind(parts: list[Dense]) -> Passes:
        [part] = parts
        heads = part.q.reshape(*part.q.shape[:2], -1, part.q.shape[-1])
        q = torch.from_dlpack(heads).transpose(1, 2)
        layers = [[torch.from_dlpack(x).transpose(1, 2) for x in layer] for layer in part.layers]
        num_queries, num_keys = q.shape[2], layers[0][0].shape[2]
        mask = causal_lower_right(num_queries, num_keys) if 1 < num_queries < num_keys else None
        given = {"attn_mask": mask, "is_causal": num_queries == num_keys > 1}
        given |= {"scale": setting.options["scale"], "enable_gqa": True}

        def passes(count: int) -> None:
            with torch.inference_mode():
                for _ in range(count):
                    for k, v in layers:
                        torch.nn.functional.scaled_dot_product_attention(q, k, v, **given)
            if q.is_cuda:
                torch.cuda.synchronize()

        return passes

    return bind

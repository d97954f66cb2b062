"""Multi-head latent attention (DeepSeek-V2, DeepSeek-AI 2024, section 2.1) over the paged cache, absorbed.

A head's key is W_UK c for a token's latent c, its value W_UV c. As q . (W_UK c) = (W_UK^T q) . c, queries are
taken to the latents rather than every cached latent to keys, and what comes out is taken to values.
"""

from __future__ import annotations

import functools
import logging
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.errors import ConfigError
from jaxllm.layers.attention import AttentionInputs, OneOfWindows, missing_for_triton
from jaxllm.layers.linear import Linear, apply_weight, declare
from jaxllm.layers.norm import Norm
from jaxllm.layers.rope import rotate
from jaxllm.models.config import MLAConfig, ModelConfig
from pallas_kernels.mla_ragged_paged_attention import (
    BACKENDS,
    TRITON_LIMITS,
    Backend,
    mla_ragged_paged_attention,
)
from sharding import MeshAxes

logger = logging.getLogger(__name__)

# Of the norms on queries and latents, whatever a config says of the others (as Hugging Face has it).
_NORM_EPS = 1e-6


def choose_latent_backend(
    requested: str | None, platform: str, mla: MLAConfig, compute_capability: float | None = None
) -> Backend:
    """The backend of latent attention to run, logged with the reason.

    Args:
        compute_capability: of an NVIDIA GPU, 8.0 for the first of Ampere.

    Raises:
        ConfigError: an unknown backend was asked for, one for another platform, or one without a kernel.
    """
    no_triton = _missing_for_triton(mla, compute_capability) if platform == "gpu" else None
    if requested is None:
        chosen: Backend = "xla"
        reason = "the portable one; latent attention has no other here"
        if platform == "tpu":
            chosen, reason = "tpu", "this is one"
        elif platform == "gpu":
            chosen, reason = "triton", "latent attention's own on GPUs"
            if no_triton is not None:
                chosen, reason = "xla", f"the portable one; triton {no_triton}"
        logger.info("attention backend: %s (%s)", chosen, reason)
        return chosen
    problem = None
    if requested not in BACKENDS:
        problem = "latent attention has no such backend"
    elif (needed := {"tpu": "tpu", "gpu": "gpu", "triton": "gpu"}.get(requested, platform)) != platform:
        problem = f"runs on a {needed.upper()}, and this process on {platform}"
    elif requested == "triton":
        problem = no_triton
    elif requested == "gpu" and jax.__version_info__ < (0, 11):
        problem = f"needs JAX 0.11 or newer (Python 3.12 or newer), and this is {jax.__version__}"
    if problem is not None:
        raise ConfigError(
            f"attention_backend={requested!r}: {problem}. Leave it out, or ask for one of "
            f"{', '.join(['reference', 'xla', *(['tpu'] if platform == 'tpu' else [])])}.",
            param="attention_backend",
        )
    logger.info("attention backend: %s (asked for)", requested)
    return cast(Backend, requested)


def _missing_for_triton(mla: MLAConfig, compute_capability: float | None) -> str | None:
    """What keeps the triton backend from running on a GPU, as the end of a sentence; None is nothing."""
    most_rank, most_rope = TRITON_LIMITS
    if mla.kv_lora_rank > most_rank or mla.rope_head_dim > most_rope:
        return (
            f"takes latents of up to {most_rank} and rotated keys of up to {most_rope}, and this model has "
            f"{mla.kv_lora_rank} and {mla.rope_head_dim}"
        )
    return missing_for_triton(compute_capability)


class HeadProducts(nnx.Module):
    """y_h = W_h x_h of each head h, or with its transpose.

    The weight is [heads, out, in].
    """

    def __init__(self, shape: tuple[int, int, int], dtype: jnp.dtype, feature_major: bool) -> None:
        self.weight = declare(shape, ("heads", None, None), dtype)
        self.feature_major = feature_major

    def __call__(self, x: jax.Array, *, transposed: bool = False) -> jax.Array:
        """x: [T, heads, in] or [heads, in, T]; returns [T, heads, out] or [heads, out, T]; or back."""
        product = functools.partial(self._product, contracted=1 if transposed else 2)
        return apply_weight(product, self.weight.get_value(), x)

    def _product(self, weight: jax.Array, x: jax.Array, contracted: int) -> jax.Array:
        if self.feature_major:
            return lax.dot_general(weight, x, (((contracted,), (1,)), ((0,), (0,))))
        return jnp.swapaxes(lax.dot_general(x, weight, (((2,), (contracted,)), ((1,), (0,)))), 0, 1)


class LatentAttention(nnx.Module):
    """Projects to queries and to a latent, rotates a part of both, attends in latents, and projects back.

    Args:
        split_over: mesh axes that share the heads, if any; every device has the whole latent.
    """

    def __init__(
        self,
        config: ModelConfig,
        mla: MLAConfig,
        dtype: jnp.dtype,
        feature_major: bool,
        backend: Backend,
        split_over: MeshAxes = None,
    ) -> None:
        heads, hidden, rank = config.num_heads, (config.hidden_size,), mla.q_lora_rank
        linear = functools.partial(Linear, dtype=dtype, feature_major=feature_major)
        feature_axis = -2 if feature_major else -1

        def norm(width: int) -> Norm:
            return Norm((width,), "rms", _NORM_EPS, dtype, feature_axis)

        query = ((heads, mla.nope_head_dim + mla.rope_head_dim), ("heads", None))
        if rank:
            self.q_down = linear((rank,), hidden, (None,), ("embed",), bias=config.qkv_bias)
            self.q_norm = norm(rank)
            self.q_up = linear(query[0], (rank,), query[1], (None,), bias=False)
        else:
            self.query = linear(query[0], hidden, query[1], ("embed",), bias=False)
        self.kv_down = linear((mla.width,), hidden, (None,), ("embed",), bias=config.qkv_bias)
        self.kv_norm = norm(mla.kv_lora_rank)
        self.key_up = HeadProducts((heads, mla.nope_head_dim, mla.kv_lora_rank), dtype, feature_major)
        self.value_up = HeadProducts((heads, mla.value_head_dim, mla.kv_lora_rank), dtype, feature_major)
        # The heads' features as one dimension, which a TPU need not lay out anew.
        values = (heads * mla.value_head_dim,)
        self.output = linear(
            hidden, values, ("embed",), ("heads",), bias=config.output_bias, sum_over=split_over
        )
        self.mla = mla
        self.scale = config.attention_scale
        self.interleaved = config.rope is not None and config.rope.interleaved
        self.feature_major = feature_major
        self.backend = backend

    def __call__(
        self,
        x: jax.Array,
        kv_pages: jax.Array,
        layer: jax.Array | int,
        inputs: AttentionInputs,
        *,
        window: int | OneOfWindows | None,
        decode_only: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """x: [T, D] or [D, T]; returns the same shape, and the cache with this layer's new entries."""
        assert window is None and inputs.rotation is not None and inputs.span_ends is None
        axis = -2 if self.feature_major else -1
        query = self.q_up(self.q_norm(self.q_down(x))) if self.mla.q_lora_rank else self.query(x)
        q_nope, q_rope = jnp.split(query, [self.mla.nope_head_dim], axis=axis)
        latent, k_rope = jnp.split(self.kv_down(x), [self.mla.kv_lora_rank], axis=axis)
        turn = functools.partial(
            rotate, table=inputs.rotation, feature_major=self.feature_major, interleaved=self.interleaved
        )
        parts = (self.key_up(q_nope, transposed=True), turn(q_rope), self.kv_norm(latent), turn(k_rope))
        q_latent, q_rope, latent, k_rope = (self._by_token(part) for part in parts)
        # However the cache is held (`cache_rows`), the op is given a view of rows.
        out, pages = mla_ragged_paged_attention(
            q_latent,
            q_rope,
            latent,
            k_rope,
            kv_pages.reshape(*kv_pages.shape[:3], -1),
            layer,
            inputs.page_table,
            inputs.seq_lens,
            inputs.query_starts,
            scale=self.scale,
            decode_only=decode_only,
            backend=self.backend,
        )
        values = self.value_up(jnp.moveaxis(out, 0, -1) if self.feature_major else out)
        flat = (-1, values.shape[-1]) if self.feature_major else (values.shape[0], -1)
        return self.output(values.reshape(flat)), pages.reshape(kv_pages.shape)

    def _by_token(self, part: jax.Array) -> jax.Array:
        """[T, ...] of what has its tokens where the layer's input has them."""
        return jnp.moveaxis(part, -1, 0) if self.feature_major else part

"""Which attention a model has, of keys and values or of latents, and how its cache is held."""

from __future__ import annotations

from typing import cast

import jax.numpy as jnp

from jaxllm.layers.attention import Attention
from jaxllm.layers.latent_attention import LatentAttention
from jaxllm.models.config import ModelConfig
from pallas_kernels import mla_ragged_paged_attention as latent_op
from pallas_kernels import ragged_paged_attention as op
from sharding import MeshAxes


def make_attention(
    config: ModelConfig, dtype: jnp.dtype, feature_major: bool, backend: op.Backend, split_over: MeshAxes
) -> Attention | LatentAttention:
    """The attention of a layer."""
    if config.mla is None:
        return Attention(config, dtype, feature_major, backend, split_over)
    # Of the backends, latents know all but the CPU's, which is never chosen for them.
    latent_backend = cast(latent_op.Backend, backend)
    return LatentAttention(config, config.mla, dtype, feature_major, latent_backend, split_over)


def cache_rows(config: ModelConfig, backend: op.Backend, shards: int) -> tuple[int, int]:
    """How one of so many shards best holds a token: (rows, numbers in a row) of a page slot."""
    if config.mla is None:
        return op.cache_rows(backend, config.num_kv_heads // shards, config.head_dim)
    rank, rope_dim = config.mla.kv_lora_rank, config.mla.rope_head_dim
    return latent_op.cache_rows(cast(latent_op.Backend, backend), rank, rope_dim)


def cache_bytes_per_token(config: ModelConfig, backend: op.Backend, dtype: jnp.dtype) -> int:
    """Bytes that a token takes of a layer's cache held so, what a TPU pads it with included."""
    if config.mla is None:
        return op.cache_bytes_per_token(backend, config.num_kv_heads, config.head_dim, dtype)
    rows, width = cache_rows(config, backend, 1)
    # One latent, which every device has that shares the heads.
    return config.num_kv_heads * rows * width * dtype.itemsize

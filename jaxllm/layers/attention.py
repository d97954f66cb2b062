"""Self-attention over the paged cache, and the choice of the kernel that computes it."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import logging
from dataclasses import dataclass
from typing import cast

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from jaxllm.errors import ConfigError
from jaxllm.layers.linear import Linear
from jaxllm.layers.norm import Norm
from jaxllm.layers.rope import rotate
from jaxllm.models.config import ModelConfig
from pallas_kernels.ragged_paged_attention import BACKENDS, Backend, cpu, ragged_paged_attention
from sharding import MeshAxes

logger = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionInputs:
    """What attention needs to know of a batch; the same for every layer.

    Attributes:
        page_table: int32[S, P].
        seq_lens: int32[S].
        query_starts: int32[S + 1].
        rotation: cosines and sines of each token, None where positions are learned.
        span_ends: int32[T], how far each token also sees ahead; None where attention is causal.
    """

    page_table: jax.Array
    seq_lens: jax.Array
    query_starts: jax.Array
    rotation: tuple[jax.Array, jax.Array] | None
    span_ends: jax.Array | None = None


@dataclass(frozen=True)
class OneOfWindows:
    """A layer's window among those that a model has, where it is only known on the device which one."""

    index: jax.Array
    windows: tuple[int | None, ...]


def choose_backend(
    requested: str | None,
    platform: str,
    head_dim: int,
    compute_capability: float | None = None,
    dtype: DTypeLike = "float32",
) -> Backend:
    """The attention backend to run, logged with the reason.

    Args:
        head_dim: of the model.
        compute_capability: of an NVIDIA GPU, 8.0 for the first of Ampere.
        dtype: of the KV cache.

    Raises:
        ConfigError: an unknown backend was asked for, or one that cannot run here.
    """
    if requested is None:
        chosen, reason = _best_backend(platform, head_dim, compute_capability, dtype)
        logger.info("attention backend: %s (%s)", chosen, reason)
        return chosen
    if requested not in BACKENDS:
        raise ConfigError(
            f"attention_backend={requested!r}; there are {', '.join(BACKENDS)}", param="attention_backend"
        )
    needed = {"cpu": "cpu", "tpu": "tpu", "gpu": "gpu", "triton": "gpu"}.get(requested, platform)
    if needed != platform:
        raise ConfigError(
            f"attention_backend={requested!r} runs on a {needed.upper()}, and this process on {platform}; "
            "leave it out, or ask for xla.",
            param="attention_backend",
        )
    if requested == "gpu" and jax.__version_info__ < (0, 11):
        raise ConfigError(
            f"attention_backend='gpu' needs JAX 0.11 or newer, and this is {jax.__version__}; upgrade it "
            "(Python 3.12 or newer), or ask for xla.",
            param="attention_backend",
        )
    if requested == "triton" and (missing := missing_for_triton(compute_capability, head_dim)):
        raise ConfigError(f"attention_backend='triton' {missing}; or ask for xla.", param="attention_backend")
    if requested == "cpu" and (missing := cpu.missing(dtype)):
        raise ConfigError(f"attention_backend='cpu' {missing}; or ask for xla.", param="attention_backend")
    logger.info("attention backend: %s (asked for)", requested)
    return cast(Backend, requested)


def _best_backend(
    platform: str, head_dim: int, compute_capability: float | None, dtype: DTypeLike
) -> tuple[Backend, str]:
    """A backend, and why it is chosen."""
    if platform == "cpu":
        missing = cpu.missing(dtype)
        if missing is None:
            return "cpu", "kernels for decodes and for prefills, compiled by numba"
        return "xla", f"the portable one; cpu {missing}"
    if platform == "tpu":
        # The portable one would lay out the whole cache anew in every layer.
        return "tpu", "this is one; attention_backend='xla' is the portable one"
    if platform == "gpu" and compute_capability is not None and compute_capability < 9.0:
        missing = missing_for_triton(compute_capability, head_dim)
        if missing is None:
            return "triton", f"this GPU is older than Hopper, its compute capability {compute_capability}"
        return "xla", f"the portable one; triton {missing}"
    return "xla", "the portable one; others run where they are asked for"


def missing_for_triton(compute_capability: float | None, head_dim: int = 0) -> str | None:
    """What keeps the triton backend from running on a GPU, as the end of a sentence; None is nothing."""
    if compute_capability is None or compute_capability < 8.0:
        found = "is of none" if compute_capability is None else f"has {compute_capability}"
        return f"needs an NVIDIA GPU of compute capability 8.0 (Ampere) or newer, and this one {found}"
    if head_dim > 256:
        return f"takes a head_dim of up to 256, and this model has {head_dim}"
    if importlib.util.find_spec("jax_triton") is None:
        return "needs jax-triton: pip install 'jaxllm[cuda]', with Python 3.12 or newer"
    if jax.__version_info__ >= (0, 12) and importlib.metadata.version("jax-triton") == "0.4.1":
        # Whose rule for leaving out what is unused is called otherwise there.
        return (
            f"needs JAX 0.11 beside jax-triton 0.4.1, and this is {jax.__version__}: pip install 'jax<0.12'"
        )
    return None


class Attention(nnx.Module):
    """Projects to queries, keys and values, rotates them, attends, and projects back.

    The fused weight holds, for each key-value head, its queries, its key and its value, so that
    splitting it by key-value heads gives every shard what it needs.

    Args:
        split_over: mesh axes that share the heads, if any.
    """

    def __init__(
        self,
        config: ModelConfig,
        dtype: jnp.dtype,
        feature_major: bool,
        backend: Backend,
        split_over: MeshAxes = None,
    ) -> None:
        heads, group, head_dim = config.num_kv_heads, config.queries_per_kv_head, config.head_dim
        self.qkv = Linear(
            (heads, group + 2, head_dim),
            (config.hidden_size,),
            ("kv_heads", None, None),
            ("embed",),
            bias=config.qkv_bias,
            dtype=dtype,
            feature_major=feature_major,
        )
        # The heads' features as one dimension: a TPU lays out anew, in every step, what has few of them.
        self.output = Linear(
            (config.hidden_size,),
            (heads * group * head_dim,),
            ("embed",),
            ("kv_heads",),
            bias=config.output_bias,
            dtype=dtype,
            feature_major=feature_major,
            sum_over=split_over,
        )
        if config.qk_norm is not None:
            per_head = config.qk_norm == "head"
            feature_axis = -2 if feature_major else -1

            def norm(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> Norm:
                if per_head:
                    return Norm(shape[-1:], "rms", config.norm_eps, dtype, feature_axis)
                return Norm(shape, "rms", config.norm_eps, dtype, feature_axis, axes, split_over)

            self.q_norm = norm((heads, group, head_dim), ("kv_heads", None, None))
            self.k_norm = norm((heads, head_dim), ("kv_heads", None))
        self.qk_norm = config.qk_norm is not None
        self.qkv_clip = config.qkv_clip
        self.group = group
        self.scale = config.attention_scale
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
        qkv = self.qkv(x)  # [T, kv_heads, group + 2, head_dim], or with T last
        head = (slice(None),) * (1 if self.feature_major else 2)
        q, k, v = qkv[*head, : self.group], qkv[*head, self.group], qkv[*head, self.group + 1]
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.qkv_clip is not None:
            q, k, v = (jnp.clip(heads, -self.qkv_clip, self.qkv_clip) for heads in (q, k, v))
        if inputs.rotation is not None:
            q, k = (rotate(heads, inputs.rotation, self.feature_major) for heads in (q, k))
        if self.feature_major:
            q, k, v = (jnp.moveaxis(heads, -1, 0) for heads in (q, k, v))
        # However the cache is held (`cache_rows`), the op is given a view of heads.
        pages = kv_pages.reshape(*kv_pages.shape[:3], 2 * k.shape[1], k.shape[2])

        def attend(window: int | None, pages: jax.Array) -> tuple[jax.Array, ...]:
            return ragged_paged_attention(
                q.reshape(q.shape[0], -1, q.shape[-1]),
                k,
                v,
                pages,
                layer,
                inputs.page_table,
                inputs.seq_lens,
                inputs.query_starts,
                scale=self.scale,
                window=window,
                span_ends=inputs.span_ends,
                decode_only=decode_only,
                backend=self.backend,
            )

        if isinstance(window, OneOfWindows):
            kinds = [functools.partial(attend, one) for one in window.windows]
            out, pages = lax.switch(window.index, kinds, pages)
        else:
            out, pages = attend(window, pages)
        out = out.reshape(out.shape[0], -1)
        return self.output(out.T if self.feature_major else out), pages.reshape(kv_pages.shape)

"""What a decoder is made of: layers, and around them the trunk of embeddings, last norm and output head."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from jaxllm.layers.attention import AttentionInputs, OneOfWindows
from jaxllm.layers.embedding import Embedding
from jaxllm.layers.linear import Linear
from jaxllm.layers.mlp import MLP
from jaxllm.layers.moe import MoE
from jaxllm.layers.norm import hidden_norm
from jaxllm.layers.pooler import PoolerHead
from jaxllm.models.attention_kind import make_attention
from jaxllm.models.config import ModelConfig
from pallas_kernels.ragged_paged_attention import Backend
from sharding import DEFAULT_RULES, MeshAxes, names_of


@dataclass(frozen=True, slots=True)
class DecoderForm:
    """How the decoder is laid out for a platform; never changes what it computes.

    Attributes:
        dtype: of parameters and activations.
        feature_major: activations are [features, T] rather than [T, features].
        stack_layers: the parameters of all layers are one array, sliced by a scan, rather than a list
            of arrays, one of which each turn of a loop picks.
        attention_backend: which kernel attends.
        mesh: the devices that share the model; None is one device.
        expert_parallel: each device has whole experts, rather than a part of each expert.
    """

    dtype: Any
    feature_major: bool
    stack_layers: bool
    attention_backend: Backend
    mesh: Mesh | AbstractMesh | None = None
    expert_parallel: bool = False

    def mesh_axes(self, logical: str) -> MeshAxes:
        """The mesh axes that share a logical axis; None where they are of one device."""
        axes = DEFAULT_RULES[logical]
        return axes if math.prod(map(self.axis_size, names_of(axes))) > 1 else None

    def axis_size(self, mesh_axis: str) -> int:
        """The size of a mesh axis."""
        return 1 if self.mesh is None else self.mesh.shape[mesh_axis]

    @property
    def num_stages(self) -> int:
        """Of the pipeline that the layers form; 1 is none."""
        return self.axis_size("pipe")


class DecoderLayer(nnx.Module):
    """Attention, and an MLP or experts, each with a norm and a residual sum."""

    def __init__(self, config: ModelConfig, form: DecoderForm, *, has_experts: bool) -> None:
        self.attention_norm = hidden_norm(config, form.dtype, form.feature_major)
        split = form.mesh_axes("kv_heads")
        self.attention = make_attention(config, form.dtype, form.feature_major, form.attention_backend, split)
        self.mlp_norm = hidden_norm(config, form.dtype, form.feature_major)
        self.mlp: MLP | MoE
        split = form.mesh_axes("mlp")
        if has_experts and config.moe is not None:
            self.mlp = MoE(
                config,
                config.moe,
                form.dtype,
                form.feature_major,
                split,
                expert_parallel=form.expert_parallel,
                exchange_over="data" if form.expert_parallel and form.axis_size("data") > 1 else None,
            )
        else:
            self.mlp = MLP(config, config.intermediate_size, form.dtype, form.feature_major, split)
        self.pre_norm = config.norm_placement == "pre"

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
        x, kv_pages = self.attend(x, kv_pages, layer, inputs, window=window, decode_only=decode_only)
        return self.feed_forward(x, inputs), kv_pages

    def attend(
        self,
        x: jax.Array,
        kv_pages: jax.Array,
        layer: jax.Array | int,
        inputs: AttentionInputs,
        *,
        window: int | OneOfWindows | None,
        decode_only: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """The first half of the layer, which is alike in layers with experts and without."""
        attend = functools.partial(self.attention, window=window, decode_only=decode_only)
        if self.pre_norm:
            mixed, kv_pages = attend(self.attention_norm(x), kv_pages, layer, inputs)
            return x + mixed, kv_pages
        mixed, kv_pages = attend(x, kv_pages, layer, inputs)
        return self.attention_norm(x + mixed), kv_pages

    def feed_forward(self, x: jax.Array, inputs: AttentionInputs) -> jax.Array:
        """The second half."""
        mlp: Callable[[jax.Array], jax.Array] = self.mlp  # type: ignore[assignment]
        if isinstance(self.mlp, MoE):
            mlp = functools.partial(self.mlp, num_tokens=inputs.query_starts[-1])
        return x + mlp(self.mlp_norm(x)) if self.pre_norm else self.mlp_norm(x + mlp(x))


class Trunk(nnx.Module):
    """What a decoder has besides its layers: embeddings, the last norm, the output head."""

    def __init__(self, config: ModelConfig, form: DecoderForm) -> None:
        width, hidden = config.embedding_dim or config.hidden_size, config.hidden_size
        linear = functools.partial(Linear, bias=False, dtype=form.dtype, feature_major=form.feature_major)
        vocabulary = functools.partial(
            Embedding, config.vocab_size, width, "vocab", form.dtype, form.mesh_axes("vocab")
        )
        self.embed = vocabulary()
        self.position_embed = (
            Embedding(config.num_learned_positions, hidden, None, form.dtype)
            if config.num_learned_positions
            else None
        )
        types = config.num_token_types
        self.type_embed = Embedding(types, hidden, None, form.dtype) if types else None
        self.embed_norm = (
            hidden_norm(config, form.dtype, form.feature_major) if config.embedding_norm else None
        )
        projected = width != hidden
        self.embed_in = linear((hidden,), (width,), ("embed",), (None,)) if projected else None
        self.embed_out = linear((width,), (hidden,), (None,), ("embed",)) if projected else None
        self.final_norm = hidden_norm(config, form.dtype, form.feature_major) if config.final_norm else None
        headless = config.tie_word_embeddings or config.pooler is not None
        self.lm_head = None if headless else vocabulary()
        self.pooler = None if config.pooler is None else PoolerHead(config, config.pooler, form.dtype)
        self.feature_major = form.feature_major
        self.position_offset = config.learned_position_offset

    def embed_tokens(
        self, token_ids: jax.Array, positions: jax.Array, token_types: jax.Array | None
    ) -> jax.Array:
        x = self.embed(token_ids, self.feature_major)
        if self.embed_in is not None:
            x = self.embed_in(x)
        if self.position_embed is not None:
            x = x + self.position_embed(positions + self.position_offset, self.feature_major)
        if self.type_embed is not None:
            types = jnp.zeros_like(token_ids) if token_types is None else token_types
            x = x + self.type_embed(types, self.feature_major)
        return x if self.embed_norm is None else self.embed_norm(x)

    def finish(self, x: jax.Array) -> jax.Array:
        """What follows the last layer and precedes any head."""
        if self.final_norm is not None:
            x = self.final_norm(x)
        return x if self.embed_out is None else self.embed_out(x)

    def logits(self, x: jax.Array, vocab_size: int) -> jax.Array:
        """Hidden states of some rows to float32 logits [rows, vocabulary], -inf from vocab_size on."""
        x = self.finish(x)
        head = self.embed if self.lm_head is None else self.lm_head
        return head.logits(x, self.feature_major, vocab_size)

"""The one decoder: every family whose data flow is that of a pre- or post-norm transformer."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxllm.layers.attention import Attention, AttentionInputs
from jaxllm.layers.embedding import Embedding
from jaxllm.layers.linear import Linear, OneOfLayers
from jaxllm.layers.mlp import MLP
from jaxllm.layers.norm import hidden_norm
from jaxllm.layers.pooler import PoolerHead
from jaxllm.layers.rope import rotation_table
from jaxllm.models.config import ModelConfig
from jaxllm.models.parameters import ParameterSpec
from pallas_kernels.ragged_paged_attention import Backend


@dataclass(frozen=True, slots=True)
class DecoderForm:
    """How the decoder is laid out for a platform; never changes what it computes.

    Attributes:
        dtype: of parameters and activations.
        feature_major: activations are [features, T] rather than [T, features].
        stack_layers: the parameters of all layers are one array, sliced by a scan, rather than a list
            of arrays, one of which each turn of a loop picks.
        attention_backend: which kernel attends.
    """

    dtype: Any
    feature_major: bool
    stack_layers: bool
    attention_backend: Backend


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TokenInputs:
    """A packed batch as the decoder sees it.

    Attributes:
        token_ids: int32[T].
        positions: int32[T].
        rope_lengths: int32[T], see `rotation_table`.
        page_table, seq_lens, query_starts: see `ragged_paged_attention`.
        token_types: int32[T], of models that have them; None is type 0 throughout.
    """

    token_ids: jax.Array
    positions: jax.Array
    rope_lengths: jax.Array
    page_table: jax.Array
    seq_lens: jax.Array
    query_starts: jax.Array
    token_types: jax.Array | None = None


class DecoderLayer(nnx.Module):
    """Attention and MLP, each with a norm and a residual sum."""

    def __init__(self, config: ModelConfig, form: DecoderForm) -> None:
        self.attention_norm = hidden_norm(config, form.dtype, form.feature_major)
        self.attention = Attention(config, form.dtype, form.feature_major, form.attention_backend)
        self.mlp_norm = hidden_norm(config, form.dtype, form.feature_major)
        self.mlp = MLP(config, form.dtype, form.feature_major)
        self.pre_norm = config.norm_placement == "pre"

    def __call__(
        self,
        x: jax.Array,
        kv_pages: jax.Array,
        layer: jax.Array | int,
        inputs: AttentionInputs,
        *,
        window: int | None,
        decode_only: bool,
    ) -> tuple[jax.Array, jax.Array]:
        attend = functools.partial(self.attention, window=window, decode_only=decode_only)
        if self.pre_norm:
            mixed, kv_pages = attend(self.attention_norm(x), kv_pages, layer, inputs)
            x = x + mixed
            return x + self.mlp(self.mlp_norm(x)), kv_pages
        mixed, kv_pages = attend(x, kv_pages, layer, inputs)
        x = self.attention_norm(x + mixed)
        return self.mlp_norm(x + self.mlp(x)), kv_pages


class Trunk(nnx.Module):
    """What a decoder has besides its layers: embeddings, the last norm, the output head."""

    def __init__(self, config: ModelConfig, form: DecoderForm) -> None:
        width, hidden = config.embedding_dim or config.hidden_size, config.hidden_size
        linear = functools.partial(Linear, bias=False, dtype=form.dtype, feature_major=form.feature_major)
        self.embed = Embedding(config.vocab_size, width, "vocab", form.dtype)
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
        self.lm_head = None if headless else Embedding(config.vocab_size, width, "vocab", form.dtype)
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

    def logits(self, x: jax.Array) -> jax.Array:
        """Hidden states of some rows to float32 logits [rows, vocabulary]."""
        x = self.finish(x)
        head = self.embed if self.lm_head is None else self.lm_head
        return head.logits(x, self.feature_major)


class Decoder:
    """A model's graph, split from its parameters: pure functions of the parameters it is given.

    Parameters are a dict by name, as `parameter_specs` lists them. Those of layers ("layers.*") are
    stacked [layers, ...] where `form.stack_layers`, else a list of arrays.
    """

    def __init__(self, config: ModelConfig, form: DecoderForm) -> None:
        self.config = config
        self.form = form
        self._trunk, self._trunk_params = _split(Trunk(config, form))
        self._layer, self._layer_params = _split(DecoderLayer(config, form))

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """Every parameter: name to shape and logical axes."""
        specs = {name: ParameterSpec(p.get_value().shape, p.logical_axes) for name, p in self._trunk_params}
        for name, p in self._layer_params:
            shape, axes = p.get_value().shape, p.logical_axes
            specs[f"layers.{name}"] = ParameterSpec(shape, axes, self.config.num_layers)
        return specs

    def __call__(
        self, params: dict[str, Any], kv_pages: jax.Array, inputs: TokenInputs, *, decode_only: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden states after the last layer, [T, D] or [D, T], and the cache with the new tokens."""
        trunk = self._trunk_of(params)
        rope = self.config.rope
        attention_inputs = AttentionInputs(
            inputs.page_table,
            inputs.seq_lens,
            inputs.query_starts,
            None if rope is None else rotation_table(rope, inputs.positions, inputs.rope_lengths),
            self._span_ends(inputs) if self.config.bidirectional and not decode_only else None,
        )
        x = trunk.embed_tokens(inputs.token_ids, inputs.positions, inputs.token_types)
        for first, last, window in _groups_of_like_layers(self.config):
            run = self._scan_layers if self.form.stack_layers else self._loop_over_layers
            x, kv_pages = run(params, x, kv_pages, attention_inputs, first, last, window, decode_only)
        return x, kv_pages

    def logits(self, params: dict[str, Any], hidden: jax.Array, rows: jax.Array) -> jax.Array:
        """float32[rows, vocabulary] for the tokens at `rows` int32[rows] of the hidden states."""
        return self._trunk_of(params).logits(jnp.take(hidden, rows, axis=1 if self.form.feature_major else 0))

    def features(self, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
        """float32[T, D] of every token, as Hugging Face's `last_hidden_state`."""
        x = self._trunk_of(params).finish(hidden)
        return (x.T if self.form.feature_major else x).astype(jnp.float32)

    def pool(self, params: dict[str, Any], x: jax.Array) -> jax.Array:
        """Features float32[rows, D] through the pooler's layers: float32[rows, D or labels]."""
        return self._trunk_of(params).pooler(x)  # type: ignore[misc]

    @staticmethod
    def _span_ends(inputs: TokenInputs) -> jax.Array:
        """int32[T]: for each token the length of its sequence, all of which it sees."""
        rows = jnp.arange(inputs.token_ids.shape[0])
        sequence = jnp.sum(inputs.query_starts[None, 1:] <= rows[:, None], axis=1)
        return inputs.seq_lens[jnp.minimum(sequence, inputs.seq_lens.shape[0] - 1)]

    def _trunk_of(self, params: dict[str, Any]) -> Trunk:
        return _merge(self._trunk, self._trunk_params, params)

    def _loop_over_layers(
        self,
        params: dict[str, Any],
        x: jax.Array,
        kv_pages: jax.Array,
        inputs: AttentionInputs,
        first: int,
        last: int,
        window: int | None,
        decode_only: bool,
    ) -> tuple[jax.Array, jax.Array]:
        # Biases and scales are small enough to stack and slice; matrices stay where they are.
        by_layer = {name: params[f"layers.{name}"] for name, _ in self._layer_params}
        matrices = {n: a for n, a in by_layer.items() if n.endswith(".weight") and a[0].ndim > 1}
        small = {n: jnp.stack(a) for n, a in by_layer.items() if n not in matrices}

        def body(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            own: dict[str, Any] = {name: OneOfLayers(index, arrays) for name, arrays in matrices.items()}
            own |= {name: stack[index] for name, stack in small.items()}
            return self._run_layer(own, *carry, index, inputs, window=window, decode_only=decode_only)

        return lax.fori_loop(first, last, body, (x, kv_pages))

    def _run_layer(
        self,
        params: dict[str, Any],
        x: jax.Array,
        kv_pages: jax.Array,
        index: jax.Array,
        inputs: AttentionInputs,
        *,
        window: int | None,
        decode_only: bool,
    ) -> tuple[jax.Array, jax.Array]:
        layer = _merge(self._layer, self._layer_params, params)
        return layer(x, kv_pages, index, inputs, window=window, decode_only=decode_only)  # type: ignore[no-any-return]

    def _scan_layers(
        self,
        params: dict[str, Any],
        x: jax.Array,
        kv_pages: jax.Array,
        inputs: AttentionInputs,
        first: int,
        last: int,
        window: int | None,
        decode_only: bool,
    ) -> tuple[jax.Array, jax.Array]:
        stacked = {name: params[f"layers.{name}"] for name, _ in self._layer_params}
        if (first, last) != (0, self.config.num_layers):
            stacked = {name: array[first:last] for name, array in stacked.items()}

        def body(
            carry: tuple[jax.Array, jax.Array], xs: tuple[dict[str, jax.Array], jax.Array]
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            return self._run_layer(xs[0], *carry, xs[1], inputs, window=window, decode_only=decode_only), None

        indices = jnp.arange(first, last, dtype=jnp.int32)
        (x, kv_pages), _ = lax.scan(body, (x, kv_pages), (stacked, indices))
        return x, kv_pages


def parameter_specs(config: ModelConfig) -> dict[str, ParameterSpec]:
    """Every parameter of a model: name to shape and logical axes, whatever it will run on."""
    form = DecoderForm(jnp.float32, feature_major=False, stack_layers=False, attention_backend="reference")
    return Decoder(config, form).parameter_specs()


def _groups_of_like_layers(config: ModelConfig) -> list[tuple[int, int, int | None]]:
    """(first, last + 1, window) of each run of layers that differ in nothing but their weights."""
    windows = config.layer_windows or (None,) * config.num_layers
    groups, first = [], 0
    for window, run in itertools.groupby(windows):
        count = len(list(run))
        groups.append((first, first + count, window))
        first += count
    return groups


def _split(module: nnx.Module) -> tuple[nnx.GraphDef[Any], list[tuple[str, nnx.Param[Any]]]]:
    """A module's graph, and its parameters by dotted name."""
    graph, state = nnx.split(module)
    return graph, [(".".join(map(str, path)), param) for path, param in nnx.to_flat_state(state)]


def _merge(
    graph: nnx.GraphDef[Any], declared: list[tuple[str, nnx.Param[Any]]], values: dict[str, Any]
) -> Any:
    """The module again, with values in place of declarations."""
    flat = [(tuple(name.split(".")), param.replace(values[name])) for name, param in declared]
    return nnx.merge(graph, nnx.from_flat_state(flat))

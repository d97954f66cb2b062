"""The one decoder: every family whose data flow is that of a pre- or post-norm transformer."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jaxllm.layers.attention import AttentionInputs
from jaxllm.layers.linear import OneOfLayers, OneOfStack
from jaxllm.layers.rope import rotation_table
from jaxllm.models.attention_kind import cache_rows
from jaxllm.models.blocks import DecoderForm, DecoderLayer, Trunk
from jaxllm.models.config import ModelConfig
from jaxllm.models.fitting import fit_to_shards
from jaxllm.models.graph import LikeLayers, groups_of_like_layers, merge_module, split_module
from jaxllm.models.parameters import ParameterSpec
from jaxllm.models.stages import Stages
from sharding import on_shards, partition_spec, sharded_top_k

CACHE_AXES = ("layers", "pages", None, "kv_heads", None)


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


class Decoder:
    """A model's graph, split from its parameters: pure functions of the parameters it is given.

    Parameters are a dict by name, as `parameter_specs` lists them. Those of layers ("layers.*") are
    stacked [layers, ...] where `form.stack_layers`, else a list of arrays.

    On a mesh every device runs the same program on its shards (`shard_map`), and the layers say where
    they add up: twice a layer, and once for the embeddings.

    Attributes:
        config: the model as it is.
        fitted: with the KV heads and the vocabulary that parameters, cache and logits have on the mesh.
    """

    def __init__(self, config: ModelConfig, form: DecoderForm) -> None:
        self.config = config
        self.form = form
        sizes = {} if form.mesh is None else form.mesh.shape
        self.fitted = fit_to_shards(config, sizes.get("tensor", 1), sizes.get("pipe", 1))
        self._trunk, self._trunk_params = split_module(Trunk(self.fitted, form))
        self._groups = groups_of_like_layers(config)
        self._layers = {
            has_experts: split_module(DecoderLayer(self.fitted, form, has_experts=has_experts))
            for has_experts in sorted({group.has_experts for group in self._groups})
        }
        # Which layers have a parameter: all of them, those with experts, or those without.
        self._layers_with: dict[str, list[int]] = {}
        for group in self._groups:
            for name, _ in self._layers[group.has_experts][1]:
                self._layers_with.setdefault(name, []).extend(range(group.first, group.first + group.count))

    def parameter_specs(self) -> dict[str, ParameterSpec]:
        """Every parameter: name to shape and logical axes."""
        specs = {name: ParameterSpec(p.get_value().shape, p.logical_axes) for name, p in self._trunk_params}
        stages = Stages(self.config.num_layers, self.form.num_stages)
        for _, declared in self._layers.values():
            for name, p in declared:
                shape, axes, layers = p.get_value().shape, p.logical_axes, self._layers_with[name]
                stack = stages.stack_of(layers) if stages.count > 1 else ()
                specs[f"layers.{name}"] = ParameterSpec(shape, axes, len(layers), p.exact, stack)
        return specs

    def cache_spec(self, num_pages: int, page_size: int) -> ParameterSpec:
        """The KV cache's shape and logical axes, as the attention backend would have it held.

        Args:
            num_pages: of each replica.
        """
        model, shards = self.fitted, self.form.axis_size("tensor")
        rows, width = cache_rows(model, self.form.attention_backend, shards)
        pages = num_pages * self.form.axis_size("data")
        return ParameterSpec((model.num_layers, pages, page_size, rows * shards, width), CACHE_AXES)

    def __call__(
        self, params: dict[str, Any], kv_pages: jax.Array, inputs: TokenInputs, *, decode_only: bool = False
    ) -> tuple[jax.Array, jax.Array]:
        """Hidden states after the last layer, [T, D] or [D, T], and the cache with the new tokens."""
        forward: Callable[..., Any] = functools.partial(self._forward, decode_only=decode_only)
        if self.form.mesh is not None:
            cache = partition_spec(CACHE_AXES)
            forward = self._on_every_device(forward, (cache, PartitionSpec()), (PartitionSpec(), cache))
        return forward(params, kv_pages, inputs)

    def _on_every_device(
        self, function: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any
    ) -> Callable[..., Any]:
        """function(params, ...) of global arrays, run on each device's shards."""
        assert self.form.mesh is not None
        params = {name: self._partition_spec(name, spec) for name, spec in self.parameter_specs().items()}
        return on_shards(function, self.form.mesh, (params, *in_specs), out_specs)

    def _partition_spec(self, name: str, spec: ParameterSpec) -> PartitionSpec:
        stacked = self.form.stack_layers and spec.num_layers is not None
        return partition_spec(("layers", *spec.axes) if stacked else spec.axes, name=name)

    def _forward(
        self, params: dict[str, Any], kv_pages: jax.Array, inputs: TokenInputs, *, decode_only: bool
    ) -> tuple[jax.Array, jax.Array]:
        trunk = self._trunk_of(params)
        attention_inputs = self._attention_inputs(inputs, decode_only)
        x = trunk.embed_tokens(inputs.token_ids, inputs.positions, inputs.token_types)
        run = self._scan_layers if self.form.stack_layers else self._loop_over_layers
        for group in self._groups:
            x, kv_pages = run(group, params, x, kv_pages, attention_inputs, decode_only)
        return x, kv_pages

    def _attention_inputs(self, inputs: TokenInputs, decode_only: bool) -> AttentionInputs:
        rope = self.config.rope
        return AttentionInputs(
            inputs.page_table,
            inputs.seq_lens,
            inputs.query_starts,
            None if rope is None else rotation_table(rope, inputs.positions, inputs.rope_lengths),
            self._span_ends(inputs) if self.config.bidirectional and not decode_only else None,
        )

    def logits(self, params: dict[str, Any], hidden: jax.Array, rows: jax.Array) -> jax.Array:
        """float32[rows, vocabulary] for the tokens at `rows` int32[rows] of the hidden states.

        On a mesh the vocabulary is the fitted one, -inf where it is longer than the model's.
        """
        if self.form.mesh is None:
            return self._logits(params, hidden, rows)
        split = PartitionSpec(None, self.form.mesh_axes("vocab"))
        logits = self._on_every_device(self._logits, (PartitionSpec(), PartitionSpec()), split)
        return logits(params, hidden, rows)

    def top_k(self, logits: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
        """The k largest of each row of logits, and where they stand."""
        axes = self.form.mesh_axes("vocab")
        if self.form.mesh is None or axes is None:
            return lax.top_k(logits, k)
        return sharded_top_k(logits, k, self.form.mesh, axes)

    def _logits(self, params: dict[str, Any], hidden: jax.Array, rows: jax.Array) -> jax.Array:
        chosen = jnp.take(hidden, rows, axis=1 if self.form.feature_major else 0)
        return self._trunk_of(params).logits(chosen, self.config.vocab_size)

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
        return merge_module(self._trunk, self._trunk_params, params)

    def _loop_over_layers(
        self,
        group: LikeLayers,
        params: dict[str, Any],
        x: jax.Array,
        kv_pages: jax.Array,
        inputs: AttentionInputs,
        decode_only: bool,
    ) -> tuple[jax.Array, jax.Array]:
        by_layer = self._parameters_of(group, params)
        # Biases and scales are small enough to stack and slice; matrices stay where they are.
        small = {n: jnp.stack(a) for n, a in by_layer.items() if n.endswith((".bias", "norm.weight"))}
        matrices = {n: a for n, a in by_layer.items() if n not in small}

        def body(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            own: dict[str, Any] = {name: OneOfLayers(index, arrays) for name, arrays in matrices.items()}
            own |= {name: stack[index] for name, stack in small.items()}
            return self._run_layer(group, own, *carry, group.first + index, inputs, decode_only)

        return lax.fori_loop(0, group.count, body, (x, kv_pages))

    def _scan_layers(
        self,
        group: LikeLayers,
        params: dict[str, Any],
        x: jax.Array,
        kv_pages: jax.Array,
        inputs: AttentionInputs,
        decode_only: bool,
    ) -> tuple[jax.Array, jax.Array]:
        # Grouped products read a layer's experts within the stack; the scan slices everything else.
        experts = {
            name: (params[f"layers.{name}"], self._layers_with[name].index(group.first))
            for name, _ in self._layers[group.has_experts][1]
            if name.startswith("mlp.experts.")
        }
        parts = self._parameters_of(group, params)
        stacked = {name: part for name, part in parts.items() if name not in experts}

        def body(
            carry: tuple[jax.Array, jax.Array], xs: tuple[dict[str, jax.Array], jax.Array]
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            own, index = xs
            all_own: dict[str, Any] = dict(own)
            for name, (stack, first) in experts.items():
                all_own[name] = OneOfStack(first + index, stack)
            return self._run_layer(group, all_own, *carry, group.first + index, inputs, decode_only), None

        indices = jnp.arange(group.count, dtype=jnp.int32)
        (x, kv_pages), _ = lax.scan(body, (x, kv_pages), (stacked, indices))
        return x, kv_pages

    def _run_layer(
        self,
        group: LikeLayers,
        params: dict[str, Any],
        x: jax.Array,
        kv_pages: jax.Array,
        index: jax.Array,
        inputs: AttentionInputs,
        decode_only: bool,
    ) -> tuple[jax.Array, jax.Array]:
        layer = merge_module(*self._layers[group.has_experts], params)
        return layer(x, kv_pages, index, inputs, window=group.window, decode_only=decode_only)  # type: ignore[no-any-return]

    def _parameters_of(self, group: LikeLayers, params: dict[str, Any]) -> dict[str, Any]:
        """The group's part of each of its parameters, by its name within a layer."""
        parts = {}
        for name, _ in self._layers[group.has_experts][1]:
            whole, start = params[f"layers.{name}"], self._layers_with[name].index(group.first)
            is_part = group.count < len(whole)
            parts[name] = whole[start : start + group.count] if is_part else whole
        return parts


def parameter_specs(config: ModelConfig) -> dict[str, ParameterSpec]:
    """Every parameter of a model: name to shape and logical axes, whatever it will run on."""
    form = DecoderForm(jnp.float32, feature_major=False, stack_layers=False, attention_backend="reference")
    return Decoder(config, form).parameter_specs()

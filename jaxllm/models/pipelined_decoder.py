"""The decoder whose layers are shared out to the stages of a pipeline, all of which work at once.

A call is one tick. Each stage runs its layers on a batch of its own: what the stage before it made of
that batch in the tick before, or in the first stage the embeddings of a new one. So with a new batch in
every tick no stage ever waits (GPipe's pipeline, Huang et al. 2019, section 2.3, without its bubble:
where nothing is trained no batch has to come back).

Stages run one program. Layers are a scan over the places of a stage, stacked, on every platform: to
pick from lists of arrays would only pay on a CPU, where stages are simulated. Where some layers have
experts and others do not, what each stage has of either kind is stacked by itself, and each turn of the
scan branches to the kind of the stage's layer. All devices of a stage take the same branch, also those of
its replicas, so that whoever has to sum up or to exchange something in it is there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxllm.layers.attention import AttentionInputs, OneOfWindows
from jaxllm.layers.linear import OneOfStack
from jaxllm.models.blocks import DecoderForm, DecoderLayer
from jaxllm.models.config import ModelConfig
from jaxllm.models.decoder import CACHE_AXES, Decoder, TokenInputs
from jaxllm.models.graph import merge_module
from jaxllm.models.stages import Stages
from sharding import partition_spec

# Replicas have their stages one after the other; a tick is of those of one replica.
HIDDEN_AXES = ("stages", None, None)
# The KV cache, and what each stage made of its batch in the tick before: [stages, T, D] or [stages, D, T],
# with room for the largest step's tokens.
Cache = tuple[jax.Array, jax.Array]


class PipelinedDecoder(Decoder):
    """A decoder in stages: a call takes a batch for each of them, and every batch takes a call for each.

    Args:
        form: with a mesh that has stages, and stacked layers.

    Attributes:
        stages: which layers each has.
    """

    def __init__(self, config: ModelConfig, form: DecoderForm) -> None:
        super().__init__(config, form)
        self.stages = Stages(config.num_layers, form.num_stages)
        windows = config.layer_windows or (None,) * config.num_layers
        self._windows = tuple(dict.fromkeys(windows))
        sparse = () if config.moe is None else config.moe.layers
        self._kinds = tuple(self._layers)
        # int32[stages, places, 4], of the layer in a place: whether there is one, which of the kinds and
        # which of the windows it has, and how many of its kind stand before it in the stage.
        self._places = np.zeros((form.num_stages, self.stages.places, 4), np.int32)
        for stage in range(form.num_stages):
            seen = dict.fromkeys(self._kinds, 0)
            for place, layer in enumerate(self.stages.layers_of(stage)):
                kind = layer in sparse
                window = self._windows.index(windows[layer])
                self._places[stage, place] = True, self._kinds.index(kind), window, seen[kind]
                seen[kind] += 1

    def __call__(  # type: ignore[override]
        self, params: dict[str, Any], cache: Cache, inputs: TokenInputs, *, decode_only: bool = False
    ) -> tuple[jax.Array, Cache]:
        """One tick.

        Args:
            inputs: [stages, ...], of the batch that each stage works on; token ids matter in the first.

        Returns:
            What each stage made of its batch, [stages, T, D] or [stages, D, T], and the cache with the
            new tokens of all those batches.
        """

        def tick(params: dict[str, Any], cache: Cache, inputs: TokenInputs) -> tuple[jax.Array, Cache]:
            return self._tick(params, cache, inputs, decode_only)

        hidden = partition_spec(HIDDEN_AXES)
        specs = (partition_spec(CACHE_AXES), hidden)
        return self._on_every_device(tick, (specs, PartitionSpec()), (hidden, specs))(params, cache, inputs)

    def _tick(
        self, params: dict[str, Any], cache: Cache, inputs: TokenInputs, decode_only: bool
    ) -> tuple[jax.Array, Cache]:
        kv_pages, carried = cache
        stage, num_tokens = lax.axis_index("pipe"), inputs.token_ids.shape[1]
        entering, own = (jax.tree.map(lambda x, at=at: x[at], inputs) for at in (0, stage))
        before = lax.slice_in_dim(carried[0], 0, num_tokens, axis=1 if self.form.feature_major else 0)
        before = lax.ppermute(before, "pipe", [(s, s + 1) for s in range(self.stages.count - 1)])
        trunk = self._trunk_of(params)
        # Stages share the vocabulary, and with it this look-up.
        embedded = trunk.embed_tokens(entering.token_ids, entering.positions, entering.token_types)
        x, kv_pages = self._scan_places(
            params,
            jnp.where(stage == 0, embedded, before),
            kv_pages,
            self._attention_inputs(own, decode_only),
            decode_only,
        )
        return x[None], (kv_pages, lax.dynamic_update_slice(carried, x[None], (0, 0, 0)))

    def _scan_places(
        self,
        params: dict[str, Any],
        x: jax.Array,
        kv_pages: jax.Array,
        inputs: AttentionInputs,
        decode_only: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """This stage's layers, one after the other."""
        of_kind = {kind: [name for name, _ in self._layers[kind][1]] for kind in self._kinds}
        # What every layer has is sliced by the scan, but for experts, which are read within the stack.
        common = {
            name: params[f"layers.{name}"]
            for name in of_kind[self._kinds[0]]
            if all(name in names for names in of_kind.values()) and not _is_of_experts(name)
        }

        def layer_of(kind: bool, own: dict[str, jax.Array], row: jax.Array) -> DecoderLayer:
            values: dict[str, Any] = dict(own)
            for name in of_kind[kind]:
                if name not in own:
                    stack = params[f"layers.{name}"]
                    values[name] = OneOfStack(row, stack) if _is_of_experts(name) else stack[row]
            return merge_module(*self._layers[kind], values)  # type: ignore[no-any-return]

        def body(
            carry: tuple[jax.Array, jax.Array], xs: tuple[dict[str, jax.Array], jax.Array, jax.Array]
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            own, place, (is_layer, kind, window, row) = xs
            x, kv_pages = carry
            several = len(self._windows) > 1
            y, kv_pages = layer_of(self._kinds[0], own, row).attend(
                x,
                kv_pages,
                place,
                inputs,
                window=OneOfWindows(window, self._windows) if several else self._windows[0],
                decode_only=decode_only,
            )

            def feed_forward(kind: bool) -> Callable[[jax.Array], jax.Array]:
                return lambda y: layer_of(kind, own, row).feed_forward(y, inputs)

            halves = [feed_forward(each) for each in self._kinds]
            y = halves[0](y) if len(halves) == 1 else lax.switch(kind, halves, y)
            return (y if self._places[..., 0].all() else jnp.where(is_layer > 0, y, x), kv_pages), None

        table = jnp.asarray(self._places)[lax.axis_index("pipe")]
        places = jnp.arange(self.stages.places, dtype=jnp.int32)
        (x, kv_pages), _ = lax.scan(body, (x, kv_pages), (common, places, table))
        return x, kv_pages

    def logits(self, params: dict[str, Any], hidden: jax.Array, rows: jax.Array) -> jax.Array:
        """See `Decoder.logits`; of the batch that leaves the last stage."""
        split = PartitionSpec(None, self.form.mesh_axes("vocab"))
        specs = (partition_spec(HIDDEN_AXES), PartitionSpec())
        return self._on_every_device(self._logits_of_last, specs, split)(params, hidden, rows)

    def _logits_of_last(self, params: dict[str, Any], hidden: jax.Array, rows: jax.Array) -> jax.Array:
        chosen = self._from_last(jnp.take(hidden[0], rows, axis=1 if self.form.feature_major else 0))
        return self._trunk_of(params).logits(chosen, self.config.vocab_size)

    def features(self, params: dict[str, Any], hidden: jax.Array) -> jax.Array:
        """See `Decoder.features`; of the batch that leaves the last stage."""
        specs = (partition_spec(HIDDEN_AXES),)
        last = self._on_every_device(lambda _, x: self._from_last(x[0]), specs, PartitionSpec())
        return super().features(params, last(params, hidden))

    def _from_last(self, x: jax.Array) -> jax.Array:
        """The last stage's x, for all stages."""
        is_last = lax.axis_index("pipe") == self.stages.count - 1
        return lax.psum(jnp.where(is_last, x, 0), "pipe")


def _is_of_experts(name: str) -> bool:
    return name.startswith("mlp.experts.")


def make_decoder(config: ModelConfig, form: DecoderForm) -> Decoder:
    """The decoder for a form: in stages where its mesh has some."""
    return Decoder(config, form) if form.num_stages == 1 else PipelinedDecoder(config, form)

"""The decoder whose layers are shared out to the stages of a pipeline, all of which work at once.

A call is one tick. Each stage runs its layers on a batch of its own: what the stage before it made of
that batch in the tick before, or in the first stage the embeddings of a new one. So with a new batch in
every tick no stage ever waits (GPipe's pipeline, Huang et al. 2019, section 2.3, without its bubble:
where nothing is trained no batch has to come back).

Stages run one program. Layers are a scan over the places of a stage, stacked, on every platform: to
pick from lists of arrays would only pay on a CPU, where stages are simulated.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jaxllm.errors import UnsupportedError
from jaxllm.layers.attention import AttentionInputs, OneOfWindows
from jaxllm.models.config import ModelConfig
from jaxllm.models.decoder import CACHE_AXES, Decoder, DecoderForm, TokenInputs
from jaxllm.models.graph import LikeLayers
from jaxllm.models.stages import Stages
from sharding import partition_spec

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

    Raises:
        UnsupportedError: some layers of the model have experts and others do not, or there are replicas.
    """

    def __init__(self, config: ModelConfig, form: DecoderForm) -> None:
        super().__init__(config, form)
        if form.axis_size("data") > 1:
            raise UnsupportedError(
                f"pipeline_parallel_size={form.num_stages} with data_parallel_size={form.axis_size('data')}: "
                "replicas of a pipeline are not supported; leave one of them at 1."
            )
        if len(self._layers) > 1:
            raise UnsupportedError(
                f"pipeline_parallel_size={form.num_stages}: some layers of this {config.architecture} have "
                "experts and others do not, and all stages must run the same program; leave it at 1."
            )
        self.stages = Stages(config.num_layers, form.num_stages)
        windows = config.layer_windows or (None,) * config.num_layers
        self._windows = tuple(dict.fromkeys(windows))
        # int32[places of all stages], which of the windows a layer has.
        self._window_of = np.array(
            [0 if layer is None else self._windows.index(windows[layer]) for layer in self.stages.stack],
            np.int32,
        )

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
        x, kv_pages = self._scan_layers(
            LikeLayers(0, self.stages.places, self._windows[0], next(iter(self._layers))),
            params,
            jnp.where(stage == 0, embedded, before),
            kv_pages,
            self._attention_inputs(own, decode_only),
            decode_only,
        )
        return x[None], (kv_pages, lax.dynamic_update_slice(carried, x[None], (0, 0, 0)))

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
        stage = lax.axis_index("pipe")
        if len(self._windows) > 1:
            choice = jnp.asarray(self._window_of)[stage * self.stages.places + index]
            group = replace(group, window=OneOfWindows(choice, self._windows))
        y, kv_pages = super()._run_layer(group, params, x, kv_pages, index, inputs, decode_only)
        if None in self.stages.stack:
            counts = [len(self.stages.layers_of(s)) for s in range(self.stages.count)]
            y = jnp.where(index < jnp.asarray(counts)[stage], y, x)
        return y, kv_pages

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


def make_decoder(config: ModelConfig, form: DecoderForm) -> Decoder:
    """The decoder for a form: in stages where its mesh has some.

    Raises:
        UnsupportedError: see `PipelinedDecoder`.
    """
    return Decoder(config, form) if form.num_stages == 1 else PipelinedDecoder(config, form)

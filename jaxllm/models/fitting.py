"""A model in numbers that shards can share (heads, vocabulary, layers), and its stored weights laid out so.

Shards that outnumber the KV heads keep a copy of a head each, with their part of its queries. A
vocabulary that does not divide grows by rows of zeros, whose logits the decoder sets to -inf. Layers
that do not divide by the stages of a pipeline leave a place empty in some (`jaxllm.models.stages`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from jaxllm.errors import ConfigError
from jaxllm.models.config import ModelConfig
from jaxllm.models.parameters import ParameterSpec, Region, WeightSource
from jaxllm.models.stages import Stages
from sharding import ShardingError, named_sharding

# The sampler looks at logits in chunks of so many; a shard of the vocabulary is made of whole ones.
VOCABULARY_CHUNK = 256


def fit_to_shards(config: ModelConfig, tensor: int, pipe: int = 1) -> ModelConfig:
    """The model with as many KV heads, as large a vocabulary and as many layers as a mesh can split.

    KV heads are copied as few times as makes their number divide; where the query heads do not allow
    it they stay as they are, for `sharding.named_sharding` to refuse by name.

    Args:
        tensor, pipe: sizes of the mesh axes; with 1 and 1 the model stays as it is.
    """
    if tensor * pipe == 1:
        return config
    kv_heads = math.lcm(config.num_kv_heads, tensor)
    if config.num_heads % kv_heads:
        kv_heads = config.num_kv_heads
    multiple = VOCABULARY_CHUNK * tensor * pipe
    return replace(
        config,
        num_kv_heads=kv_heads,
        vocab_size=-(-config.vocab_size // multiple) * multiple,
        num_layers=Stages(config.num_layers, pipe).places * pipe,
    )


def shard_of(
    fitted: ModelConfig, tensor: int, pipe: int = 1, *, expert_parallel: bool = False
) -> ModelConfig:
    """What of a fitted model one device computes, as a model of its own: for sizes, not to be run.

    Where stages differ in their layers, the device of one that has most.
    """
    return replace(
        fitted,
        vocab_size=fitted.vocab_size // (tensor * pipe),
        intermediate_size=fitted.intermediate_size // tensor,
        num_layers=fitted.num_layers // pipe,
        num_heads=fitted.num_heads // tensor,
        num_kv_heads=fitted.num_kv_heads // tensor,
        moe=None
        if fitted.moe is None
        else replace(
            fitted.moe,
            intermediate_size=fitted.moe.intermediate_size // (1 if expert_parallel else tensor),
            shared_intermediate_size=fitted.moe.shared_intermediate_size // tensor,
        ),
    )


def shard_specs(specs: Mapping[str, ParameterSpec], mesh: Mesh | AbstractMesh) -> dict[str, ParameterSpec]:
    """What one device of a mesh holds of each parameter: of a stage that has most layers.

    Raises:
        ConfigError: as `parameter_shardings`.
    """
    shards = {}
    for name, sharding in parameter_shardings(specs, mesh, stack_layers=False).items():
        spec = specs[name]
        shape = sharding.shard_shape(spec.shape)
        layers = None if spec.num_layers is None else len(spec.places) // mesh.shape["pipe"]
        shards[name] = ParameterSpec(shape, spec.axes, layers)
    return shards


def parameter_shardings(
    specs: Mapping[str, ParameterSpec], mesh: Mesh | AbstractMesh, stack_layers: bool
) -> dict[str, NamedSharding]:
    """How each array will lie; a list's arrays all alike.

    Raises:
        ConfigError: a size does not divide by the shards it is split into; with both and the array's name.
    """
    shardings = {}
    # The shortest axes first: where heads do not divide, the message is to count heads, not their features.
    for name, spec in sorted(specs.items(), key=lambda item: _shortest_axis(item[1])):
        axes, shape = spec.axes, spec.shape
        if stack_layers and spec.num_layers is not None:
            axes, shape = ("layers", *axes), (len(spec.places), *shape)
        try:
            shardings[name] = named_sharding(mesh, axes, shape, name)
        except ShardingError as error:
            raise ConfigError(str(error)) from error
    return shardings


def _shortest_axis(spec: ParameterSpec) -> int:
    return min((size for size, axis in zip(spec.shape, spec.axes, strict=True) if axis), default=0)


class FittedSource:
    """Stored weights, read as the parameters of a model that was fitted to shards.

    Args:
        source: reads parameters of the shapes in `stored`.
        queries: for each KV head of the stored model.
    """

    def __init__(
        self,
        source: WeightSource,
        stored: Mapping[str, ParameterSpec],
        fitted: Mapping[str, ParameterSpec],
        queries: int,
    ) -> None:
        self._source = source
        self._stored = stored
        self._fitted = fitted
        self._queries = queries

    def read(self, parameter: str, layer: int | None, region: Region, out: np.ndarray) -> None:
        """Fills `out` with a region of one fitted parameter; reads no byte that it does not need."""
        stored, fitted = self._stored[parameter], self._fitted[parameter]
        if stored.shape == fitted.shape:
            self._source.read(parameter, layer, region, out)
        elif "vocab" in stored.axes:
            self._read_padded(parameter, layer, region, out, stored.axes.index("vocab"))
        else:
            self._read_heads(parameter, layer, region, out, stored.axes.index("kv_heads"))

    def _read_padded(
        self, parameter: str, layer: int | None, region: Region, out: np.ndarray, axis: int
    ) -> None:
        start, stop = region[axis]
        end = min(max(self._stored[parameter].shape[axis], start), stop)
        known, padding = [slice(None)] * out.ndim, [slice(None)] * out.ndim
        known[axis], padding[axis] = slice(end - start), slice(end - start, None)
        out[tuple(padding)] = 0
        if end > start:
            part = (*region[:axis], (start, end), *region[axis + 1 :])
            self._source.read(parameter, layer, part, out[tuple(known)])

    def _read_heads(
        self, parameter: str, layer: int | None, region: Region, out: np.ndarray, axis: int
    ) -> None:
        copies = self._fitted[parameter].shape[axis] // self._stored[parameter].shape[axis]
        of_original = _queries_in(self._stored[parameter], self._fitted[parameter], self._queries)
        queries = of_original // copies
        (first, last), (start, stop) = region[axis], region[axis + 1]
        for head in range(first, last):
            original, copy = divmod(head, copies)
            # A copy has its own queries, and behind them the same keys and values as the others.
            parts = (
                (start, min(stop, queries), copy * queries),
                (max(start, queries), stop, of_original - queries),
            )
            for begin, end, shift in parts:
                if begin < end:
                    row = slice(head - first, head - first + 1)
                    target = out[(*[slice(None)] * axis, row, slice(begin - start, end - start))]
                    part = ((original, original + 1), (begin + shift, end + shift))
                    self._source.read(parameter, layer, (*region[:axis], *part, *region[axis + 2 :]), target)


def fitted_array(array: jax.Array, stored: ParameterSpec, fitted: ParameterSpec, queries: int) -> jax.Array:
    """A whole stored parameter, [...] or stacked [layers, ...], in its fitted shape."""
    if stored.shape == fitted.shape:
        return array
    first = array.ndim - len(stored.shape)
    if "vocab" in stored.axes:
        axis = stored.axes.index("vocab")
        padding = [(0, 0)] * array.ndim
        padding[first + axis] = (0, fitted.shape[axis] - stored.shape[axis])
        return jnp.pad(array, padding)
    axis = first + stored.axes.index("kv_heads")
    heads, copies = array.shape[axis], fitted.shape[axis - first] // array.shape[axis]
    queries = _queries_in(stored, fitted, queries)
    own, shared = jnp.split(array, [queries], axis=axis + 1)
    own = own.reshape(*array.shape[:axis], heads * copies, queries // copies, *array.shape[axis + 2 :])
    return jnp.concatenate([own, jnp.repeat(shared, copies, axis=axis)], axis=axis + 1)


def _queries_in(stored: ParameterSpec, fitted: ParameterSpec, queries: int) -> int:
    """How many queries of a KV head come first in the dimension after the heads: all of them, or none."""
    after = stored.axes.index("kv_heads") + 1
    return queries if stored.shape[after] != fitted.shape[after] else 0

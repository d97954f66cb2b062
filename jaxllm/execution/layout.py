"""How a model would lie on a mesh of devices that need not be there: from shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import jax.numpy as jnp
from jax.sharding import AbstractMesh

from jaxllm.config import EngineConfig
from jaxllm.execution.memory import page_bytes, step_bytes
from jaxllm.models.attention_kind import cache_rows
from jaxllm.models.blocks import DecoderForm
from jaxllm.models.config import ModelConfig
from jaxllm.models.fitting import shard_of, shard_specs
from jaxllm.models.pipelined_decoder import make_decoder
from jaxllm.models.stages import Stages
from pallas_kernels.ragged_paged_attention import Backend
from sharding import DEFAULT_RULES, MESH_AXES, names_of


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """An array, those of all layers stacked, and what of it one device holds.

    Attributes:
        axes: logical axis of each dimension.
        split: the mesh axes that share each dimension, () where every device has it whole.
        device_shape: of a pipeline's stages all have as many places for layers of a kind as the one that has
            most of them.
    """

    name: str
    axes: tuple[str | None, ...]
    split: tuple[tuple[str, ...], ...]
    shape: tuple[int, ...]
    device_shape: tuple[int, ...]
    itemsize: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.itemsize

    @property
    def device_bytes(self) -> int:
        return math.prod(self.device_shape) * self.itemsize


@dataclass(frozen=True, slots=True)
class Layout:
    """A model on a mesh.

    Attributes:
        model: as it is; fitted: with the KV heads and vocabulary that the mesh splits.
        data, tensor, pipe: sizes of the mesh axes.
        arrays: every parameter.
        step_bytes: what the largest step takes of a device besides weights and cache, from above.
        page_bytes: of one page, on one device.
        cache_rows: (rows, numbers in a row) that a KV head takes of a page for each token, or a latent does.
        memory: bytes of a device that may be used.
        num_pages: that fit into what weights and step leave, negative where they do not fit themselves.
        page_size, max_model_len: tokens.
    """

    model: ModelConfig
    fitted: ModelConfig
    data: int
    tensor: int
    pipe: int
    arrays: tuple[ArrayLayout, ...]
    step_bytes: int
    page_bytes: int
    cache_rows: tuple[int, int]
    memory: int
    num_pages: int
    page_size: int
    max_model_len: int

    @property
    def num_bytes(self) -> int:
        """Of all weights, each once."""
        return sum(array.num_bytes for array in self.arrays)

    @property
    def device_bytes(self) -> int:
        """Of the weights that one device holds."""
        return sum(array.device_bytes for array in self.arrays)

    @property
    def empty_bytes(self) -> int:
        """Of weights on a device of each stage, together: places for layers of which others have more."""
        empty = 0
        for array in self.arrays:
            if array.axes[:1] == ("layers",):
                places = array.device_shape[0]
                empty += array.device_bytes // places * (places * self.pipe - array.shape[0])
        return empty

    @property
    def cache_bytes(self) -> int:
        """Left for the KV cache on a device; negative where weights and step do not fit."""
        return self.memory - self.device_bytes - self.step_bytes

    @property
    def num_tokens(self) -> int:
        """That the KV cache of a replica holds."""
        return max(self.num_pages, 0) * self.page_size

    @property
    def concurrency(self) -> float:
        """Requests of max_model_len tokens that the cache of a replica holds at once."""
        return self.num_tokens / self.max_model_len

    def layers_of(self, stage: int) -> range:
        """The layers of a pipeline stage."""
        return Stages(self.model.num_layers, self.pipe).layers_of(stage)


def lay_out(
    config: EngineConfig, model: ModelConfig, *, tensor: int, pipe: int, device_memory: float
) -> Layout:
    """The layout of a model on `pipe x tensor` devices, or as many for each of several replicas.

    Args:
        config: its dtype and limits must be set; data and expert parallelism count, and attention_backend,
            which decides how the cache is held (None: as the portable one has it).
        device_memory: bytes of one device, of which gpu_memory_utilization may be used.

    Raises:
        ConfigError: a size does not divide by the shards it is split into; with both and the array's name.
    """
    dtype = jnp.dtype(config.dtype)
    data, expert_parallel = config.data_parallel_size, config.enable_expert_parallel
    mesh = AbstractMesh((data, pipe, tensor), MESH_AXES)
    decoder = make_decoder(model, DecoderForm(dtype, False, True, "xla", mesh, expert_parallel))
    specs = decoder.parameter_specs()
    shards = shard_specs(specs, mesh)
    arrays = []
    for name, spec in specs.items():
        axes, shape, part = spec.axes, spec.shape, shards[name].shape
        if spec.num_layers is not None:
            axes, shape = ("layers", *axes), (spec.num_layers, *shape)
            part = (shards[name].num_layers or 0, *part)
        split = tuple(names_of(None if axis is None else DEFAULT_RULES[axis]) for axis in axes)
        split = tuple(tuple(a for a in names if mesh.shape[a] > 1) for names in split)
        arrays.append(ArrayLayout(name, axes, split, shape, part, dtype.itemsize))
    shard = shard_of(decoder.fitted, tensor, pipe, expert_parallel=expert_parallel)
    backend = cast(Backend, config.attention_backend or "xla")
    page, step = page_bytes(shard, config.block_size, dtype, backend), step_bytes(config, shard, dtype)
    memory = int(device_memory * config.gpu_memory_utilization)
    left = memory - step - sum(array.device_bytes for array in arrays)
    return Layout(
        model=model,
        fitted=decoder.fitted,
        data=data,
        tensor=tensor,
        pipe=pipe,
        arrays=tuple(arrays),
        step_bytes=step,
        page_bytes=page,
        cache_rows=cache_rows(shard, backend, shard.num_kv_heads),
        memory=memory,
        num_pages=left // page - 1,  # the null page holds nothing
        page_size=config.block_size,
        max_model_len=config.max_model_len or model.max_position_embeddings,
    )

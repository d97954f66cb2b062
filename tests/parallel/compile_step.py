"""Whole engine steps compiled for TPUs that are not here, and what is known of them beforehand."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks.shapes import SHAPES
from jaxllm.config import EngineConfig
from jaxllm.execution.abstract import (
    abstract_cache,
    abstract_parameters,
    abstract_state,
    lower_step,
)
from jaxllm.execution.batch import StepShape
from jaxllm.execution.layout import Layout, lay_out
from jaxllm.execution.memory import page_bytes
from jaxllm.execution.sampler import SamplerState
from jaxllm.execution.step import step
from jaxllm.models.blocks import DecoderForm
from jaxllm.models.config import ModelConfig
from jaxllm.models.decoder import Decoder
from jaxllm.models.families import translate_config
from jaxllm.models.fitting import shard_of
from sharding import MESH_AXES
from tests.kernels.compile_tpu import without_a_chip
from tests.parallel.hlo_traffic import Traffic

BFLOAT16 = jnp.dtype("bfloat16")


@dataclass(frozen=True)
class Setting:
    """A model, the chips that share it, and the largest steps that are served.

    Attributes:
        shape: a name in `benchmarks.shapes`.
        topology: as libtpu calls it; `data` times `tensor` of its chips are used.
        memory: bytes of a chip.
        data: replicas, which share the experts; the limits are of each.
    """

    shape: str
    topology: str
    tensor: int
    memory: float
    page_size: int = 64
    num_seqs: int = 64
    pages_per_seq: int = 128
    num_tokens: int = 2048
    data: int = 1

    @property
    def model(self) -> ModelConfig:
        return translate_config(SHAPES[self.shape])

    @property
    def shard(self) -> ModelConfig:
        """What one chip computes, as a model of its own."""
        return shard_of(self.layout.fitted, self.tensor, expert_parallel=self.data > 1)

    @functools.cached_property
    def layout(self) -> Layout:
        """As `jaxllm.plan` would lay the weights out."""
        config = EngineConfig(
            dtype="bfloat16",
            max_model_len=self.page_size * self.pages_per_seq,
            max_num_seqs=self.num_seqs,
            max_num_batched_tokens=self.num_tokens,
            block_size=self.page_size,
            data_parallel_size=self.data,
            enable_expert_parallel=self.data > 1,
        )
        return lay_out(config, self.model, tensor=self.tensor, pipe=1, device_memory=self.memory)

    @property
    def num_experts(self) -> int:
        """Of a layer, of which one chip has any part."""
        experts = 0 if self.model.moe is None else self.model.moe.num_experts
        return experts if self.data == 1 else experts // (self.data * self.tensor)

    @property
    def cache_bytes(self) -> int:
        """Of the pages that an engine would have on a chip: as many as its memory holds."""
        return self.num_pages * page_bytes(self.shard, self.page_size, BFLOAT16, "tpu")

    @property
    def num_pages(self) -> int:
        return self.layout.cache_bytes // page_bytes(self.shard, self.page_size, BFLOAT16, "tpu")

    def step_shape(self, kind: str) -> StepShape:
        """Of a step of decodes, or of a mixed one."""
        tokens = self.num_seqs if kind == "decode" else self.num_tokens
        return StepShape(tokens, self.num_seqs, self.pages_per_seq, kind == "decode")

    @property
    def weight_bytes(self) -> int:
        """Of a chip's weights that a step reads: not the embeddings, where they are not the head, too."""
        looked_up = set() if self.model.tie_word_embeddings else {"embed.weight"}
        return sum(array.device_bytes for array in self.layout.arrays if array.name not in looked_up)

    @property
    def kv_bytes(self) -> int:
        """Of keys and values of a chip, where every sequence is as long as it may be."""
        tokens = self.num_seqs * self.pages_per_seq * self.page_size
        return tokens * page_bytes(self.shard, 1, BFLOAT16, "xla")

    def activation_bytes(self, kind: str) -> int:
        """What a step reads and writes beside weights and cache, were none of it kept on the chip."""
        own, tokens = self.shard, self.step_shape(kind).num_tokens
        hidden, heads = self.model.hidden_size, own.num_heads * own.head_dim
        keys = 2 * own.num_kv_heads * own.head_dim
        attention = 2 * hidden + 4 * heads + 3 * keys  # in and out of both products and of the kernel
        if self.model.moe is None:
            mlp = 2 * hidden + 5 * own.intermediate_size
        else:  # rows of tokens, sorted, through the experts, back in order, and summed
            assert own.moe is not None
            each = 5 * hidden + 5 * own.moe.intermediate_size
            mlp = 2 * hidden + own.moe.experts_per_token * each
            if self.data > 1:  # laid out to be sent, and received, there and back: blocks of twice the mean
                mlp += own.moe.experts_per_token * 2 * 8 * hidden
        sums = 2 * 4 * hidden + (2 * 2 * hidden if self.tensor > 1 else 0)  # norm and residual; all-reduce
        logits = 4 * self.num_seqs * own.vocab_size
        return tokens * (attention + mlp + sums) * own.num_layers * BFLOAT16.itemsize + 3 * logits


@dataclass(frozen=True)
class CompiledStep:
    """
    Attributes:
        text: of the compiled module.
        cache_shape: of what one chip holds, as XLA writes it.
        num_experts: of a layer, of which one chip has any part.
    """

    executable: Any
    text: str
    cache_shape: str
    num_experts: int

    @functools.cached_property
    def traffic(self) -> Traffic:
        return Traffic(self.text, self.num_experts)


@functools.cache
def compile_step(setting: Setting, kind: str) -> CompiledStep:
    """A step compiled for chips that are not here."""
    without_a_chip()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=setting.topology).devices
    sizes = [{"data": setting.data, "tensor": setting.tensor}.get(axis, 1) for axis in MESH_AXES]
    mesh = Mesh(np.array(devices[: math.prod(sizes)]).reshape(sizes), MESH_AXES)
    form = DecoderForm(BFLOAT16, False, True, "tpu", mesh, expert_parallel=setting.data > 1)
    decoder = Decoder(setting.model, form)
    shape, vocab_size = setting.step_shape(kind), decoder.fitted.vocab_size
    cache = abstract_cache(decoder, setting.num_pages, setting.page_size)
    lowered = lower_step(
        functools.partial(step, decoder=decoder, shape=shape, num_logprobs=20, logprobs_mode="raw_logprobs"),
        decoder,
        abstract_parameters(decoder),
        cache,
        abstract_state(
            functools.partial(SamplerState.create, setting.num_seqs, vocab_size, setting.data), mesh
        ),
        shape,
    )
    executable = lowered.compile()
    local = ",".join(map(str, cache.sharding.shard_shape(cache.shape)))
    return CompiledStep(executable, executable.as_text(), f"bf16[{local}]", setting.num_experts)

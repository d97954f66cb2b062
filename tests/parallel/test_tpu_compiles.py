"""The whole step of Llama-3.1-70B on eight v6e chips, compiled where libtpu is installed."""

from __future__ import annotations

import functools
import os
from collections import Counter
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks.shapes import SHAPES
from jaxllm.config import EngineConfig
from jaxllm.execution.abstract import (
    abstract_cache,
    abstract_parameters,
    abstract_state,
    everywhere,
    lower_step,
)
from jaxllm.execution.batch import StepShape
from jaxllm.execution.layout import lay_out
from jaxllm.execution.sampler import SamplerState
from jaxllm.execution.step import step
from jaxllm.execution.token_masks import TokenMasks
from jaxllm.models.decoder import Decoder, DecoderForm
from jaxllm.models.families import translate_config
from sharding import MESH_AXES
from tests.kernels.compile_tpu import WITHOUT_A_CHIP
from tests.parallel.hlo import collectives, copies_of, parse

pytest.importorskip("libtpu")

MODEL = translate_config(SHAPES["llama-3.1-70b"])
CHIPS, MEMORY = 8, 32e9
PAGE_SIZE, SEQS, PAGES_PER_SEQ = 64, 64, 128
SHAPES_COMPILED = {
    "decode": StepShape(SEQS, SEQS, PAGES_PER_SEQ, True),
    "mixed": StepShape(2048, SEQS, PAGES_PER_SEQ, False),
}


@functools.cache
def compiled(name: str) -> tuple[Any, int, int]:
    """A step, the pages of its cache, and the bytes of weights that the plan gives a chip."""
    for key, value in WITHOUT_A_CHIP.items():
        os.environ.setdefault(key, value)
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x4").devices
    mesh = Mesh(np.array(devices).reshape(1, 1, CHIPS), MESH_AXES)
    config = EngineConfig(
        dtype="bfloat16",
        max_model_len=PAGE_SIZE * PAGES_PER_SEQ,
        max_num_seqs=SEQS,
        max_num_batched_tokens=2048,
        block_size=PAGE_SIZE,
    )
    layout = lay_out(config, MODEL, tensor=CHIPS, pipe=1, device_memory=MEMORY)
    # The portable backend would copy the cache from one layout to another, twice a layer.
    decoder = Decoder(MODEL, DecoderForm(jnp.dtype("bfloat16"), False, True, "tpu", mesh))
    shape, num_pages = SHAPES_COMPILED[name], layout.num_pages + 1
    lowered = lower_step(
        functools.partial(step, decoder=decoder, shape=shape, num_logprobs=20, logprobs_mode="raw_logprobs"),
        decoder,
        abstract_parameters(decoder),
        abstract_cache(decoder, num_pages, PAGE_SIZE),
        abstract_state(functools.partial(SamplerState.create, SEQS, decoder.fitted.vocab_size), mesh),
        TokenMasks(MODEL.vocab_size, decoder.fitted.vocab_size, everywhere(decoder)).abstract(SEQS),
        shape,
    )
    return lowered.compile(), num_pages, layout.device_bytes


@pytest.mark.parametrize("name", SHAPES_COMPILED)
def test_it_fits_as_planned_and_moves_nothing(name: str) -> None:
    executable, num_pages, weights = compiled(name)
    memory = executable.memory_analysis()
    cache = num_pages * MODEL.num_layers * PAGE_SIZE * 2 * MODEL.head_dim * 2
    assert memory.argument_size_in_bytes >= weights + cache
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes <= MEMORY
    # Cache and state are updated in place.
    assert memory.alias_size_in_bytes >= cache

    module = parse(executable.as_text())
    shape = f"bf16[{MODEL.num_layers},{num_pages},{PAGE_SIZE},2,{MODEL.head_dim}]"
    [layer] = module.loops_over(shape)
    assert collectives(layer) == Counter({"all-reduce": 2})
    moved = [one.num_elements for one in module.instructions if collectives([one])]
    rows = max(SEQS, SHAPES_COMPILED[name].num_tokens)
    assert max(moved) <= max(rows * MODEL.hidden_size, SEQS * MODEL.vocab_size // 10)
    inner = MODEL.intermediate_size // CHIPS
    weights_of_a_layer = {f"bf16[2,{inner},8192]", f"bf16[8192,{inner}]", "bf16[1,10,128,8192]"}
    stacked = {f"bf16[{MODEL.num_layers},{one[5:]}" for one in weights_of_a_layer}
    assert copies_of(module.instructions, weights_of_a_layer | stacked | {shape}) == []

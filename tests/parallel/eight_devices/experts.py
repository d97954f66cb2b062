"""Experts on several devices: a part of each on all of them, or some of them whole on each."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxllm.errors import ConfigError
from jaxllm.execution.abstract import (
    abstract_cache,
    abstract_parameters,
    abstract_state,
    lower_step,
)
from jaxllm.execution.batch import StepShape
from jaxllm.execution.sampler import SamplerState
from jaxllm.execution.step import step
from jaxllm.models.blocks import DecoderForm
from jaxllm.models.config import MoEConfig
from jaxllm.models.decoder import Decoder
from sharding import make_mesh
from tests.parallel.eight_devices import collectives
from tests.parallel.eight_devices.same_tokens import make_llm
from tests.parallel.hlo import collectives as count_collectives
from tests.parallel.hlo import copies_of, parse
from tests.parallel.models import write_model

EXPERTS, INNER = 8, 24
MODEL = replace(collectives.MODEL, moe=MoEConfig(EXPERTS, 3, INNER, (0, 1, 2), True, 16))


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize(("tensor", "feature_major"), [(2, False), (4, True)])
def test_a_layer_of_experts_adds_up_twice_and_moves_none(
    tensor: int, feature_major: bool, expert_parallel: bool
) -> None:
    """Once for attention, once for the experts and the shared one together."""
    shape = StepShape(20, 5, 7, False)
    form = DecoderForm(
        jnp.dtype("float32"),
        feature_major,
        not feature_major,
        "xla",
        make_mesh(tensor=tensor),
        expert_parallel,
    )
    decoder = Decoder(MODEL, form)
    vocabulary = decoder.fitted.vocab_size
    lowered = lower_step(
        functools.partial(step, decoder=decoder, shape=shape, num_logprobs=5, logprobs_mode="raw_logprobs"),
        decoder,
        abstract_parameters(decoder),
        abstract_cache(decoder, collectives.PAGES, collectives.PAGE_SIZE),
        abstract_state(functools.partial(SamplerState.create, collectives.SLOTS, vocabulary), form.mesh),
        shape,
    )
    compiled = parse(lowered.compile().as_text())
    [layer] = compiled.loops_over(collectives.cache_shape(tensor))
    assert count_collectives(layer) == Counter({"all-reduce": 2})
    number, inner = (EXPERTS // tensor, INNER) if expert_parallel else (EXPERTS, INNER // tensor)
    matrices = {(2, number, 40, inner), (number, inner, 40), (2 * number, 40, inner)}
    matrices |= {(collectives.LAYERS, *sizes) for sizes in matrices}
    assert copies_of(compiled.instructions, {collectives.shape_of(*sizes) for sizes in matrices}) == []


@pytest.mark.parametrize(("data", "tensor"), [(1, 4), (2, 2)])
def test_whole_experts_on_each_device(data: int, tensor: int) -> None:
    """Of several replicas each device has others."""
    mesh = make_mesh(data=data, tensor=tensor)
    form = DecoderForm(jnp.dtype("float32"), False, True, "xla", mesh, expert_parallel=True)
    down = abstract_parameters(Decoder(MODEL, form))["layers.mlp.experts.down.weight"]
    held = {
        device.id: index[1].indices(EXPERTS)[:2]
        for device, index in down.sharding.devices_indices_map(down.shape).items()
    }
    assert held == {0: (0, 2), 1: (2, 4), 2: (4, 6), 3: (6, 8)}


def test_experts_that_cannot_be_shared_are_refused(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "sparse", "qwen2-moe")
    with pytest.raises(
        ConfigError, match=r"mlp.experts.down.weight: the axis 'experts' of size 7 .* 4 shards"
    ):
        make_llm(directory, 4, enable_expert_parallel=True)
    dense = write_model(tmp_path / "dense", "llama")
    with pytest.raises(
        ConfigError, match=r"enable_expert_parallel=True, and LlamaForCausalLM has no experts"
    ):
        make_llm(dense, 2, enable_expert_parallel=True)

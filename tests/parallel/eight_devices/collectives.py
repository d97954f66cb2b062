"""What the steps of several devices do to one another, read from the compiled modules."""

from __future__ import annotations

import argparse
import functools
import re
from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from benchmarks import scaling
from benchmarks.hlo import work
from jaxllm.execution.abstract import (
    abstract_cache,
    abstract_hidden,
    abstract_parameters,
    abstract_state,
    lower_step,
)
from jaxllm.execution.batch import StepShape
from jaxllm.execution.sampler import SamplerState
from jaxllm.execution.step import step
from jaxllm.models.blocks import DecoderForm
from jaxllm.models.config import ModelConfig, MoEConfig, RopeConfig
from jaxllm.models.decoder import Decoder
from jaxllm.models.pipelined_decoder import make_decoder
from pallas_kernels import matmul
from sharding import make_mesh
from tests.parallel.hlo import Module, collectives, copies_of, parse, replica_groups

LAYERS, VOCABULARY = 3, 6000
MODEL = ModelConfig(
    "LlamaForCausalLM", VOCABULARY, 40, 88, LAYERS, 16, 8, 6, 256, rope=RopeConfig(1e4, 6), qk_norm="head"
)
PAGES, PAGE_SIZE, SLOTS = 11, 4, 5
DECODE, MIXED = StepShape(5, 5, 7, True), StepShape(20, 5, 7, False)
STEPS = pytest.mark.parametrize(
    ("tensor", "feature_major", "shape"), [(2, False, DECODE), (4, True, MIXED), (8, False, MIXED)]
)


@pytest.fixture(autouse=True)
def _products_of_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of a kernel are not in the module."""
    monkeypatch.setattr(matmul, "default_backend", lambda dtype: "xla")


def shape_of(*sizes: int) -> str:
    return f"f32[{','.join(map(str, sizes))}]"


def cache_shape(tensor: int) -> str:
    return shape_of(LAYERS, PAGES, PAGE_SIZE, 16 // tensor, 6)


def lower(tensor: int, feature_major: bool, shape: StepShape) -> jax.stages.Lowered:
    """A step in the form of CPUs (a loop over lists of arrays) or of accelerators (a scan)."""
    mesh = None if tensor == 1 else make_mesh(tensor=tensor)
    form = DecoderForm(jnp.dtype("float32"), feature_major, not feature_major, "xla", mesh)
    decoder = Decoder(MODEL, form)
    return lower_step(
        functools.partial(step, decoder=decoder, shape=shape, num_logprobs=5, logprobs_mode="raw_logprobs"),
        decoder,
        abstract_parameters(decoder),
        abstract_cache(decoder, PAGES, PAGE_SIZE),
        abstract_state(functools.partial(SamplerState.create, SLOTS, decoder.fitted.vocab_size), mesh),
        shape,
    )


@functools.cache
def module(tensor: int, feature_major: bool, shape: StepShape) -> Module:
    return parse(lower(tensor, feature_major, shape).compile().as_text())


@STEPS
def test_a_layer_adds_up_twice_and_nothing_else(tensor: int, feature_major: bool, shape: StepShape) -> None:
    compiled = module(tensor, feature_major, shape)
    [layer] = compiled.loops_over(cache_shape(tensor))
    assert collectives(layer) == Counter({"all-reduce": 2})


@STEPS
def test_no_weight_and_no_cache_is_moved(tensor: int, feature_major: bool, shape: StepShape) -> None:
    compiled = module(tensor, feature_major, shape)
    rows = -(-VOCABULARY // (256 * tensor)) * 256
    large = {cache_shape(tensor), cache_shape(1), shape_of(rows, 40), shape_of(rows * tensor, 40)}
    for parts in (tensor, 1):
        weights = [(8 // parts, 4, 6, 40), (40, 8 // parts, 2, 6), (2, 88 // parts, 40), (40, 88 // parts)]
        large |= {shape_of(*w) for w in weights} | {shape_of(LAYERS, *w) for w in weights}
    assert copies_of(compiled.instructions, large) == []


@STEPS
def test_logits_stay_where_they_are(tensor: int, feature_major: bool, shape: StepShape) -> None:
    """Whatever a request asks for: what moves of a row is a chunk of the vocabulary or less."""
    compiled = module(tensor, feature_major, shape)
    moved = [one for one in compiled.instructions if collectives([one])]
    assert moved
    rows = shape.num_seqs if shape.decode_only else shape.num_tokens
    for one in moved:
        assert one.num_elements <= rows * max(VOCABULARY // 10, MODEL.hidden_size), one


def test_one_device_is_lowered_without_a_mesh() -> None:
    for feature_major in (False, True):
        assert not re.search("all_reduce|collective|shard|mesh", lower(1, feature_major, MIXED).as_text())
    assert re.search("all_reduce", lower(2, False, MIXED).as_text())


@STEPS
def test_work_by_hand(tensor: int, feature_major: bool, shape: StepShape) -> None:
    """What `benchmarks.scaling` counts in a module is what Megatron's split comes to on paper."""
    counted = work(module(tensor, feature_major, shape))
    heads, hidden, head_dim, inner = 16, MODEL.hidden_size, MODEL.head_dim, MODEL.intermediate_size
    rows = -(-VOCABULARY // (256 * tensor)) * 256
    layer = hidden * head_dim * (2 * heads + 2 * 8) // tensor + 3 * hidden * inner // tensor
    assert counted.flops == 2 * (LAYERS * layer * shape.num_tokens + hidden * rows * shape.num_seqs)
    # Twice a layer, and once for the embeddings; the sampler's are a chunk of the vocabulary at most.
    sums = (2 * LAYERS + 1) * shape.num_tokens * hidden
    assert 0 <= counted.elements["all-reduce"] - sums <= (256 + 8) * shape.num_seqs
    assert counted.collectives["all-reduce"] >= 2 * LAYERS + 1


def test_what_a_device_holds_by_hand() -> None:
    options = argparse.Namespace(seqs_per_chip=2, tokens_per_chip=9, context=100, dtype="bfloat16")
    one = scaling.count(MODEL, "decode", 1, 4, options)
    layer = 40 * 6 * (2 * 16 + 2 * 8) // 4 + 3 * 40 * 88 // 4
    norms = 2 * 40 + 2 * 6
    table = 40 * 6144 // 4
    assert one.weight_bytes == 2 * (LAYERS * (layer + norms) + 40 + 2 * table)
    assert one.read_bytes == one.weight_bytes - 2 * table  # the embeddings are only looked up
    assert one.kv_bytes == 2 * 8 * 100 * LAYERS * 2 * 2 * 6
    assert one.attention_flops == 4 * 8 * 100 * LAYERS * 4 * 6
    assert one.num_tokens == 8
    assert one.all_reduce_bytes >= 2 * (2 * LAYERS + 1) * 8 * 40
    assert one.all_to_alls == one.expert_flops == 0


def test_what_scaling_counts_of_replicas_that_share_experts() -> None:
    """Two of two devices: each has two of eight experts, and may send 16 rows to the other replica."""
    model = replace(MODEL, moe=MoEConfig(8, 3, 24, tuple(range(LAYERS)), True, 0))
    options = argparse.Namespace(seqs_per_chip=4, tokens_per_chip=4, context=100, dtype="bfloat16")
    one = scaling.count(model, "decode", 2, 2, options)
    assert (one.chips, one.num_tokens) == (4, 8)
    # 48 rows of both replicas, evenly over four devices.
    expert = 3 * 40 * 24
    assert one.expert_flops == 2 * LAYERS * 48 // 4 * expert
    whole = scaling.count(model, "decode", 1, 2, options)
    assert whole.expert_flops == one.expert_flops
    assert whole.weight_bytes - one.weight_bytes == 2 * LAYERS * 2 * expert
    # Of the eight, those that one of 16 tokens takes.
    taken = 8 * (1 - (5 / 8) ** 16)
    looked_up = 2 * 40 * 6144 // 2
    assert one.read_bytes == pytest.approx(
        one.weight_bytes - looked_up - 2 * LAYERS * expert * 2 * (1 - taken / 8), abs=2
    )
    assert (one.all_to_alls, whole.all_to_alls) == (3 * LAYERS, 0)
    assert one.all_to_all_bytes == 2 * LAYERS * 2 * 16 * (2 * 40 + 1)


def pipelined(model: ModelConfig, form: DecoderForm, shape: StepShape) -> str:
    """The compiled module of a step in stages, of one replica or of several."""
    decoder, replicas = make_decoder(model, form), form.axis_size("data")
    vocabulary = decoder.fitted.vocab_size
    state = functools.partial(SamplerState.create, SLOTS, vocabulary, replicas)
    lowered = lower_step(
        functools.partial(step, decoder=decoder, shape=shape, num_logprobs=5, logprobs_mode="raw_logprobs"),
        decoder,
        abstract_parameters(decoder),
        (abstract_cache(decoder, PAGES, PAGE_SIZE), abstract_hidden(decoder, 20)),
        abstract_state(state, form.mesh),
        shape,
    )
    return lowered.compile().as_text() or ""


@pytest.mark.parametrize(
    ("pipe", "tensor", "feature_major", "shape"),
    [(2, 1, True, MIXED), (2, 2, False, DECODE), (2, 4, False, MIXED)],
)
def test_stages_hand_on_hidden_states_and_nothing_else(
    pipe: int, tensor: int, feature_major: bool, shape: StepShape
) -> None:
    """In the loop what tensor parallelism says; around it one permute, and sums of rows and embeddings."""
    form = DecoderForm(jnp.dtype("float32"), feature_major, True, "xla", make_mesh(pipe=pipe, tensor=tensor))
    compiled = parse(pipelined(MODEL, form, shape))
    places = -(-LAYERS // pipe)
    cache = shape_of(places, PAGES, PAGE_SIZE, 16 // tensor, 6)
    [layer] = compiled.loops_over(cache)
    assert collectives(layer) == (Counter({"all-reduce": 2}) if tensor > 1 else Counter())
    moved = [one for one in compiled.instructions if collectives([one])]
    [permute] = [one for one in moved if one.opcode.startswith("collective-permute")]
    assert permute.num_elements == shape.num_tokens * MODEL.hidden_size
    rows = max(shape.num_seqs, shape.num_tokens)
    assert max(one.num_elements for one in moved) <= rows * max(MODEL.hidden_size, VOCABULARY // 10)
    vocabulary = -(-VOCABULARY // (256 * tensor * pipe)) * 256
    weights = [(8 // tensor, 4, 6, 40), (40, 96 // tensor), (2, 88 // tensor, 40), (40, 88 // tensor)]
    large = {shape_of(*prefix, *w) for w in weights for prefix in ((places,), (places * pipe,))}
    large |= {cache, shape_of(vocabulary, 40), shape_of(vocabulary * tensor * pipe, 40)}
    assert copies_of(compiled.instructions, large) == []


def test_replicas_of_stages_of_unlike_layers_share_experts_and_nothing_else() -> None:
    """Layers 0 and 2 have experts and layer 1 has none; all devices of a stage take the same branch."""
    model = replace(MODEL, moe=MoEConfig(8, 3, 24, (0, 2), True, 16))
    mesh = make_mesh(data=2, pipe=2, tensor=2)
    form = DecoderForm(jnp.dtype("float32"), False, True, "xla", mesh, expert_parallel=True)
    text = pipelined(model, form, MIXED)
    compiled, places = parse(text), 2
    cache = shape_of(places, PAGES, PAGE_SIZE, 8, 6)
    [layer] = compiled.loops_over(cache)
    # Attention adds up, and so does either branch; experts say how many rounds all make, and exchange tokens,
    # their numbers, and results.
    assert collectives(layer) == Counter({"all-reduce": 4, "all-to-all": 3})
    [permute] = [one for one in compiled.instructions if one.opcode.startswith("collective-permute")]
    assert permute.num_elements == MIXED.num_tokens * MODEL.hidden_size
    # Devices are numbered by replica, stage, and shard: who talks to other replicas is of the same stage.
    for one in compiled.instructions:
        if not collectives([one]) or one is permute:
            continue
        [groups] = replica_groups(one.line)
        for members in groups:
            if len({device // 4 for device in members}) > 1:
                assert len({device // 2 % 2 for device in members}) == 1
                assert one.opcode == "all-to-all" or one.num_elements == 1, one
    # Each device has its stage's one MLP, or the place of it, and two experts of a layer.
    weights = [(40, 44), (2, 44, 40), (2, 2, 40, 24), (2, 24, 40), (4, 40, 24)]
    large = {shape_of(*prefix, *w) for w in weights for prefix in ((), (1,), (places,))} | {cache}
    copies = copies_of(compiled.instructions, large)
    # A CPU slices what it multiplies by, as in every scan; nothing else moves.
    assert {one.opcode for one in copies} <= {"dynamic-slice", "reshape"}, copies

"""The KV cache of models with few or narrow heads: no step compiled for a TPU copies it."""

from __future__ import annotations

import functools
import importlib.util
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh

from benchmarks.shapes import SHAPES
from jaxllm.execution.abstract import abstract_cache, abstract_parameters, abstract_state, lower_step
from jaxllm.execution.batch import StepShape
from jaxllm.execution.sampler import SamplerState
from jaxllm.execution.step import step
from jaxllm.execution.token_masks import TokenMasks
from jaxllm.models.decoder import Decoder, DecoderForm
from jaxllm.models.families import translate_config
from tests.kernels.compile_tpu import without_a_chip
from tests.parallel.hlo import collectives, parse

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler (pip install 'jaxllm[tpu]')"
)

NUM_SEQS, PAGES_PER_SEQ, NUM_PAGES, PAGE_SIZE = 64, 128, 2048, 16
SHAPES_OF_STEPS = {
    "decode": StepShape(NUM_SEQS, NUM_SEQS, PAGES_PER_SEQ, True),
    "mixed": StepShape(512, NUM_SEQS, PAGES_PER_SEQ, False),
}


def compile_step(topology: str, tensor: int, name: str, kind: str) -> tuple[Any, Decoder]:
    """The executable, and the decoder that it is of."""
    without_a_chip()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices[:tensor]
    mesh = Mesh(np.array(devices).reshape(1, 1, tensor), ("data", "pipe", "tensor"))
    form = DecoderForm(jnp.dtype("bfloat16"), False, True, "tpu", mesh=mesh)
    decoder = Decoder(translate_config(SHAPES[name], {}), form)
    shape, vocab_size = SHAPES_OF_STEPS[kind], decoder.fitted.vocab_size
    run = functools.partial(step, decoder=decoder, shape=shape, num_logprobs=5, logprobs_mode="raw_logprobs")
    lowered = lower_step(
        run,
        decoder,
        abstract_parameters(decoder),
        abstract_cache(decoder, NUM_PAGES, PAGE_SIZE),
        abstract_state(functools.partial(SamplerState.create, NUM_SEQS, vocab_size), mesh),
        TokenMasks(vocab_size).abstract(NUM_SEQS),
        shape,
    )
    return lowered.compile(), decoder


def local_cache_shape(decoder: Decoder, tensor: int) -> tuple[int, ...]:
    *sizes, rows, width = abstract_cache(decoder, NUM_PAGES, PAGE_SIZE).shape
    return (*sizes, rows // tensor, width)


@pytest.mark.parametrize(
    ("topology", "tensor", "shape", "kind"),
    [
        ("v5e:2x4", 1, "llama-135m", "decode"),  # three rows of 128 numbers to a token
        ("v6e:2x4", 8, "llama-3.1-8b", "mixed"),  # two
    ],
)
def test_the_cache_stays_where_it_is(topology: str, tensor: int, shape: str, kind: str) -> None:
    compiled, decoder = compile_step(topology, tensor, shape, kind)
    module = parse(compiled.as_text())
    cache = math.prod(abstract_cache(decoder, NUM_PAGES, PAGE_SIZE).shape) // tensor
    (layers,) = module.loops_over(f"bf16[{','.join(map(str, local_cache_shape(decoder, tensor)))}]")
    assert collectives(layers) == ({"all-reduce": 2} if tensor > 1 else {})
    matrix = min(
        math.prod(spec.shape) // tensor
        for name, spec in decoder.parameter_specs().items()
        if name.startswith("layers.") and name.endswith(".weight") and len(spec.shape) > 1
    )
    moves = ("copy", "transpose", "copy-start")
    assert not [i for i in module.instructions if i.opcode in moves and i.num_elements >= cache]
    # The output projection, the smallest, is laid out anew where a shard has few heads of a group.
    assert not [i for i in layers if i.opcode in moves and i.num_elements > matrix]
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 2 * cache  # in bfloat16, written in place
    assert memory.temp_size_in_bytes < 256 << 20

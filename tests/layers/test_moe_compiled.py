"""What a compiled step does with experts: it reads those that are chosen, where they are, and copies none."""

from __future__ import annotations

import importlib.util
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxllm.models.blocks import DecoderForm
from jaxllm.models.decoder import Decoder, TokenInputs
from jaxllm.models.families import translate_config
from pallas_kernels.grouped_matmul import grouped_matmul
from pallas_kernels.grouped_matmul.shapes import EXPERTS
from tests.parity.cases import CASES

NUM_EXPERTS, HIDDEN, INNER, LAYERS = 64, 56, 40, 3
CONFIG = translate_config(
    {
        **CASES["qwen3-moe"].config,
        "hidden_size": HIDDEN,
        "moe_intermediate_size": INNER,
        "num_experts": NUM_EXPERTS,
        "num_hidden_layers": LAYERS,
    }
)
NOTHING_MOVES = {"parameter", "get-tuple-element", "bitcast", "tuple"}


def compiled_step(stacked: bool, num_tokens: int) -> Any:
    """The decoder over one sequence's tokens, or that many decodes."""
    decoder = Decoder(CONFIG, DecoderForm(jnp.dtype("float32"), not stacked, stacked, "xla"))

    def parameter(spec: Any) -> Any:
        if spec.num_layers is None:
            return jax.ShapeDtypeStruct(spec.shape, jnp.float32)
        if stacked:
            return jax.ShapeDtypeStruct((spec.num_layers, *spec.shape), jnp.float32)
        return [jax.ShapeDtypeStruct(spec.shape, jnp.float32)] * spec.num_layers

    shapes = {"token_ids": (num_tokens,), "positions": (num_tokens,), "rope_lengths": (num_tokens,)}
    shapes |= {"page_table": (4, 6), "seq_lens": (4,), "query_starts": (5,)}
    inputs = TokenInputs(**{name: jax.ShapeDtypeStruct(s, jnp.int32) for name, s in shapes.items()})
    cache = (LAYERS, 26, 4, 2 * CONFIG.num_kv_heads, CONFIG.head_dim)
    return (
        jax.jit(decoder, donate_argnums=1)
        .lower(
            {name: parameter(spec) for name, spec in decoder.parameter_specs().items()},
            jax.ShapeDtypeStruct(cache, jnp.float32),
            inputs,
        )
        .compile()
    )


def opcodes_with_experts(module: str) -> set[str]:
    """What the module does that results in the matrices of many experts at once."""
    found = set()
    for line in module.splitlines():
        if match := re.match(r"\s*(?:ROOT )?%\S+ = f32\[([\d,]+)\]\S* ([\w-]+)\(", line):
            shape = tuple(map(int, match[1].split(",")))
            if shape[-2:] in ((HIDDEN, INNER), (INNER, HIDDEN)) and math.prod(shape[:-2]) >= NUM_EXPERTS:
                found.add(match[2])
    return found


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("num_tokens", [4, 40])
def test_experts_stay_where_they_are(stacked: bool, num_tokens: int) -> None:
    compiled = compiled_step(stacked, num_tokens)
    module = compiled.as_text()
    assert opcodes_with_experts(module) - NOTHING_MOVES == set()
    # What is taken of them is a matrix of one expert, ...
    assert re.search(rf"f32\[1,{HIDDEN},{INNER}\]\S* dynamic-slice\(", module)
    # ... and all that the step needs beside weights and cache is less than the experts of one layer.
    layer_bytes = 3 * NUM_EXPERTS * HIDDEN * INNER * 4
    assert compiled.memory_analysis().temp_size_in_bytes < layer_bytes


def test_the_check_sees_experts_that_are_moved() -> None:
    def dense(rows: jax.Array, weights: jax.Array, sizes: jax.Array) -> jax.Array:
        return grouped_matmul(rows, weights * 2, sizes, backend="reference")

    shapes = ((8, HIDDEN), (NUM_EXPERTS, HIDDEN, INNER))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    sizes = jax.ShapeDtypeStruct((NUM_EXPERTS,), jnp.int32)
    module = jax.jit(dense).lower(*arrays, sizes).compile().as_text()
    assert opcodes_with_experts(module) - NOTHING_MOVES


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the TPU compiler (pip install 'jaxllm[tpu]')"
)
@pytest.mark.parametrize("num_tokens", [8, 512])
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_a_tpu_multiplies_experts_in_place(chip: str, num_tokens: int) -> None:
    """Layers' experts in one stack, as a scan over layers passes them."""
    from tests.kernels.compile_tpu import sharding_on

    here, shape, layers = sharding_on(chip), EXPERTS["qwen3-30b-a3b"], 4
    stack = (layers, shape.experts, shape.hidden, shape.inner)

    def run(rows: jax.Array, up: jax.Array, down: jax.Array, sizes: jax.Array) -> jax.Array:
        def layer(index: jax.Array, rows: jax.Array) -> jax.Array:
            for stack in (up, down):
                matrices = stack.reshape(-1, *stack.shape[2:])
                rows = grouped_matmul(rows, matrices, sizes, first_group=index * shape.experts)
            return rows

        return jax.lax.fori_loop(0, layers, layer, rows)

    def array(shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    rows = array((shape.rows(num_tokens), shape.hidden))
    down = (*stack[:2], shape.inner, shape.hidden)
    sizes = array((shape.experts,), jnp.int32)
    compiled = jax.jit(run).lower(rows, array(stack), array(down), sizes).compile()
    assert "tpu_custom_call" in compiled.as_text()
    # Activations, several times over; the weights of one expert alone are 3 MiB, of a layer 384 MiB.
    activations = 4 * shape.rows(num_tokens) * (shape.hidden + shape.inner) * 4
    assert compiled.memory_analysis().temp_size_in_bytes < activations + 2**20

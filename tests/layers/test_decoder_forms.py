"""Whatever form a platform runs it in, the decoder computes what the plain forward pass computes."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.blocks import DecoderForm
from jaxllm.models.config import ModelConfig
from jaxllm.models.decoder import Decoder, TokenInputs
from jaxllm.models.families import translate_config
from pallas_kernels.ragged_paged_attention import Backend
from tests.parity.cases import CASES
from tests.parity.reference_forward import forward

FORMS = [(feature_major, stacked) for feature_major in (False, True) for stacked in (False, True)]
# Between the two, every field of the decoder: gates, biases, norms of both kinds and places, query-key
# norm, learned and rotary positions, projections, tied and untied heads, windows in some layers.
# With experts: in some layers only, with a shared one, with a norm over all heads.
# At last latent attention, with experts in groups.
NAMES = (
    "qwen2-layer-types",
    "opt-post-norm-projected",
    "qwen2-moe-every-other-layer",
    "olmoe-clipped",
    "deepseek-v3",
)
PAGE_SIZE = 4
# A prompt in the second chunk of its prefill, an empty row, a decode, and a prompt that begins.
CONTEXTS, QUERIES = (6, 0, 17, 0), (9, 0, 1, 12)


@functools.cache
def model(name: str) -> ModelConfig:
    config = translate_config(dict(CASES[name].config), {})
    if config.gated_mlp and config.moe is None:
        return replace(config, qk_norm="head", output_bias=True, mlp_bias=True)
    return config


@functools.cache
def layered_parameters(name: str) -> dict[str, np.ndarray]:
    """Random, also where a fresh model would have ones and zeros; per-layer ones stacked."""
    rng = np.random.default_rng(0)
    form = DecoderForm(jnp.float32, False, False, "reference")
    parameters = {}
    for key, spec in Decoder(model(name), form).parameter_specs().items():
        shape = spec.shape if spec.num_layers is None else (spec.num_layers, *spec.shape)
        is_norm = "norm" in key and key.endswith("weight")
        values = rng.normal(scale=0.1 if is_norm else 0.15, size=shape) + is_norm
        parameters[key] = values.astype(np.float32)
    return parameters


@functools.cache
def sequences(name: str) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [
        rng.integers(model(name).vocab_size, size=c + q).tolist()
        for c, q in zip(CONTEXTS, QUERIES, strict=True)
    ]


@functools.cache
def expected(name: str) -> np.ndarray:
    """Logits of the plain forward pass at the rows of the packed batch."""
    rows = [
        forward(model(name), layered_parameters(name), tokens)[context:]
        for tokens, context in zip(sequences(name), CONTEXTS, strict=True)
        if tokens
    ]
    return np.concatenate(rows)


def batch_of(tokens: list[list[int]], contexts: tuple[int, ...], num_rows: int) -> TokenInputs:
    queries = [one[context:] for one, context in zip(tokens, contexts, strict=True)]
    positions = [i + c for one, c in zip(queries, contexts, strict=True) for i in range(len(one))]
    packed = [token for one in queries for token in one]
    padding = num_rows - len(packed)
    pages_per_seq = 6
    table = 1 + np.arange(len(tokens) * pages_per_seq).reshape(len(tokens), pages_per_seq)
    positions = np.array(positions + [0] * padding, np.int32)
    return TokenInputs(
        token_ids=np.array(packed + [0] * padding, np.int32),
        positions=positions,
        rope_lengths=positions + 1,
        page_table=table.astype(np.int32),
        seq_lens=np.array([len(one) for one in tokens], np.int32),
        query_starts=np.cumsum([0, *map(len, queries)]).astype(np.int32),
    )


def logits_of(
    name: str, feature_major: bool, stacked: bool, dtype: Any = jnp.float32, backend: Backend = "reference"
) -> np.ndarray:
    """The packed batch's logits, after a step that has filled the cache with the contexts."""
    config = model(name)
    decoder = Decoder(config, DecoderForm(jnp.dtype(dtype), feature_major, stacked, backend))
    parameters: dict[str, Any] = {
        key: list(value.astype(dtype)) if key.startswith("layers.") and not stacked else value.astype(dtype)
        for key, value in layered_parameters(name).items()
    }

    @jax.jit
    def step(parameters: Any, kv_pages: jax.Array, inputs: TokenInputs) -> tuple[jax.Array, jax.Array]:
        hidden, kv_pages = decoder(parameters, kv_pages, inputs)
        assert hidden.shape == ((config.hidden_size, 24) if feature_major else (24, config.hidden_size))
        return decoder.logits(parameters, hidden, jnp.arange(24)), kv_pages

    cache = jnp.full(decoder.cache_spec(26, PAGE_SIZE).shape, jnp.nan, dtype)
    tokens = sequences(name)
    contexts = [one[:c] for one, c in zip(tokens, CONTEXTS, strict=True)]
    _, cache = step(parameters, cache, batch_of(contexts, (0, 0, 0, 0), 24))
    logits, _ = step(parameters, cache, batch_of(tokens, CONTEXTS, 24))
    assert logits.dtype == jnp.float32
    return np.asarray(logits)[: sum(QUERIES)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("feature_major", "stacked"), FORMS)
def test_every_form_computes_the_forward_pass(name: str, feature_major: bool, stacked: bool) -> None:
    exact = expected(name)
    error = np.linalg.norm(logits_of(name, feature_major, stacked) - exact)
    assert error <= 1e-5 * np.linalg.norm(exact)  # float32 through three layers


def test_form_of_accelerators_with_the_kernel_they_run() -> None:
    exact = expected("qwen2-layer-types")
    error = np.linalg.norm(logits_of("qwen2-layer-types", False, True, backend="xla") - exact)
    assert error <= 1e-5 * np.linalg.norm(exact)


def test_bfloat16_differs_by_its_rounding_only() -> None:
    """The form of accelerators in their dtype: a dozen roundings of 2**-9, not a different result."""
    exact = expected("qwen2-layer-types")
    logits = logits_of("qwen2-layer-types", False, True, jnp.bfloat16)
    assert np.linalg.norm(logits - exact) <= 0.03 * np.linalg.norm(exact)

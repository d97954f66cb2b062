"""Sampling against the exact distribution, written out in numpy from the definition of each parameter."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, fields, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special, stats

from jaxllm.execution.sampler import (
    NO_TOKEN,
    Logprobs,
    SamplerState,
    SamplingInputs,
    greedy_token,
    sample,
)

DRAWS = 3000


@dataclass(frozen=True)
class Params:
    """Sampling parameters of a row."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    uses_bias: bool = False
    uses_penalties: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        is_used = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)
        object.__setattr__(self, "uses_penalties", is_used)


PARAMS = {
    "plain": Params(),
    "cold": Params(temperature=0.4),
    "hot": Params(temperature=1.7),
    "top_k": Params(top_k=5),
    "top_k of one": Params(top_k=1),
    "top_k beyond the vocabulary": Params(top_k=10_000),
    "top_p": Params(top_p=0.7),
    "tiny top_p": Params(top_p=1e-50),
    "min_p": Params(min_p=0.2),
    "truncated in every way": Params(temperature=1.5, top_k=12, top_p=0.8, min_p=0.03),
    "repetition": Params(repetition_penalty=1.8),
    "repetition below one": Params(repetition_penalty=0.6),
    "presence": Params(presence_penalty=1.5),
    "frequency": Params(frequency_penalty=-0.7),
    "bias": Params(uses_bias=True),
    "everything": Params(0.8, 20, 0.9, 0.02, 1.3, 0.5, 0.4, uses_bias=True),
}
NAMES = list(PARAMS)


@dataclass(frozen=True)
class Slot:
    """What one slot of the state holds, and the model's logits."""

    logits: np.ndarray
    counts: np.ndarray
    in_prompt: np.ndarray
    bias: np.ndarray


@functools.cache
def slot_for(vocab_size: int) -> Slot:
    rng = np.random.default_rng(vocab_size)
    logits = rng.normal(scale=2.0, size=vocab_size).astype(np.float32)
    counts = np.where(rng.random(vocab_size) < 0.3, rng.integers(1, 4, vocab_size), 0).astype(np.int32)
    bias = np.where(rng.random(vocab_size) < 0.3, rng.normal(scale=3.0, size=vocab_size), 0)
    bias[rng.random(vocab_size) < 0.3] = -np.inf
    bias[0] = 1.0
    return Slot(logits, counts, rng.random(vocab_size) < 0.3, bias.astype(np.float32))


def softmax(x: np.ndarray) -> np.ndarray:
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def processed_logits(slot: Slot, params: Params) -> np.ndarray:
    """float64[V] logits to draw from: bias, penalties, temperature, min-p, top-k, top-p, in that order."""
    x = slot.logits.astype(np.float64)
    if params.uses_bias:
        x = x + slot.bias
    in_output = slot.counts > 0
    scaled = np.where(x > 0, x / params.repetition_penalty, x * params.repetition_penalty)
    x = np.where(slot.in_prompt | in_output, scaled, x)
    x = x - params.frequency_penalty * slot.counts - params.presence_penalty * in_output
    if params.temperature == 0:
        return x
    x = x / params.temperature
    probabilities = softmax(x)
    x = np.where(probabilities >= params.min_p * probabilities.max(), x, -np.inf)
    if 0 < params.top_k < len(x):
        x = np.where(x >= np.sort(x)[-params.top_k], x, -np.inf)
    if params.top_p < 1:
        order = np.argsort(-x)
        sorted_probabilities = softmax(x)[order]
        before = np.cumsum(sorted_probabilities) - sorted_probabilities
        x[order[before >= params.top_p]] = -np.inf
        assert np.isfinite(x).any()
    return x


def inputs_of(
    rows: list[Params], seeds: Any, positions: Any, slots: Any = None, samples: Any = None
) -> SamplingInputs:
    count = len(rows)
    dtypes = {"top_k": np.int32, "uses_bias": bool, "uses_penalties": bool}
    columns = {
        f.name: np.array([getattr(row, f.name) for row in rows], dtypes.get(f.name, np.float32))
        for f in fields(Params)
    }
    return SamplingInputs(
        slots=np.zeros(count, np.int32) if slots is None else np.asarray(slots, np.int32),
        samples=np.ones(count, bool) if samples is None else np.asarray(samples, bool),
        seeds=np.broadcast_to(np.asarray(seeds, np.uint32), count),
        positions=np.broadcast_to(np.asarray(positions, np.int32), count),
        **columns,
    )


def state_of(*slots: Slot) -> SamplerState:
    """Four slots, of which those after the given ones hold nothing, and the row of padding."""
    vocab_size = len(slots[0].logits)
    empty = Slot(slots[0].logits, *(np.zeros(vocab_size, d) for d in (np.int32, bool, np.float32)))
    rows = (*slots, *[empty] * (5 - len(slots)))
    return SamplerState(
        jnp.full(5, 3, jnp.int32),
        jnp.array(np.stack([s.counts for s in rows])),
        jnp.array(np.stack([s.in_prompt for s in rows])),
        jnp.array(np.stack([s.bias for s in rows])),
    )


_sample = jax.jit(sample, static_argnames=("num_logprobs", "logprobs_mode"))


def run(
    logits: np.ndarray,
    inputs: SamplingInputs,
    state: SamplerState,
    *,
    num_logprobs: int = 8,
    wants: bool = False,
    mode: str = "raw_logprobs",
    allowed: np.ndarray | None = None,
) -> tuple[np.ndarray, Logprobs, SamplerState]:
    """Small batches are padded to one size, as the engine pads them (and compile once).

    Args:
        allowed: bool[S, V], what a mask lets through.
    """
    count = len(logits)
    if padding := max(8 - count, 0):
        empty = inputs_of([Params()] * padding, 0, 0, slots=[4] * padding, samples=[False] * padding)
        inputs = jax.tree.map(lambda *xs: np.concatenate(xs), inputs, empty)
        logits = np.concatenate([logits, np.zeros((padding, logits.shape[1]), np.float32)])
    masks = None
    if allowed is not None:
        masks = np.zeros((len(logits), -(-logits.shape[1] // 32)), np.int32)
        masks[:count] = pack(allowed)
    token, logprobs, state = _sample(
        logits,
        inputs,
        state,
        masks,
        num_logprobs=min(num_logprobs, logits.shape[1]),
        wants_logprobs=np.bool_(wants),
        logprobs_mode=mode,
    )
    token, logprobs = jax.tree.map(lambda x: np.asarray(x)[:count], (token, logprobs))
    return token, logprobs, jax.tree.map(np.asarray, state)


def pack(allowed: np.ndarray) -> np.ndarray:
    """bool[S, V] to int32[S, ceil(V / 32)], the lowest bit first; bits past the vocabulary are set."""
    padded = np.pad(allowed, ((0, 0), (0, -allowed.shape[1] % 32)), constant_values=True)
    return np.packbits(padded, axis=1, bitorder="little").view(np.int32)


@functools.cache
def drawn(vocab_size: int) -> dict[str, np.ndarray]:
    """DRAWS tokens for each set of parameters, all of them in one batch, in mixed order."""
    slot = slot_for(vocab_size)
    names = NAMES * DRAWS
    index = np.arange(len(names)) // len(NAMES)
    logits = np.broadcast_to(slot.logits, (len(names), vocab_size))
    # Half of the draws differ by the seed, half by the position.
    seeds, positions = np.where(index % 2, index, 7), np.where(index % 2, 11, index)
    inputs = inputs_of([PARAMS[name] for name in names], seeds, positions)
    tokens = run(logits, inputs, state_of(slot))[0]
    return {name: tokens[i :: len(NAMES)] for i, name in enumerate(NAMES)}


def p_value(tokens: np.ndarray, probabilities: np.ndarray) -> float:
    """Of a chi-square test, tokens of few expected draws taken together."""
    observed = np.bincount(tokens, minlength=len(probabilities)).astype(np.float64)
    assert observed[probabilities == 0].sum() == 0, "drew a token that is cut off"
    order = np.argsort(probabilities)
    order = order[probabilities[order] > 0]
    expected = probabilities[order] * len(tokens)
    _, group = np.unique(np.cumsum(expected) // 8, return_inverse=True)
    group = np.minimum(group, max(group[-1] - 1, 0))  # the last one may be small and joins its neighbour
    observed, expected = np.bincount(group, observed[order]), np.bincount(group, expected)
    if len(expected) == 1:
        return 1.0
    return float(stats.chisquare(observed, expected * observed.sum() / expected.sum()).pvalue)


@pytest.mark.parametrize("vocab_size", [7, 301])
@pytest.mark.parametrize("name", NAMES)
def test_draws_follow_the_exact_distribution(name: str, vocab_size: int) -> None:
    probabilities = softmax(processed_logits(slot_for(vocab_size), PARAMS[name]))
    assert p_value(drawn(vocab_size)[name], probabilities) > 1e-4


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("plain", replace(PARAMS["plain"], temperature=1.2)),
        ("top_k", replace(PARAMS["top_k"], top_k=6)),
        ("top_k", replace(PARAMS["top_k"], top_k=4)),
        ("top_p", replace(PARAMS["top_p"], top_p=0.75)),
        ("min_p", replace(PARAMS["min_p"], min_p=0.3)),
        ("repetition", replace(PARAMS["repetition"], repetition_penalty=1.3)),
        ("presence", replace(PARAMS["presence"], presence_penalty=0.5)),
        ("frequency", replace(PARAMS["frequency"], frequency_penalty=-0.5)),
        ("bias", replace(PARAMS["bias"], uses_bias=False)),
    ],
)
def test_the_chi_square_test_tells_other_parameters_apart(name: str, wrong: Params) -> None:
    probabilities = softmax(processed_logits(slot_for(301), wrong))
    try:
        p = p_value(drawn(301)[name], probabilities)
    except AssertionError:
        return  # a token that these parameters cut off
    assert p < 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_a_draw_depends_on_seed_and_position_alone(name: str) -> None:
    """In whatever batch and row: here alone, with few others, and above among all kinds."""
    slot, vocab_size = slot_for(301), 301
    for index in (4, 5):
        seed, position = (index, 11) if index % 2 else (7, index)
        expected = drawn(vocab_size)[name][index]
        row, others = PARAMS[name], [PARAMS["plain"], PARAMS["cold"], Params(temperature=0)]
        alone = inputs_of([row], seed, position)
        assert run(slot.logits[None], alone, state_of(slot))[0][0] == expected
        batch = inputs_of(
            [*others, row], [1, 2, 3, seed], [0, 0, 0, position], samples=[True, False, True, True]
        )
        logits = np.stack([slot.logits[::-1], slot.logits * 2, slot.logits * 0, slot.logits])
        assert run(logits, batch, state_of(slot))[0][3] == expected


def test_seeds_use_all_32_bits() -> None:
    """Neighbouring seeds and positions, and seeds that differ in the highest bit, draw apart."""
    vocab_size = 301
    logits = np.zeros((256, vocab_size), np.float32)
    low, high = np.arange(128), np.arange(128) + 2**31
    inputs = inputs_of([Params()] * 256, np.concatenate([low, high]), 0)
    tokens = run(logits, inputs, state_of(slot_for(vocab_size)))[0]
    assert np.mean(tokens[:128] == tokens[128:]) < 0.05
    assert len(set(tokens.tolist())) > 120


def test_ties_at_the_cut_are_kept() -> None:
    logits = np.tile(np.array([0, 2, 2, 2, -1, 0, 0], np.float32), (DRAWS, 1))
    state = state_of(slot_for(7))
    for params in (Params(top_k=2), Params(top_p=0.3)):
        tokens = run(logits, inputs_of([params] * DRAWS, np.arange(DRAWS), 0), state)[0]
        assert p_value(tokens, np.array([0, 1, 1, 1, 0, 0, 0]) / 3) > 1e-4


@pytest.mark.parametrize("vocab_size", [1, 255, 256, 257, 513])
def test_greedy_takes_the_lowest_id_of_the_best(vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    logits = rng.integers(-2, 3, size=(40, vocab_size)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.1] = -np.inf
    logits[0] = -np.inf
    logits[1] = -1e30
    np.testing.assert_array_equal(np.asarray(jax.jit(greedy_token)(logits)), logits.argmax(axis=1))


def test_greedy_and_random_rows_share_a_batch() -> None:
    slot = slot_for(301)
    rows = [Params(temperature=0, repetition_penalty=1.8, uses_bias=True), Params(), Params(temperature=9e-6)]
    tokens = run(np.stack([slot.logits] * 3), inputs_of(rows, 5, 0), state_of(slot))[0]
    assert tokens[0] == processed_logits(slot, rows[0]).argmax()
    assert tokens[2] == slot.logits.argmax()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_any_allowed_token_harm_nobody(temperature: float) -> None:
    slot = slot_for(301)
    nothing = replace(slot, bias=np.full(301, -np.inf, np.float32))
    one = replace(slot, bias=np.where(np.arange(301) == 299, 0, -np.inf).astype(np.float32))
    rows = [Params(temperature, top_p=0.9, top_k=3, uses_bias=True)] * 2 + [Params(temperature)]
    inputs = inputs_of(rows, 3, 1, slots=[0, 1, 2])
    tokens, logprobs, _ = run(np.stack([slot.logits] * 3), inputs, state_of(nothing, one, slot), wants=True)
    assert 0 <= tokens[0] < 301 and tokens[1] == 299
    alone = run(slot.logits[None], inputs_of([Params(temperature)], 3, 1), state_of(slot))[0]
    assert tokens[2] == alone[0]
    assert np.isfinite(logprobs.chosen).all()


def test_masked_tokens_are_never_drawn() -> None:
    """One token in a hundred is allowed, at distances that fall on every place of a chunk."""
    vocab_size, count = 1000, 4000
    rng = np.random.default_rng(0)
    logits = np.full((count, vocab_size), -np.inf, np.float32)
    allowed = rng.random(logits.shape) < 0.01
    allowed[:, 700] = True
    logits[allowed] = rng.normal(scale=6, size=allowed.sum())
    tokens = run(logits, inputs_of([Params()] * count, np.arange(count), 0), state_of(slot_for(vocab_size)))[
        0
    ]
    assert allowed[np.arange(count), tokens].all()


@pytest.mark.parametrize("vocab_size", [5, 32, 301])
def test_masks_are_as_good_as_a_bias(vocab_size: int) -> None:
    """Whatever the parameters: a token whose bit is 0 is a token whose logit is -inf."""
    rng = np.random.default_rng(vocab_size)
    slot = slot_for(vocab_size)
    count = 3 * len(PARAMS)
    params = list(PARAMS.values()) * 3
    allowed = rng.random((count, vocab_size)) < rng.choice([0.1, 0.5, 1.0], (count, 1))
    allowed[:, 0] = True  # the bias of `slot_for` forbids any token but this one
    logits = np.broadcast_to(slot.logits, allowed.shape)
    inputs = inputs_of(params, np.arange(count), 3)
    tokens = run(logits, inputs, state_of(slot), allowed=allowed)[0]
    expected = run(np.where(allowed, logits, -np.inf).astype(np.float32), inputs, state_of(slot))[0]
    assert tokens.tolist() == expected.tolist()
    assert allowed[np.arange(count), tokens].all()


def test_where_everything_is_forbidden_there_is_no_token() -> None:
    """By the mask, by the mask and the bias together, and beside a row that has a choice."""
    slot = slot_for(7)
    bias = np.where(np.arange(7) == 2, -np.inf, 0).astype(np.float32)
    state = state_of(Slot(slot.logits, slot.counts, slot.in_prompt, bias))
    allowed = np.zeros((4, 7), bool)
    allowed[1:3, 2] = True
    allowed[3] = True
    rows = [Params(), Params(uses_bias=True), Params(temperature=0), Params(temperature=0)]
    token, _, state = run(np.broadcast_to(slot.logits, (4, 7)), inputs_of(rows, 5, 0), state, allowed=allowed)
    assert token.tolist() == [NO_TOKEN, NO_TOKEN, 2, int(slot.logits.argmax())]


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"])
def test_logprobs_of_every_mode(mode: str) -> None:
    slot = slot_for(301)
    rows = [
        PARAMS["everything"],
        Params(),
        PARAMS["bias"],
        Params(temperature=0, frequency_penalty=0.5),
        PARAMS["top_p"],
    ]
    inputs = inputs_of(rows, 9, 2)
    tokens, logprobs, _ = run(
        np.stack([slot.logits] * 5), inputs, state_of(slot), wants=True, num_logprobs=8, mode=mode
    )
    for row, params in enumerate(rows):
        values = slot.logits.astype(np.float64) if mode.startswith("raw") else processed_logits(slot, params)
        reported = values - special.logsumexp(values) if mode.endswith("logprobs") else values
        chosen = tokens[row]
        np.testing.assert_allclose(logprobs.chosen[row], reported[chosen], rtol=1e-5, atol=1e-5)
        assert logprobs.rank[row] == 1 + (values > values[chosen]).sum()
        order = np.argsort(-values, kind="stable")[:8]
        np.testing.assert_allclose(logprobs.top[row], reported[order], rtol=1e-5, atol=1e-5)
        finite = np.isfinite(values[order])
        np.testing.assert_array_equal(logprobs.top_ids[row][finite], order[finite])


def test_logprobs_nobody_asked_for_are_zeros_of_the_same_shape() -> None:
    slot = slot_for(301)
    for count in (0, 8):
        inputs = inputs_of([Params()] * 2, 0, 0)
        wanted = run(np.stack([slot.logits] * 2), inputs, state_of(slot), wants=True, num_logprobs=count)[1]
        skipped = run(np.stack([slot.logits] * 2), inputs, state_of(slot), wants=False, num_logprobs=count)[1]
        for ours, zeros in zip(wanted, skipped, strict=True):
            assert ours.shape == zeros.shape and ours.dtype == zeros.dtype and not zeros.any()
        assert wanted.top_ids.shape == (2, count) and wanted.chosen.all()


def test_the_state_changes_only_where_a_token_was_sampled() -> None:
    slot = slot_for(301)
    before = state_of(slot, slot, slot, slot)
    penalized = Params(temperature=0, presence_penalty=0.1)
    rows = [penalized, penalized, Params(temperature=0), Params(0.0), Params(0.0)]
    inputs = inputs_of(rows, 0, 0, slots=[2, 0, 1, 4, 4], samples=[True, False, True, False, False])
    tokens, _, after = run(np.stack([slot.logits] * 5), inputs, before)
    assert after.last_token.tolist() == [3, tokens[2], tokens[0], 3, 3]  # slots of rows 2 and 0
    counts = np.array(before.output_counts)
    counts[2, tokens[0]] += 1
    np.testing.assert_array_equal(after.output_counts, counts)
    np.testing.assert_array_equal(after.in_prompt, before.in_prompt)
    np.testing.assert_array_equal(after.logit_bias, before.logit_bias)


def test_rows_that_use_neither_ignore_what_their_slot_holds() -> None:
    """A slot keeps the counts and the bias of whoever had it before."""
    slot = slot_for(301)
    stale = replace(slot, bias=np.full(301, np.nan, np.float32), counts=np.full(301, 10**6, np.int32))
    rows = [Params(), Params(temperature=0), PARAMS["everything"]]
    inputs = inputs_of(rows, 4, 4, slots=[0, 0, 1])
    tokens = run(np.stack([slot.logits] * 3), inputs, state_of(stale, slot))[0]
    clean = run(np.stack([slot.logits] * 3), inputs, state_of(slot, slot))[0]
    np.testing.assert_array_equal(tokens, clean)

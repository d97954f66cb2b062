"""From logits to tokens: penalties, masks, truncation, a draw, and log-probabilities, for a whole batch.

Nothing is sorted. Top-k and top-p look for the logit at which to cut by fixing the bits of an
order-preserving integer one by one, the highest first: 32 passes that each compare and sum, however
large the vocabulary (radix selection; the same search by value is in FlashInfer's sampling kernels,
Ye et al. 2025, section on sorting-free sampling). Every token tied with the last one kept is kept.

A draw depends on the sequence's seed and its position only, never on the batch around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.models.fitting import VOCABULARY_CHUNK

LogprobsMode = Literal["raw_logprobs", "processed_logprobs", "raw_logits", "processed_logits"]
TopK = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]

# Below this a temperature means greedy, as in vLLM.
GREEDY_BELOW = 1e-5
# In place of a token, where everything is forbidden.
NO_TOKEN = -1


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerState:
    """What the sampler keeps on the device for each slot; the last row belongs to padding.

    Of several replicas each has so many rows, one after the other.

    Attributes:
        last_token: int32[slots + 1] newest token of the sequence in a slot.
        output_counts: int32[slots + 1, V] how often each token was sampled, for penalties.
        in_prompt: bool[slots + 1, V] which tokens the prompt holds, for the repetition penalty.
        logit_bias: float32[slots + 1, V] added to the logits; -inf forbids a token.
    """

    last_token: jax.Array
    output_counts: jax.Array
    in_prompt: jax.Array
    logit_bias: jax.Array

    LOGICAL_AXES: ClassVar[dict[str, tuple[str | None, ...]]] = {
        "last_token": ("slots",),
        "output_counts": ("slots", "vocab"),
        "in_prompt": ("slots", "vocab"),
        "logit_bias": ("slots", "vocab"),
    }

    @classmethod
    def create(cls, num_slots: int, vocab_size: int, replicas: int = 1) -> SamplerState:
        """The state of an engine that has seen nothing, with so many slots for each replica."""
        rows = replicas * (num_slots + 1)
        return cls(
            jnp.zeros(rows, jnp.int32),
            jnp.zeros((rows, vocab_size), jnp.int32),
            jnp.zeros((rows, vocab_size), bool),
            jnp.zeros((rows, vocab_size), jnp.float32),
        )


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplingInputs:
    """Sampling parameters of the sequences in a batch, each [S].

    Attributes:
        slots: where a sequence's row of `SamplerState` is; padding has the last one.
        samples: whether the sequence gets a token in this step.
        positions: output tokens sampled before; what a draw depends on besides the seed.
        top_k: 0 is off. top_p, min_p: 1 and 0 are off.
        uses_penalties, uses_bias: whether the sequence's rows of the state matter.
    """

    slots: jax.Array
    samples: jax.Array
    seeds: jax.Array
    positions: jax.Array
    top_k: jax.Array
    uses_penalties: jax.Array
    uses_bias: jax.Array
    temperature: jax.Array
    top_p: jax.Array
    min_p: jax.Array
    presence_penalty: jax.Array
    frequency_penalty: jax.Array
    repetition_penalty: jax.Array


class Logprobs(NamedTuple):
    """Of the chosen tokens and of the most probable ones; logits instead where the mode says so."""

    chosen: jax.Array  # float32[S]
    rank: jax.Array  # int32[S], from 1
    top_ids: jax.Array  # int32[S, k]
    top: jax.Array  # float32[S, k]


def sample(
    logits: jax.Array,
    inputs: SamplingInputs,
    state: SamplerState,
    token_masks: jax.Array | None = None,
    *,
    num_logprobs: int,
    wants_logprobs: jax.Array,
    logprobs_mode: LogprobsMode,
    top_k: TopK = lax.top_k,
) -> tuple[jax.Array, Logprobs, SamplerState]:
    """Chooses a token for every row and notes it in the state.

    Args:
        logits: float32[S, V].
        token_masks: int32[S, ceil(V / 32)], in bit v % 32 of word v // 32 whether token v is allowed.
        num_logprobs: most probable tokens to report, k.
        wants_logprobs: bool scalar; where false the log-probabilities are zeros, at no cost.
        logprobs_mode: "raw" ones are of the model's logits as they come, "processed" ones of what is drawn
            from, after bias, penalties, temperature and truncation.
        top_k: `lax.top_k`, or what stands for it where devices share the vocabulary.

    Returns:
        (token int32[S], log-probabilities, state). The token is `NO_TOKEN` where a mask, together with what
        else is forbidden, allows none.
    """
    raw = logits
    logits = lax.cond(
        jnp.any(inputs.uses_bias),
        lambda x: x + jnp.where(inputs.uses_bias[:, None], state.logit_bias[inputs.slots], 0),
        lambda x: x,
        logits,
    )
    logits = lax.cond(
        jnp.any(inputs.uses_penalties),
        lambda x: penalize(x, state.output_counts[inputs.slots], state.in_prompt[inputs.slots], inputs),
        lambda x: x,
        logits,
    )
    if token_masks is not None:
        logits = mask_tokens(logits, token_masks)
    greedy = greedy_token(logits)
    is_random = inputs.temperature >= GREEDY_BELOW
    reports_processed = logprobs_mode.startswith("processed")

    def at_random() -> tuple[jax.Array, jax.Array | None]:
        truncated = truncate(logits, inputs)
        processed = jnp.where(is_random[:, None], truncated, logits) if reports_processed else None
        return jnp.where(is_random, draw(truncated, inputs), greedy), processed

    token, processed = lax.cond(
        jnp.any(is_random & inputs.samples),
        at_random,
        lambda: (greedy, logits if reports_processed else None),
    )
    logprobs = lax.cond(
        wants_logprobs,
        lambda: log_probabilities(
            raw if processed is None else processed, token, num_logprobs, logprobs_mode, top_k
        ),
        lambda: no_logprobs(token.shape[0], num_logprobs),
    )
    state = SamplerState(
        state.last_token.at[jnp.where(inputs.samples, inputs.slots, state.last_token.shape[0])].set(
            token, mode="drop"
        ),
        state.output_counts.at[inputs.slots, token].add(
            (inputs.samples & inputs.uses_penalties).astype(jnp.int32)
        ),
        state.in_prompt,
        state.logit_bias,
    )
    if token_masks is not None:
        token = jnp.where(logits.max(axis=1) > -jnp.inf, token, NO_TOKEN)
    return token, logprobs, state


def mask_tokens(logits: jax.Array, token_masks: jax.Array) -> jax.Array:
    """Sets the logits [S, V] of tokens whose bit in masks int32[S, ceil(V / 32)] is 0 to -inf."""
    bits = (token_masks[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    return jnp.where(bits.reshape(logits.shape[0], -1)[:, : logits.shape[1]] > 0, logits, -jnp.inf)


def greedy_token(logits: jax.Array) -> jax.Array:
    """int32[S] the most probable token, the lowest id among equals.

    In two levels, since XLA on CPU takes maxima much faster than it takes their indices.
    """
    rows, vocab_size = logits.shape
    chunks = _in_chunks(logits, -jnp.inf)
    best_chunk = jnp.argmax(chunks.max(axis=2), axis=1)
    within = jnp.argmax(chunks[jnp.arange(rows), best_chunk], axis=1)
    return jnp.minimum(best_chunk * VOCABULARY_CHUNK + within, vocab_size - 1).astype(jnp.int32)


def penalize(
    logits: jax.Array, output_counts: jax.Array, in_prompt: jax.Array, inputs: SamplingInputs
) -> jax.Array:
    """Repetition (CTRL, Keskar et al. 2019, section 4.1), then frequency and presence, as in vLLM."""
    in_output = output_counts > 0
    repetition = inputs.repetition_penalty[:, None]
    scaled = jnp.where(logits > 0, logits / repetition, logits * repetition)
    penalized = jnp.where(in_prompt | in_output, scaled, logits)
    penalized -= inputs.frequency_penalty[:, None] * output_counts
    penalized -= inputs.presence_penalty[:, None] * in_output
    return jnp.where(inputs.uses_penalties[:, None], penalized, logits)


def truncate(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """Divides by the temperature and sets what min-p, top-k and top-p cut off to -inf."""
    greedy = inputs.temperature < GREEDY_BELOW
    logits = logits / jnp.where(greedy, 1.0, inputs.temperature)[:, None]

    def keep_min_p(x: jax.Array) -> jax.Array:
        # p >= min_p * p_max, in logarithms; min_p of 0 gives -inf, which keeps everything.
        floor = x.max(axis=1) + jnp.log(inputs.min_p)
        return jnp.where(x >= floor[:, None], x, -jnp.inf)

    def keep_top_k(x: jax.Array) -> jax.Array:
        k = jnp.where(inputs.top_k > 0, inputs.top_k, x.shape[1]).astype(jnp.float32)
        return _cut_below(x, lambda kept: jnp.sum(kept, axis=1, dtype=jnp.float32) >= k)

    def keep_top_p(x: jax.Array) -> jax.Array:
        weights = jnp.exp(x - x.max(axis=1, keepdims=True))
        # A full top_p keeps everything: rounding must not cut the tail off.
        # The smallest one keeps one token, where it underflows as well: a weight of 1 is always there.
        wanted = jnp.where(inputs.top_p < 1, jnp.maximum(inputs.top_p * weights.sum(axis=1), 1e-30), -1.0)
        cut = _cut_below(x, lambda kept: jnp.sum(jnp.where(kept, weights, 0), axis=1) >= wanted)
        return jnp.where((inputs.top_p < 1)[:, None], cut, x)

    active = inputs.samples & ~greedy
    logits = lax.cond(jnp.any(active & (inputs.min_p > 0)), keep_min_p, lambda x: x, logits)
    logits = lax.cond(jnp.any(active & (inputs.top_k > 0)), keep_top_k, lambda x: x, logits)
    return lax.cond(jnp.any(active & (inputs.top_p < 1)), keep_top_p, lambda x: x, logits)


def _cut_below(logits: jax.Array, enough) -> jax.Array:  # type: ignore[no-untyped-def]
    """Keeps, in each row, the largest logits: as few as `enough(kept bool[S, V]) -> bool[S]` asks for."""
    keys = _order_preserving(logits)

    def fix_bit(step: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (jnp.uint32(1) << (31 - step).astype(jnp.uint32))
        return jnp.where(enough(keys >= candidate[:, None]), candidate, threshold)

    threshold = lax.fori_loop(0, 32, fix_bit, jnp.zeros(logits.shape[0], jnp.uint32))
    return jnp.where(keys >= threshold[:, None], logits, -jnp.inf)


def _order_preserving(x: jax.Array) -> jax.Array:
    """float32 to uint32 such that a < b as floats where a < b as integers."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    return jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))


def draw(logits: jax.Array, inputs: SamplingInputs) -> jax.Array:
    """int32[S] one token per row by inverting the cumulative distribution at one uniform number.

    The sum is taken in chunks, and only the chunk that the number falls into is looked at closely.
    """

    def uniform_of(seed: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.uniform(jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), position))

    uniform = jax.vmap(uniform_of)(inputs.seeds, inputs.positions)
    weights = jnp.exp(logits - logits.max(axis=1, keepdims=True))
    chunks = _in_chunks(weights, 0)
    of_chunks = chunks.sum(axis=2)
    distance = uniform * of_chunks.sum(axis=1)
    chunk, start = _element_at(of_chunks, distance)
    within, _ = _element_at(chunks[jnp.arange(logits.shape[0]), chunk], distance - start)
    return jnp.minimum(chunk * VOCABULARY_CHUNK + within, logits.shape[1] - 1).astype(jnp.int32)


def _element_at(weights: jax.Array, distance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Lays the weights [S, n] of a row end to end: (index[S] of the one at a distance[S], where it starts).

    Never one without weight, however the running sums were rounded: it may be a forbidden token.
    """
    end = jnp.cumsum(weights, axis=1)
    has_weight = weights > 0
    is_beyond = has_weight & (end > distance[:, None])
    last = jnp.max(jnp.where(has_weight, jnp.arange(weights.shape[1]), 0), axis=1)
    index = jnp.where(is_beyond.any(axis=1), jnp.argmax(is_beyond, axis=1), last)
    start = jnp.where(
        index > 0, jnp.take_along_axis(end, jnp.maximum(index - 1, 0)[:, None], axis=1)[:, 0], 0
    )
    return index, start


def _in_chunks(x: jax.Array, padding: float) -> jax.Array:
    """[S, V] to [S, chunks, VOCABULARY_CHUNK]."""
    rows, vocab_size = x.shape
    x = jnp.pad(x, ((0, 0), (0, -vocab_size % VOCABULARY_CHUNK)), constant_values=padding)
    return x.reshape(rows, -1, VOCABULARY_CHUNK)


def log_probabilities(
    logits: jax.Array, token: jax.Array, num_logprobs: int, mode: LogprobsMode, top_k: TopK = lax.top_k
) -> Logprobs:
    """Of `token` int32[S] and of the most probable tokens, under logits [S, V]."""
    normalizer = jax.nn.logsumexp(logits, axis=1) if mode.endswith("logprobs") else jnp.zeros(logits.shape[0])
    chosen = jnp.take_along_axis(logits, token[:, None], axis=1)
    rank = 1 + jnp.sum(logits > chosen, axis=1, dtype=jnp.int32)
    top, top_ids = top_k(logits, num_logprobs)
    return Logprobs(chosen[:, 0] - normalizer, rank, top_ids.astype(jnp.int32), top - normalizer[:, None])


def no_logprobs(rows: int, num_logprobs: int) -> Logprobs:
    """Zeros in the shape of log-probabilities that nobody asked for."""
    return Logprobs(
        jnp.zeros(rows),
        jnp.zeros(rows, jnp.int32),
        jnp.zeros((rows, num_logprobs), jnp.int32),
        jnp.zeros((rows, num_logprobs)),
    )

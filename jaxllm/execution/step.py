"""The one jitted step: forward pass, logits where wanted, sampling, and the token fed to the next step.

A sequence whose next token depends on more than the device knows (a grammar) is sampled by a second, small
program, `sample_late`: the host makes its mask while the step runs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxllm.execution.batch import StepShape, unpack, unpack_late
from jaxllm.execution.sampler import (
    Logprobs,
    LogprobsMode,
    SamplerState,
    TopK,
    log_probabilities,
    no_logprobs,
    sample,
)
from jaxllm.models.decoder import Decoder

# Prompt positions whose logits exist at once, so that a long prompt does not need [T, V] of memory.
_PROMPT_LOGPROB_ROWS = 64


class StepOutput(NamedTuple):
    """What a step gives back to the host.

    Attributes:
        token_ids: int32[S]; of meaning only where the sequence samples; `NO_TOKEN` where a mask allows none.
        logprobs: of the sampled tokens, zeros unless the batch asked.
        prompt_logprobs: of each row's target, zeros unless the batch asked; None in a decode step.
    """

    token_ids: jax.Array
    logprobs: Logprobs
    prompt_logprobs: Logprobs | None


def step(
    params: dict[str, Any],
    kv_pages: Any,
    state: SamplerState,
    integers: jax.Array,
    floats: jax.Array,
    *,
    decoder: Decoder,
    shape: StepShape,
    num_logprobs: int,
    logprobs_mode: LogprobsMode,
) -> tuple[Any, SamplerState, StepOutput, jax.Array]:
    """Computes a packed batch. `kv_pages` and `state` are donated and returned updated.

    In a pipeline every stage computes a batch of its own, and the output is of that in the last stage.

    Args:
        kv_pages: the cache as the decoder takes it.
        integers: int32[shape.num_integers], floats: float32[shape.num_floats]; see `HostBatch`. In a
            pipeline [stages, ...], of the batch in each stage.
        num_logprobs: most probable tokens reported per position.

    Returns:
        (cache, state, output, logits float32[S, V]), the last of them for `sample_late`.
    """
    batch = unpack(integers, floats, state.last_token, shape)
    hidden, kv_pages = decoder(params, kv_pages, batch.decoder_inputs, decode_only=shape.decode_only)
    logits = decoder.logits(params, hidden, batch.last_rows)
    token_ids, logprobs, state = sample(
        logits,
        batch.sampling,
        state,
        num_logprobs=num_logprobs,
        wants_logprobs=batch.wants_logprobs,
        logprobs_mode=logprobs_mode,
        top_k=decoder.top_k,
    )
    prompt_logprobs = None
    if not shape.decode_only:
        prompt_logprobs = lax.cond(
            batch.wants_prompt_logprobs,
            lambda: _prompt_logprobs(decoder, params, hidden, batch.targets, num_logprobs, logprobs_mode),
            lambda: no_logprobs(shape.num_tokens, num_logprobs),
        )
    return kv_pages, state, StepOutput(token_ids, logprobs, prompt_logprobs), logits


def sample_late(
    state: SamplerState,
    logits: jax.Array,
    integers: jax.Array,
    floats: jax.Array,
    token_masks: jax.Array,
    token_ids: jax.Array,
    logprobs: Logprobs,
    *,
    num_logprobs: int,
    logprobs_mode: LogprobsMode,
    top_k: TopK,
) -> tuple[SamplerState, jax.Array, Logprobs]:
    """Samples for the sequences that the step left out. `state` is donated and returned updated.

    Args:
        logits: float32[S, V] that the step gave, token_ids, logprobs: and what it sampled.
        integers, floats: see `HostBatch.late_arrays`.
        token_masks: int32[S, ceil(V / 32)]; see `TokenMasks`.

    Returns:
        (state, token ids, log-probabilities) of all sequences.
    """
    inputs, wants_logprobs = unpack_late(integers, floats)
    late_ids, late_logprobs, state = sample(
        logits,
        inputs,
        state,
        token_masks,
        num_logprobs=num_logprobs,
        wants_logprobs=wants_logprobs,
        logprobs_mode=logprobs_mode,
        top_k=top_k,
    )

    def merge(late: jax.Array, early: jax.Array) -> jax.Array:
        return jnp.where(inputs.samples.reshape(-1, *[1] * (late.ndim - 1)), late, early)

    return state, merge(late_ids, token_ids), jax.tree.map(merge, late_logprobs, logprobs)


def _prompt_logprobs(
    decoder: Decoder,
    params: dict[str, Any],
    hidden: jax.Array,
    targets: jax.Array,
    num_logprobs: int,
    mode: LogprobsMode,
) -> Logprobs:
    """Log-probabilities of targets int32[T] at every row, a few rows at a time."""
    num_tokens = targets.shape[0]
    group = min(_PROMPT_LOGPROB_ROWS, num_tokens)
    rows = jnp.minimum(jnp.arange(-(-num_tokens // group) * group), num_tokens - 1).reshape(-1, group)

    def of_rows(some: jax.Array) -> Logprobs:
        logits = decoder.logits(params, hidden, some)
        return log_probabilities(logits, targets[some], num_logprobs, mode, decoder.top_k)

    by_group = lax.map(of_rows, rows)
    return Logprobs(*(x.reshape(-1, *x.shape[2:])[:num_tokens] for x in by_group))

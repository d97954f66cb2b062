"""The step of a pooling model: hidden states pooled to vectors, where a generating model would sample."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.execution.batch import StepShape, unpack
from jaxllm.execution.pending import Packed, Pending
from jaxllm.execution.runner import Runner
from jaxllm.models.decoder import Decoder
from jaxllm.request import Request
from jaxllm.scheduling.plan import Plan, StepResult


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PoolingState:
    """What a prompt computed in chunks carries from one step to the next.

    Attributes:
        carried: float32[slots + 1, D] of each replica, the sum of its features so far, or those of its
            first token; no columns where the last token is all that counts.
    """

    carried: jax.Array

    LOGICAL_AXES: ClassVar[dict[str, tuple[str | None, ...]]] = {"carried": ("slots", None)}


class PoolingStepOutput(NamedTuple):
    """What a step gives back to the host.

    Attributes:
        pooled: float32[S, D or labels]; of meaning only where the prompt is complete.
        tokens: float32[T, D or labels], every token by itself; zeros unless the batch asked.
    """

    pooled: jax.Array
    tokens: jax.Array


def pooling_step(
    params: dict[str, Any],
    kv_pages: Any,
    state: PoolingState,
    integers: jax.Array,
    floats: jax.Array,
    *,
    decoder: Decoder,
    shape: StepShape,
) -> tuple[Any, PoolingState, PoolingStepOutput, None]:
    """Computes a packed batch. `kv_pages` and `state` are donated and returned updated.

    Args:
        integers, floats: see `HostBatch`, whose `targets` hold the tokens' types here.

    Returns:
        (cache, state, output, None): there are no logits.
    """
    # No token of a prompt is ever still on the device.
    none_pending = jnp.zeros(state.carried.shape[0], jnp.int32)
    batch = unpack(integers, floats, none_pending, shape, has_token_types=True)
    hidden, kv_pages = decoder(params, kv_pages, batch.decoder_inputs, decode_only=shape.decode_only)
    features = decoder.features(params, hidden)
    pooler = decoder.config.pooler
    assert pooler is not None

    tokens, slots = batch.tokens, batch.sampling.slots
    starts, ends = tokens.query_starts[:-1], tokens.query_starts[1:]
    if pooler.pooling == "last":
        vectors = features[batch.last_rows]
    else:
        begins = (tokens.seq_lens == ends - starts)[:, None]
        before = jnp.where(begins, 0.0, state.carried[slots])
        if pooler.pooling == "mean":
            rows = jnp.arange(shape.num_tokens)
            owner = (rows[None] >= starts[:, None]) & (rows[None] < ends[:, None])
            # A sum over rows as a product; padding is finite, and belongs to nobody.
            carried = before + jnp.matmul(
                owner.astype(jnp.float32), features, precision=jax.lax.Precision.HIGHEST
            )
            vectors = carried / jnp.maximum(tokens.seq_lens, 1)[:, None]
        else:
            first = features[jnp.minimum(starts, shape.num_tokens - 1)]
            vectors = carried = jnp.where(begins, first, before)
        state = PoolingState(state.carried.at[slots].set(carried))
    pooled = decoder.pool(params, vectors)
    # The head over every token is much work, which few ask for.
    by_token = lax.cond(
        batch.wants_logprobs,
        lambda: decoder.pool(params, features),
        lambda: jnp.zeros((features.shape[0], pooled.shape[1]), pooled.dtype),
    )
    return kv_pages, state, PoolingStepOutput(pooled, by_token), None


class PendingPooling(Pending):
    """A plan of a pooling model."""

    def _read(self, output: PoolingStepOutput) -> StepResult:
        """The vectors of prompts that are complete, and those of tokens that somebody asked for."""
        scheduled = self._plan.scheduled
        result = StepResult([[] for _ in scheduled], [None] * len(scheduled))
        pooled = tokens = None
        places = zip(self._packed.rows, self._packed.token_rows, strict=True)
        for index, (entry, (row, first)) in enumerate(zip(scheduled, places, strict=True)):
            params = entry.request.pooling_params
            if params is not None and params.per_token:
                tokens = np.asarray(output.tokens, np.float32) if tokens is None else tokens
                result.pooled[index] = tokens[first : first + entry.num_tokens].copy()
            elif entry.samples:
                pooled = np.asarray(output.pooled, np.float32) if pooled is None else pooled
                result.pooled[index] = pooled[row].copy()
        return result


class PoolingRunner(Runner):
    """Runs the plans of a pooling model."""

    samples = False

    def _shapes(self, shapes: list[StepShape]) -> list[StepShape]:
        # Prompts are all that there is.
        return [shape for shape in shapes if not shape.decode_only]

    def _step(self, shape: StepShape) -> Callable[..., Any]:
        return functools.partial(pooling_step, decoder=self._decoder, shape=shape)

    def _state_factory(self, max_num_seqs: int) -> Callable[[], Any]:
        model = self._decoder.config
        carries = model.pooler is not None and model.pooler.pooling != "last"
        rows = (max_num_seqs + 1) * self._decoder.form.axis_size("data")
        shape = (rows, model.hidden_size if carries else 0)
        return lambda: PoolingState(jnp.zeros(shape, jnp.float32))

    def _wants_more(self, request: Request) -> bool:
        return request.pooling_params is not None and request.pooling_params.per_token

    def _warm_up(self) -> None:
        pass  # There are no sampling parameters to write.

    def _pending(self, plan: Plan, shape: StepShape, packed: Packed) -> Pending:
        return PendingPooling(plan, shape, packed, self.advance)

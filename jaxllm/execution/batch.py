"""A step's inputs: two flat arrays, laid out by the step's shape, and what they unpack to."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxllm.execution.sampler import SamplingInputs
from jaxllm.models.decoder import TokenInputs

# One column each, of every sequence, in the packed integers and floats.
INTEGERS = (
    "seq_lens",
    "rope_lengths",
    "slots",
    "samples",
    "seeds",
    "positions",
    "top_k",
    "penalties",
    "bias",
)
FLOATS = ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")

# In the column "samples": a sequence gets a token in the step, or after it, see `sample_late`; 0 is none.
SAMPLES, SAMPLES_LATE = 1, 2


class StepShape(NamedTuple):
    """Sizes that a step is compiled for.

    Attributes:
        num_tokens: rows of the packed batch, T.
        num_seqs: sequences, S.
        pages_per_seq: columns of the page table, P.
        decode_only: every sequence has one token, in the row of its own index; no prompt logprobs.
    """

    num_tokens: int
    num_seqs: int
    pages_per_seq: int
    decode_only: bool

    @property
    def num_integers(self) -> int:
        per_sequence = len(INTEGERS) + self.pages_per_seq
        return 2 + 3 * self.num_tokens + self.num_seqs + 1 + per_sequence * self.num_seqs

    @property
    def num_floats(self) -> int:
        return len(FLOATS) * self.num_seqs


class LateShape(NamedTuple):
    """What `sample_late` is compiled for: the sequences of a step, whatever else its shape is."""

    num_seqs: int


Program = StepShape | LateShape


class HostBatch:
    """Views into the two arrays that travel to the device, to be filled by the host. Empty at first.

    Args:
        padding_slot: that of sequences which are not there.

    Attributes:
        integers, floats: what travels.
        token_ids, positions, targets: int32[T]. A token id of -1 is the newest token of its
            sequence, which is still on the device; a target is the token whose log-probability a
            prompt position reports, or in a pooling model the token's type.
        query_starts: int32[S + 1].
        column: for each name in INTEGERS int32[S]. page_table: int32[S, P].
        seq_floats: float32[len(FLOATS), S].
        flags: int32[2], wants logprobs, wants prompt logprobs.
    """

    def __init__(self, shape: StepShape, padding_slot: int) -> None:
        self.shape = shape
        self.padding_slot = padding_slot
        self.integers = np.zeros(shape.num_integers, np.int32)
        self.floats = np.zeros(shape.num_floats, np.float32)
        (
            self.flags,
            self.token_ids,
            self.positions,
            self.targets,
            self.query_starts,
            self.seq_integers,
            self.page_table,
        ) = _split_integers(self.integers, shape)
        self.seq_floats = self.floats.reshape(len(FLOATS), shape.num_seqs)
        self.column = dict(zip(INTEGERS, self.seq_integers, strict=True))
        self.column["slots"][:] = padding_slot
        self.seq_floats[:] = 1

    def resized(self, shape: StepShape) -> HostBatch:
        """The same sequences in another shape that takes them, or in this one."""
        if shape == self.shape:
            return self
        other = HostBatch(shape, self.padding_slot)
        other.flags[:] = self.flags
        count = min(shape.num_tokens, self.shape.num_tokens)
        for name in ("token_ids", "positions", "targets"):
            getattr(other, name)[:count] = getattr(self, name)[:count]
        count = min(shape.num_seqs, self.shape.num_seqs)
        other.query_starts[: count + 1] = self.query_starts[: count + 1]
        other.query_starts[count + 1 :] = self.query_starts[-1]
        other.seq_integers[:, :count] = self.seq_integers[:, :count]
        other.seq_floats[:, :count] = self.seq_floats[:, :count]
        other.page_table[:count] = self.page_table[:count]
        return other

    def late_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """(int32[1 + len(INTEGERS) * S], float32[len(FLOATS) * S]): what `sample_late` has to know."""
        return np.concatenate([self.flags[:1], self.seq_integers.reshape(-1)]), self.floats


class DeviceBatch(NamedTuple):
    """The same, on the device."""

    tokens: TokenInputs
    decoder_inputs: TokenInputs  # tokens, or where there are stages [stages, ...], what each works on
    sampling: SamplingInputs
    last_rows: jax.Array  # int32[S] row of each sequence's last token
    targets: jax.Array
    wants_logprobs: jax.Array
    wants_prompt_logprobs: jax.Array


def unpack(
    integers: jax.Array,
    floats: jax.Array,
    last_token: jax.Array,
    shape: StepShape,
    *,
    has_token_types: bool = False,
) -> DeviceBatch:
    """Inside the step: names for the parts of the two arrays, and the tokens that stayed on the device.

    Args:
        integers, floats: of a batch; or of the batches of all stages, stacked, and the result is that of
            the last stage, whose batch is complete after this step.
        last_token: int32[slots + 1] of the sampler's state.
        has_token_types: whether the batch's targets are the tokens' types.
    """
    if integers.ndim == 2:
        stages = [
            unpack(*packed, last_token, shape, has_token_types=has_token_types)
            for packed in zip(integers, floats, strict=True)
        ]
        inputs = jax.tree.map(lambda *parts: jnp.stack(parts), *(batch.tokens for batch in stages))
        return stages[-1]._replace(decoder_inputs=inputs)
    flags, token_ids, positions, targets, query_starts, columns, page_table = _split_integers(integers, shape)
    column = dict(zip(INTEGERS, columns, strict=True))
    slots = column["slots"]

    is_empty = query_starts[1:] == query_starts[:-1]
    last_rows = jnp.where(is_empty, 0, query_starts[1:] - 1)
    newest = token_ids[last_rows]
    newest = jnp.where(newest < 0, last_token[slots], newest)
    token_ids = token_ids.at[jnp.where(is_empty, shape.num_tokens, last_rows)].set(newest, mode="drop")

    tokens = TokenInputs(
        token_ids=token_ids,
        positions=positions,
        rope_lengths=jnp.maximum(positions + 1, _per_token(column["rope_lengths"], query_starts, shape)),
        page_table=page_table,
        seq_lens=column["seq_lens"],
        query_starts=query_starts,
        token_types=targets if has_token_types else None,
    )
    sampling = _sampling_inputs(columns, floats, SAMPLES)
    return DeviceBatch(tokens, tokens, sampling, last_rows, targets, *(flags > 0))


def unpack_late(integers: jax.Array, floats: jax.Array) -> tuple[SamplingInputs, jax.Array]:
    """Inside `sample_late`: the parameters of those sampled then, and whether log-probabilities are wanted.

    Args:
        integers, floats: as `HostBatch.late_arrays` gives them.
    """
    return _sampling_inputs(integers[1:].reshape(len(INTEGERS), -1), floats, SAMPLES_LATE), integers[0] > 0


def _sampling_inputs(columns: jax.Array, floats: jax.Array, samples: int) -> SamplingInputs:
    """Of columns int32[len(INTEGERS), S]; who gets a token is marked by `samples`."""
    column = dict(zip(INTEGERS, columns, strict=True))
    real = dict(zip(FLOATS, floats.reshape(len(FLOATS), -1), strict=True))
    return SamplingInputs(
        slots=column["slots"],
        samples=column["samples"] == samples,
        seeds=lax.bitcast_convert_type(column["seeds"], jnp.uint32),
        positions=column["positions"],
        top_k=column["top_k"],
        uses_penalties=column["penalties"] > 0,
        uses_bias=column["bias"] > 0,
        **real,
    )


def _split_integers(integers, shape: StepShape):  # type: ignore[no-untyped-def]
    """The parts of the packed integers, in the order of `HostBatch.__init__`; views where numpy is given."""
    tokens, seqs = shape.num_tokens, shape.num_seqs
    sizes = [2, tokens, tokens, tokens, seqs + 1, len(INTEGERS) * seqs, seqs * shape.pages_per_seq]
    ends = np.cumsum(sizes)
    parts = [integers[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    parts[5] = parts[5].reshape(len(INTEGERS), seqs)
    parts[6] = parts[6].reshape(seqs, shape.pages_per_seq)
    return parts


def _per_token(values: jax.Array, query_starts: jax.Array, shape: StepShape) -> jax.Array:
    """[S] values of sequences to [T] values of their tokens."""
    rows = jnp.arange(shape.num_tokens)
    sequence = jnp.sum(query_starts[None, 1:] <= rows[:, None], axis=1)
    return values[jnp.minimum(sequence, shape.num_seqs - 1)]

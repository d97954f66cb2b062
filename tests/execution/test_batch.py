"""A batch survives the trip in two flat arrays, and tokens that never left the device are filled in."""

from __future__ import annotations

import functools
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.execution.batch import (
    FLOATS,
    INTEGERS,
    SAMPLES,
    SAMPLES_LATE,
    DeviceBatch,
    HostBatch,
    StepShape,
    unpack,
    unpack_late,
)
from jaxllm.execution.pending import Packed

SHAPES = [StepShape(7, 3, 4, False), StepShape(3, 3, 1, True), StepShape(1, 1, 2, True)]
_unpack = jax.jit(unpack, static_argnames="shape")


def unpacked(batch: HostBatch, last_token: np.ndarray, shape: StepShape) -> DeviceBatch:
    return jax.tree.map(np.asarray, _unpack(batch.integers, batch.floats, last_token, shape=shape))  # type: ignore[no-any-return]


@functools.cache
def column(name: str) -> int:
    return INTEGERS.index(name)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@settings(max_examples=25)
@given(data=st.data())
def test_round_trip(shape: StepShape, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    batch = HostBatch(shape, 0)
    assert batch.integers.size == shape.num_integers and batch.floats.size == shape.num_floats
    for view in (batch.token_ids, batch.positions, batch.targets, batch.page_table):
        view[...] = rng.integers(0, 2**31 - 1, view.shape)
    batch.seq_floats[...] = rng.normal(size=batch.seq_floats.shape)
    for name in ("seq_lens", "positions", "top_k"):
        batch.seq_integers[column(name)] = rng.integers(0, 2**31 - 1, shape.num_seqs)
    batch.seq_integers[column("slots")] = rng.permutation(shape.num_seqs)
    seeds = rng.integers(0, 2**32, shape.num_seqs, dtype=np.uint64).astype(np.uint32)
    batch.seq_integers[column("seeds")] = seeds.view(np.int32)
    for name in ("penalties", "bias"):
        batch.seq_integers[column(name)] = rng.integers(0, 2, shape.num_seqs)
    samples = batch.seq_integers[column("samples")] = rng.integers(0, 3, shape.num_seqs, np.int32)
    batch.query_starts[1:] = np.sort(rng.integers(0, shape.num_tokens + 1, shape.num_seqs))
    batch.flags[:] = rng.integers(0, 2, 2)

    device = unpacked(batch, np.full(shape.num_seqs + 1, 99, np.int32), shape)
    flags = (device.wants_logprobs, device.wants_prompt_logprobs)
    assert [bool(flag) for flag in flags] == batch.flags.tolist()
    np.testing.assert_array_equal(device.targets, batch.targets)
    for name in ("token_ids", "positions", "page_table", "query_starts"):
        np.testing.assert_array_equal(getattr(device.tokens, name), getattr(batch, name))
    np.testing.assert_array_equal(device.tokens.seq_lens, batch.seq_integers[column("seq_lens")])
    for name in ("slots", "positions", "top_k"):
        np.testing.assert_array_equal(getattr(device.sampling, name), batch.seq_integers[column(name)])
    np.testing.assert_array_equal(device.sampling.samples, samples == SAMPLES)
    late, wants_logprobs = unpack_late(*map(jnp.asarray, batch.late_arrays()))
    np.testing.assert_array_equal(late.samples, samples == SAMPLES_LATE)
    assert bool(wants_logprobs) == batch.flags[0]
    for field in fields(late):
        if field.name != "samples":
            ours, theirs = getattr(late, field.name), getattr(device.sampling, field.name)
            np.testing.assert_array_equal(ours, theirs)
    for ours, name in (("uses_penalties", "penalties"), ("uses_bias", "bias")):
        np.testing.assert_array_equal(getattr(device.sampling, ours), batch.seq_integers[column(name)])
    np.testing.assert_array_equal(device.sampling.seeds, seeds)
    for row, name in enumerate(FLOATS):
        np.testing.assert_array_equal(getattr(device.sampling, name), batch.seq_floats[row])


def random_batch(rng: np.random.Generator, shape: StepShape, lengths: list[int]) -> HostBatch:
    """So many sequences of these lengths, and padding."""
    batch, total = HostBatch(shape, 77), sum(lengths)
    for view in (batch.token_ids, batch.positions, batch.targets):
        view[:total] = rng.integers(1, 99, total)
    batch.query_starts[1 : len(lengths) + 1] = np.cumsum(lengths)
    batch.query_starts[len(lengths) + 1 :] = total
    batch.seq_integers[:, : len(lengths)] = rng.integers(1, 9, (len(INTEGERS), len(lengths)))
    batch.page_table[: len(lengths)] = rng.integers(1, 99, (len(lengths), shape.pages_per_seq))
    batch.seq_floats[:, : len(lengths)] = rng.normal(size=(len(FLOATS), len(lengths)))
    batch.flags[:] = rng.integers(0, 2, 2)
    return batch


@pytest.mark.parametrize(
    ("shape", "other"), [((7, 3), (9, 6)), ((9, 6), (7, 3)), ((16, 2), (6, 6)), ((6, 6), (16, 2))], ids=str
)
def test_another_shape_holds_the_same(shape: tuple[int, int], other: tuple[int, int]) -> None:
    old, new = StepShape(*shape, 4, False), StepShape(*other, 4, False)
    first, second = (random_batch(np.random.default_rng(5), s, [4, 2]) for s in (old, new))
    resized = first.resized(new)
    np.testing.assert_array_equal(resized.integers, second.integers)
    np.testing.assert_array_equal(resized.floats, second.floats)
    assert first.resized(old) is first


@pytest.mark.parametrize(("old", "new"), [((16, 4), (2, 2)), ((2, 2), (16, 4)), ((9, 9), (9, 9))], ids=str)
def test_rows_of_replicas_move_with_their_batches(old: tuple[int, int], new: tuple[int, int]) -> None:
    first, second = (StepShape(*sizes, 3, False) for sizes in (old, new))
    replicas = 3
    at = range(min(old + new))
    places = [(replica, row) for replica in range(replicas) for row in at]

    def rows(width: int) -> list[int]:
        return [replica * width + row for replica, row in places]

    packed = Packed(replicas, True, rows(old[1]), rows(old[0]), dict(enumerate(rows(old[0]))))
    packed.move(first, second)
    assert packed.rows == rows(new[1])
    assert packed.token_rows == list(packed.prompt_rows.values()) == rows(new[0])


def test_batches_of_stages_are_unpacked_each_and_the_last_one_is_told_of() -> None:
    shape, last_token = StepShape(7, 3, 4, False), np.arange(100, 180, dtype=np.int32)
    batches = [random_batch(np.random.default_rng(seed), shape, [3, 1]) for seed in range(3)]
    batches[0].token_ids[2] = -1
    packed = jax.tree.map(lambda *x: np.stack(x), *((b.integers, b.floats) for b in batches))
    together = jax.tree.map(np.asarray, _unpack(*packed, last_token, shape=shape))
    alone = [unpacked(batch, last_token, shape) for batch in batches]
    jax.tree.map(np.testing.assert_array_equal, together._replace(decoder_inputs=alone[2].tokens), alone[2])
    for stage in range(3):
        of_stage = jax.tree.map(lambda x, stage=stage: x[stage], together.decoder_inputs)
        jax.tree.map(np.testing.assert_array_equal, of_stage, alone[stage].tokens)
    assert together.decoder_inputs.token_ids[0, 2] == 100 + batches[0].column["slots"][0]


def test_views_cover_the_arrays_once() -> None:
    batch = HostBatch(SHAPES[0], 0)
    views = (batch.flags, batch.token_ids, batch.positions, batch.targets, batch.query_starts)
    for view in (*views, batch.seq_integers, batch.page_table):
        view += 1
    assert (batch.integers == 1).all()
    assert (batch.floats == 1).all()
    batch.seq_floats += 1
    assert (batch.floats == 2).all()


def test_newest_tokens_come_from_the_slot_of_their_sequence() -> None:
    """A prompt, a decode whose token is on the device, an empty row, and a resumed one that ends in such."""
    shape = StepShape(9, 4, 1, False)
    batch = HostBatch(shape, 0)
    batch.token_ids[:] = [10, 11, 12, -1, 20, 21, -1, 0, 0]
    batch.query_starts[:] = [0, 3, 4, 4, 7]
    batch.seq_integers[column("slots")] = [0, 2, 4, 1]
    device = unpacked(batch, np.array([100, 101, 102, 103, 104], np.int32), shape)
    assert device.tokens.token_ids.tolist() == [10, 11, 12, 102, 20, 21, 101, 0, 0]
    assert device.last_rows.tolist() == [2, 3, 0, 6]


def test_tokens_after_the_last_sequence_are_left_alone() -> None:
    """An empty row's last token would be row -1, or the token of the sequence before it."""
    shape = StepShape(4, 4, 1, True)
    batch = HostBatch(shape, 0)
    batch.token_ids[:] = [-1, 5, 0, 0]
    batch.query_starts[:] = [0, 1, 2, 2, 2]
    batch.seq_integers[column("slots")] = [3, 0, 4, 4]
    device = unpacked(batch, np.array([1, 2, 3, 44, 77], np.int32), shape)
    assert device.tokens.token_ids.tolist() == [44, 5, 0, 0]


def test_rope_length_is_the_prompts_or_the_position() -> None:
    shape = StepShape(6, 3, 1, False)
    batch = HostBatch(shape, 0)
    batch.query_starts[:] = [0, 3, 4, 5]
    batch.positions[:] = [0, 1, 2, 30, 7, 0]
    batch.seq_integers[column("rope_lengths")] = [10, 20, 8]
    device = unpacked(batch, np.zeros(4, np.int32), shape)
    assert device.tokens.rope_lengths[:5].tolist() == [10, 10, 10, 31, 8]

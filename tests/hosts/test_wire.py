"""What one host sends, another receives; what it does not mean to send is noticed."""

from __future__ import annotations

import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.errors import HostError
from jaxllm.execution.batch import HostBatch, StepShape
from jaxllm.execution.commands import (
    Command,
    CopyPages,
    RunStep,
    SampleLate,
    SleepAt,
    WakeUp,
    WriteBias,
    WriteCounts,
)
from jaxllm.execution.hosts.wire import CommandCodec, Message, receive, to_frame

SHAPES = [StepShape(16, 3, 5, False), StepShape(1, 1, 5, True), StepShape(2, 2, 7, True)]


def through_a_socket(frame: bytes) -> Message:
    left, right = socket.socketpair()
    with left, right:
        left.sendall(frame)
        return receive(right)


def random_command(rng: np.random.Generator) -> Command:
    match rng.integers(6):
        case 0:
            return WriteCounts(
                int(rng.integers(9)), rng.integers(3, size=601).astype(np.int32), rng.random(601) < 0.1
            )
        case 1:
            bias = np.where(rng.random(601) < 0.5, -np.inf, 0).astype(np.float32)
            return WriteBias(int(rng.integers(9)), bias)
        case 2:
            return CopyPages(((1, 2), (3, 4)), ())
        case 3:
            return SleepAt(2) if rng.random() < 0.5 else WakeUp(("weights",))
        case _:
            shape = SHAPES[rng.integers(len(SHAPES))]
            batch = HostBatch(shape, shape.num_seqs)
            batch.integers[rng.random(len(batch.integers)) < 0.3] = rng.integers(-5, 2**31 - 1)
            batch.floats[:] = rng.choice([1.0, np.nan, -0.0, np.inf], len(batch.floats))
            if rng.random() < 0.5:
                return RunStep(shape, batch.integers, batch.floats)
            masks = rng.integers(-(2**31), 2**31, (shape.num_seqs, 19)).astype(np.int32)
            return SampleLate(shape.num_seqs, *batch.late_arrays(), masks if rng.random() < 0.5 else None)


def same(one: object, other: object) -> bool:
    if isinstance(one, np.ndarray):
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and one.tobytes() == other.tobytes()
    if isinstance(one, tuple):
        return (
            list(map(list, one)) == list(map(list, other))
            if one and isinstance(one[0], tuple)
            else list(one) == list(other)
        )  # type: ignore[arg-type, call-overload]
    return one == other


@given(st.integers(0, 2**32), st.integers(1, 12))
def test_commands_arrive_as_they_were(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    sender, receiver = CommandCodec(), CommandCodec()
    for expected in range(count):
        command = random_command(rng)
        number, received = receiver.decode(through_a_socket(sender.encode(command)))
        assert number == expected
        assert type(received) is type(command)
        for one, other in zip(command, received, strict=True):
            assert same(one, other), (one, other)
            if isinstance(one, np.ndarray):
                assert one.shape == other.shape


def decode_step(lengths: np.ndarray, shape: StepShape) -> RunStep:
    """A step of running sequences, each a token longer than in the one before."""
    batch = HostBatch(shape, shape.num_seqs)
    batch.token_ids[:] = -1
    batch.positions[:] = lengths - 1
    batch.query_starts[:] = np.arange(shape.num_seqs + 1)
    batch.seq_integers[0] = lengths
    for row, length in enumerate(lengths):
        batch.page_table[row, : -(-length // 16)] = 1 + np.arange(-(-length // 16)) + 1000 * row
    batch.seq_floats[:] = 0.7
    return RunStep(shape, batch.integers, batch.floats)


def test_a_decode_step_costs_what_changed() -> None:
    """256 sequences of up to 8,192 tokens: 540 KB of arrays, of which a step changes less than 1 %."""
    shape = StepShape(256, 256, 512, True)
    lengths = np.random.default_rng(0).integers(1, 8000, 256)
    sender = CommandCodec()
    sender.encode(decode_step(lengths, shape))
    command = decode_step(lengths + 1, shape)
    frame = sender.encode(command)
    assert command.integers.nbytes + command.floats.nbytes > 540_000
    # Two integers of each sequence, and now and then a page: 8 bytes each, and the header.
    assert len(frame) < 256 * 8 * 2.2 + 400


def test_a_command_that_is_lost_is_noticed() -> None:
    rng = np.random.default_rng(0)
    sender, receiver = CommandCodec(), CommandCodec()
    receiver.decode(through_a_socket(sender.encode(random_command(rng))))
    sender.encode(random_command(rng))
    with pytest.raises(HostError, match="out of step: command 2 came, and 1 was next"):
        receiver.decode(through_a_socket(sender.encode(random_command(rng))))


def test_a_batch_that_differs_is_noticed() -> None:
    shape = SHAPES[0]
    sender, receiver = CommandCodec(), CommandCodec()
    receiver.decode(
        through_a_socket(sender.encode(decode_step(np.array([3, 4, 5]), StepShape(3, 3, 5, True))))
    )
    step = RunStep(
        shape, np.arange(shape.num_integers, dtype=np.int32), np.ones(shape.num_floats, np.float32)
    )
    receiver.decode(through_a_socket(sender.encode(step)))
    receiver._last[shape, 1][7] += 1
    changed = RunStep(shape, step.integers + (np.arange(shape.num_integers) == 3), step.floats)
    with pytest.raises(HostError, match="out of step: the arrays of command 2"):
        receiver.decode(through_a_socket(sender.encode(changed)))


@pytest.mark.parametrize(
    "speech",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" * 20,
        b"\x03\x00\x00\x00\x00\x00\x00\x00[1]",
        b"\x02\x00\x00\x00\x00\x00\x00\x00{}",
        b"\x03\x00\x00\x00\x00\x00\x00\x00\xff\xff\xff",
        b"\xff\xff\xff\xff\xff\xff\xff\xff",
    ],
)
def test_other_languages_are_refused(speech: bytes) -> None:
    with pytest.raises(HostError, match="is no host of jaxllm"):
        through_a_socket(speech)


def test_an_end_is_an_error() -> None:
    left, right = socket.socketpair()
    left.sendall(to_frame({"kind": "alive"})[:-1])
    left.close()
    with right, pytest.raises(ConnectionError):
        receive(right)

"""How hosts speak: frames of a JSON header and raw arrays, over TCP. Nothing that is received is run.

A step's arrays are nearly those of the step before: most of a page table stays as it is, and most of a
padded batch is zeros. What is sent of an array is what changed since the last one of its kind, and a
checksum of the whole, so that two hosts that have come to disagree notice.
"""

from __future__ import annotations

import socket
import struct
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import orjson

from jaxllm.errors import HostError
from jaxllm.execution.batch import StepShape
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

_SIZES = struct.Struct("<II")
# No header or body comes near these; what claims to be larger is somebody who speaks another language.
_MOST_HEADER, _MOST_BODY = 64 << 20, 1 << 30

_COMMANDS: dict[str, type[Any]] = {
    kind.__name__: kind for kind in (RunStep, SampleLate, WriteCounts, WriteBias, CopyPages, SleepAt, WakeUp)
}


class Message(NamedTuple):
    """What one host tells another.

    Attributes:
        header: plain values, "kind" among them.
        body: bytes of the arrays that the header describes.
    """

    header: dict[str, Any]
    body: memoryview = memoryview(b"")


def to_frame(header: dict[str, Any], arrays: Sequence[np.ndarray] = ()) -> bytes:
    """A message as it travels."""
    head = orjson.dumps(header)
    parts = [array.tobytes() for array in arrays]
    return b"".join([_SIZES.pack(len(head), sum(map(len, parts))), head, *parts])


def receive(connection: socket.socket) -> Message:
    """The next message; waits for it.

    Raises:
        ConnectionError: the other side is gone.
        HostError: what came is no message.
    """
    head_size, body_size = _SIZES.unpack(_receive_exactly(connection, _SIZES.size))
    if head_size > _MOST_HEADER or body_size > _MOST_BODY:
        raise HostError("what speaks at the other end is no host of jaxllm")
    try:
        header = orjson.loads(_receive_exactly(connection, head_size))
    except orjson.JSONDecodeError as error:
        raise HostError("what speaks at the other end is no host of jaxllm") from error
    if not isinstance(header, dict) or not isinstance(header.get("kind"), str):
        raise HostError("what speaks at the other end is no host of jaxllm")
    return Message(header, memoryview(_receive_exactly(connection, body_size)))


def _receive_exactly(connection: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    view, got = memoryview(buffer), 0
    while got < size:
        count = connection.recv_into(view[got:])
        if count == 0:
            raise ConnectionError("the connection was closed")
        got += count
    return buffer


class CommandCodec:
    """Commands to messages and back. Each side keeps what the other does, and must see every command."""

    def __init__(self) -> None:
        self._number = 0
        self._last: dict[tuple[Any, ...], np.ndarray] = {}

    def encode(self, command: Command) -> bytes:
        """A command as a frame, the next one in order."""
        fields: list[Any] = []
        arrays: list[np.ndarray] = []
        checksum = 0
        for position, value in enumerate(command):
            if not isinstance(value, np.ndarray):
                fields.append(list(value) if isinstance(value, tuple) else value)
                continue
            words = _words(value)
            base = self._base(command, position, words)
            checksum = zlib.crc32(words.data, checksum)
            changed = np.flatnonzero(words != base)
            dense = 2 * len(changed) >= len(words)
            arrays += [words] if dense else [changed.astype(np.uint32), words[changed]]
            fields.append(
                {"dtype": value.dtype.str, "shape": value.shape, "changed": None if dense else len(changed)}
            )
            self._remember(command, position, words)
        header = {
            "kind": type(command).__name__,
            "number": self._number,
            "fields": fields,
            "checksum": checksum,
        }
        self._number += 1
        return to_frame(header, arrays)

    def decode(self, message: Message) -> tuple[int, Command]:
        """The number and the command of a message.

        Raises:
            HostError: it is not the next one, or not what was meant.
        """
        header, body = message
        if header["number"] != self._number:
            raise HostError(f"out of step: command {header['number']} came, and {self._number} was next")
        kind = _COMMANDS[header["kind"]]
        fields = list(header["fields"])
        if kind is RunStep:
            fields[0] = StepShape(*fields[0])
        shell = kind(*fields)
        checksum = offset = 0
        for position, value in enumerate(fields):
            if not isinstance(value, dict):
                continue
            dtype, shape, changed = np.dtype(value["dtype"]), value["shape"], value["changed"]
            size = -(-int(np.prod(shape, dtype=np.int64)) * dtype.itemsize // 4)
            count = size if changed is None else changed
            if changed is None:
                words = np.frombuffer(body, np.uint32, count, offset).copy()
                offset += 4 * count
            else:
                indices = np.frombuffer(body, np.uint32, count, offset)
                values = np.frombuffer(body, np.uint32, count, offset + 4 * count)
                offset += 8 * count
                words = self._base(shell, position, np.broadcast_to(np.uint32(0), size)).copy()
                words[indices] = values
            checksum = zlib.crc32(words.data, checksum)
            self._remember(shell, position, words)
            raw = words.view(np.uint8)[: int(np.prod(shape, dtype=np.int64)) * dtype.itemsize]
            fields[position] = raw.view(dtype).reshape(shape)
        if checksum != header["checksum"]:
            raise HostError(f"out of step: the arrays of command {self._number} are not those that were sent")
        self._number += 1
        return header["number"], kind(*fields)

    def _base(self, command: Command, position: int, words: np.ndarray) -> np.ndarray:
        """What an array is sent as a change of: the last one of a step of that size, or zeros."""
        is_step = isinstance(command, RunStep | SampleLate)
        last = self._last.get((command[0], position)) if is_step else None
        return np.zeros(len(words), np.uint32) if last is None else last

    def _remember(self, command: Command, position: int, words: np.ndarray) -> None:
        if isinstance(command, RunStep | SampleLate):
            self._last[command[0], position] = words


def _words(array: np.ndarray) -> np.ndarray:
    """The bytes of an array as uint32, filled up with zeros."""
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    if len(raw) % 4:
        raw = np.concatenate([raw, np.zeros(-len(raw) % 4, np.uint8)])
    return raw.view(np.uint32)

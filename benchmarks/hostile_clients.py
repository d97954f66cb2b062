"""Clients that no server deserves: each a coroutine that misbehaves once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass(slots=True)
class Target:
    """Where they go, and the dice that they roll.

    Attributes:
        patience: seconds that those who only hold a connection do so, at most.
    """

    url: str
    model: str
    seed: int
    patience: float = 8.0
    random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)

    @contextlib.asynccontextmanager
    async def connect(
        self, ahead: int = 1 << 16
    ) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
        """A connection, which is shut without ado in the end.

        Args:
            ahead: bytes that are read before anybody wants them.
        """
        where = urlsplit(self.url)
        reader, writer = await asyncio.open_connection(where.hostname, where.port, limit=ahead)
        try:
            yield reader, writer
        finally:
            writer.transport.abort()

    def request(self, **fields: Any) -> bytes:
        """A request for a stream, with fields of one's own."""
        routes: list[tuple[str, dict[str, Any]]] = [
            ("/v1/completions", {"prompt": "Once upon a time"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Who are you?"}]}),
        ]
        path, what = self.random.choice(routes)
        body = {"model": self.model, **what, "max_tokens": 200, "ignore_eos": True}
        return post(path, json.dumps({**body, "stream": True, **fields}).encode())


def post(path: str, body: bytes, length: int | None = None) -> bytes:
    """A request as bytes; `length` is what it says of its body."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    )
    return head.encode() + body


async def hangs_up(target: Target) -> None:
    """Reads a part of a stream and goes, with a reset or without."""
    async with target.connect() as (reader, writer):
        writer.write(target.request(n=target.random.choice([1, 1, 3])))
        for _ in range(target.random.randrange(6)):
            await asyncio.wait_for(reader.read(400), 10)
        if target.random.random() < 0.5:
            connection = writer.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def half_closes(target: Target) -> None:
    """Says that it will send nothing more while its stream comes."""
    async with target.connect() as (reader, writer):
        writer.write(target.request(max_tokens=20))
        await asyncio.sleep(target.random.random() / 10)
        writer.write_eof()
        await asyncio.wait_for(reader.read(), 30)


async def sends_garbage(target: Target) -> None:
    """Anything but HTTP, or HTTP that is not quite right."""
    r = target.random
    text = target.request()
    cut = r.randrange(1, len(text))
    garbage = r.choice(
        [
            r.randbytes(r.randrange(1, 5000)),
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + r.randbytes(200),  # a TLS hello
            b"GET / HTTP/9.9\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            text[:cut] + r.randbytes(3) + text[cut:],
            post("/v1/completions", r.randbytes(200)),
            post("/v1/completions", b"[" * 50_000),
            post("/v1/completions", b'{"prompt": "a", "max_tokens": 1e999}'),
            post("/v1/completions", b'{"prompt": "\\ud800", "max_tokens": 1}'),
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -5\r\n\r\n",
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
            b"GET / HTTP/1.1\r\nHost: x\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
            b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 300,  # and waits for none of the answers
        ]
    )
    async with target.connect() as (reader, writer):
        writer.write(garbage)
        await asyncio.wait_for(reader.read(1000), 10)


async def trickles(target: Target) -> None:
    """A byte now and then, of the head or of the body, until it is sent away (Slowloris)."""
    text = target.request()
    begin = target.random.choice([0, text.index(b"\r\n\r\n") + 4])
    async with target.connect() as (reader, writer):
        writer.write(text[:begin])
        sent_away = asyncio.ensure_future(reader.read(1))
        for byte in text[begin:]:
            writer.write(bytes([byte]))
            if (await asyncio.wait([sent_away], timeout=0.5))[0]:
                sent_away.exception()
                return


async def never_reads(target: Target) -> None:
    """Asks for much and takes nothing of it."""
    async with target.connect(ahead=1) as (_, writer):
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = {"model": target.model, "prompt": "a", "n": 8, "max_tokens": 200, "ignore_eos": True}
        writer.write(post("/v1/completions", json.dumps({**body, "stream": True, "logprobs": 20}).encode()))
        await asyncio.sleep(target.random.uniform(0.1, target.patience))


async def sends_too_much(target: Target) -> None:
    """A body without end, announced or not, or one that never comes."""
    async with target.connect() as (reader, writer):
        if target.random.random() < 0.5:
            writer.write(post("/v1/completions", b"{", length=10**12))
        else:
            head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            writer.write(head)
            piece = b"100000\r\n" + b" " * 2**20 + b"\r\n"
            for _ in range(64):
                writer.write(piece)
                await asyncio.wait_for(writer.drain(), 30)
        await asyncio.wait_for(reader.read(1000), 30)


async def wants_too_much(target: Target) -> None:
    """Requests that mean an effort: a body of numbers, a schema that branches, a pattern that explodes."""
    schema: Any = {"type": "integer"}
    for _ in range(8):
        arrays = {"type": "array", "items": schema}
        schema = {"anyOf": [arrays, {"type": "object", "additionalProperties": schema}]}
    bodies: list[dict[str, Any]] = [
        {"prompt": [1] * 200_000},
        {"prompt": "word " * 200_000},
        {"prompt": "a", "n": 10_000},
        {"prompt": "a", "structured_outputs": {"regex": "(a|a)*" * 30 + "b{1000000}"}},
        {"prompt": "a", "structured_outputs": {"json": schema}},
        {"prompt": ["a"] * 3000, "max_tokens": 1},
    ]
    body = target.random.choice(bodies)
    async with target.connect() as (reader, writer):
        writer.write(post("/v1/completions", json.dumps({"model": target.model, **body}).encode()))
        await asyncio.wait_for(reader.read(1000), 60)


async def crowd(target: Target, connections: int, seconds: float) -> None:
    """Opens very many connections, says nothing on any, and leaves all at once."""
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(connections):
            await stack.enter_async_context(target.connect())
        await asyncio.sleep(seconds)


HOSTILE: dict[str, Callable[[Target], Awaitable[None]]] = {
    "hangs up": hangs_up,
    "half-closes": half_closes,
    "sends garbage": sends_garbage,
    "trickles": trickles,
    "never reads": never_reads,
    "sends too much": sends_too_much,
    "wants too much": wants_too_much,
}

"""Answers that outlive their first byte: server-sent events, and clients that go away meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from jaxllm.outputs import RequestOutput
from jaxllm.serve.errors import GenerationError, OverloadedError, body_of, response_of, status_of
from jaxllm.serve.state import Generation

logger = logging.getLogger(__name__)

DONE = b"data: [DONE]\n\n"

# Nobody reads it; the status that nginx logs for a client that closed its connection.
CLIENT_CLOSED_REQUEST = 499


def event(data: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + orjson.dumps(data) + b"\n\n"


def named_event(data: dict[str, Any]) -> bytes:
    """One server-sent event that is named by its own type."""
    return b"event: " + data["type"].encode() + b"\n" + event(data)


class EventStream(Response):
    """Sends events as they come; one that fails before its first event is an ordinary error response.

    Args:
        events: bodies of one or more whole events each.
        close: called when the client goes away, and at the end; must make `events` end.
        end: sent behind the last event.
        failure: what is sent instead of the rest where the events end in an exception.
        refusal: the response where they do before the first of them.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        close: Callable[[], None],
        headers: Mapping[str, str] | None = None,
        *,
        end: bytes = DONE,
        failure: Callable[[Exception], bytes] = lambda error: event(body_of(error)) + DONE,
        refusal: Callable[[Exception], Response] = response_of,
    ) -> None:
        self.status_code = 200
        self.background = None
        self._events = events
        self._close = close
        self._end, self._failure, self._refusal = end, failure, refusal
        # Without this, nginx collects a stream before it passes it on.
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with closing_on_disconnect(receive, self._close):
                try:
                    first = await anext(self._events, None)
                except Exception as error:
                    log_unexpected(error)
                    await self._refusal(error)(scope, receive, send)
                    return
                await send(
                    {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                )
                last = self._end
                try:
                    if first is not None:
                        await send({"type": "http.response.body", "body": first, "more_body": True})
                        async for body in self._events:
                            await send({"type": "http.response.body", "body": body, "more_body": True})
                except OSError:
                    return  # The connection broke under a send.
                except Exception as error:
                    log_unexpected(error)
                    last = self._failure(error)
                await send({"type": "http.response.body", "body": last, "more_body": False})
        finally:
            self._close()


@contextlib.asynccontextmanager
async def closing_on_disconnect(receive: Receive, close: Callable[[], None]) -> AsyncIterator[None]:
    """Call `close` when the client goes away inside the block, and also when the block is cancelled."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        close()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        close()
        raise
    finally:
        watcher.cancel()


async def merge(generations: Sequence[Generation]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """The outputs of several generations as they come, each with the position of its generation.

    Raises:
        GenerationError: one of them ended with an error.
    """
    if len(generations) == 1:
        async for output in generations[0].stream:
            raise_if_failed(output)
            yield 0, output
        return
    waiting = {asyncio.ensure_future(anext(g.stream, None)): i for i, g in enumerate(generations)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in sorted(done, key=waiting.__getitem__):
                index = waiting.pop(task)
                following = task.result()
                if following is not None:
                    raise_if_failed(following)
                    waiting[asyncio.ensure_future(anext(generations[index].stream, None))] = index
                    yield index, following
    finally:
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def collect(generations: Sequence[Generation]) -> list[RequestOutput] | None:
    """The last output of each generation, or None where the client went away before."""
    finals: list[RequestOutput] = []
    for generation in generations:
        final = None
        async for output in generation.stream:
            final = output
        if final is None or not final.finished:
            return None
        raise_if_failed(final)
        finals.append(final)
    return finals


def raise_if_failed(output: RequestOutput) -> None:
    """Turn an output that the engine gave up into an exception."""
    if output.error is not None or any(c.finish_reason == "error" for c in output.outputs):
        raise GenerationError(output.error or "The engine failed while it worked on this request.")


def log_unexpected(error: BaseException) -> None:
    """Keep the particulars of what a client is only told to be an internal error."""
    if status_of(error) >= 500 and not isinstance(error, OverloadedError):
        logger.error("A request failed: %s", error, exc_info=error)

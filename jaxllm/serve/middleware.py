"""What stands between the socket and the routes: keys, limits, request ids, draining, the count of requests.

Plain ASGI: a wrapper that buffers would hide from the routes that a client went away.
"""

from __future__ import annotations

import hmac
import uuid
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxllm.serve.errors import error_response
from jaxllm.serve.logs import REQUEST_ID
from jaxllm.serve.state import TRACE_HEADERS, ServerState
from jaxllm.tracing import trace_headers_of

# Routes that put the engine to work.
WORK = frozenset(
    {
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/v1/messages",
        "/v1/embeddings",
        "/pooling",
        "/classify",
        "/score",
        "/v1/score",
        "/rerank",
        "/v1/rerank",
        "/v2/rerank",
    }
)


def path_of(scope: Scope) -> str:
    """The path of a request without the prefix under which a proxy serves it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if root and (path == root or path.startswith(root + "/")):
        return path[len(root) :]
    return path


class APIKeys:
    """Refuses requests that bring none of the keys, but to the routes by which a machine is watched.

    Args:
        also_open: further paths that need no key.
    """

    OPEN = frozenset({"/health", "/ping"})

    def __init__(self, app: ASGIApp, keys: Sequence[str], also_open: frozenset[str] = frozenset()) -> None:
        self._app = app
        self._open = self.OPEN | also_open
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] != "OPTIONS" and path_of(scope) not in self._open:
            headers = Headers(scope=scope)
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if not scheme and "x-api-key" in headers:  # Anthropic's clients send it so.
                scheme, key = "bearer", headers["x-api-key"]
            # Every key is compared, in constant time, so that timing tells nothing about any of them.
            matches = [hmac.compare_digest(key.strip().encode(), own) for own in self._keys]
            if scheme.lower() != "bearer" or not any(matches):
                response = error_response(
                    401,
                    "This server needs a valid API key, sent as 'Authorization: Bearer KEY'.",
                    headers={"www-authenticate": "Bearer"},
                )
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class RequestGate:
    """Counts the generation requests in progress, and refuses new ones while the server drains."""

    PATHS = WORK

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app = app
        self._state = state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or path_of(scope) not in self.PATHS:
            await self._app(scope, receive, send)
            return
        if self._state.engine.is_draining:
            response = error_response(
                503,
                "The server is shutting down and takes no new requests; send them elsewhere.",
                headers={"connection": "close"},
            )
            await response(scope, receive, send)
            return
        self._state.requests_in_progress += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._state.requests_in_progress -= 1


class Limits:
    """Refuses requests with too many headers, too large ones, or too large a body.

    Args:
        body: bytes.
        headers: how many.
        header_bytes: of all names and values.
    """

    def __init__(self, app: ASGIApp, body: int, headers: int, header_bytes: int) -> None:
        self._app = app
        self._body = body
        self._headers = headers
        self._header_bytes = header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = scope["headers"]
        if len(headers) > self._headers or sum(len(n) + len(v) for n, v in headers) > self._header_bytes:
            message = (
                f"The request has too many or too large headers: up to {self._headers} headers of"
                f" {self._header_bytes} bytes in all are taken."
            )
            await error_response(431, message, headers={"connection": "close"})(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._body:
            await self._too_large()(scope, receive, send)
            return
        seen = 0

        async def receive_counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._body:
                raise HTTPException(413, self._too_large_message())
            return message

        await self._app(scope, receive_counted, send)

    def _too_large(self) -> Response:
        # What is left of the body is not read, so that the connection cannot go on.
        return error_response(413, self._too_large_message(), headers={"connection": "close"})

    def _too_large_message(self) -> str:
        return f"The body is larger than the {self._body} bytes that are taken."


class RequestIds:
    """Gives every request an id, its caller's X-Request-Id where there is one, for the log to show.

    Args:
        in_response: give it back with the response.
    """

    def __init__(self, app: ASGIApp, in_response: bool) -> None:
        self._app = app
        self._in_response = in_response

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own = Headers(scope=scope).get("x-request-id") or uuid.uuid4().hex
        # Set for good: the line of the access log is written behind this, in the same task.
        REQUEST_ID.set(own)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = own
            await send(message)

        await self._app(scope, receive, send_with_id if self._in_response else send)


class TraceContext:
    """Keeps what a request says of the trace that it is a part of, for its spans."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            TRACE_HEADERS.set(trace_headers_of(Headers(scope=scope)))
        await self._app(scope, receive, send)

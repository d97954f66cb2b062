"""What stands between the socket and the routes: keys, request ids, draining, and the count of requests.

Plain ASGI: a wrapper that buffers would hide from the routes that a client went away.
"""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxllm.serve.errors import error_response
from jaxllm.serve.state import ServerState

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
# Routes that show or change the server itself.
OPERATION = frozenset(
    {"/server_info", "/reset_prefix_cache", "/start_profile", "/stop_profile", "/tokenizer_info"}
)


def path_of(scope: Scope) -> str:
    """The path of a request without the prefix under which a proxy serves it."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "").rstrip("/")
    if root and (path == root or path.startswith(root + "/")):
        return path[len(root) :]
    return path


class APIKeys:
    """Refuses requests that bring none of the keys, to /v1 and whatever else works or shows what it should
    not.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] != "OPTIONS" and self._guards(path_of(scope)):
            given = Headers(scope=scope).get("authorization", "")
            scheme, _, key = given.partition(" ")
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

    @staticmethod
    def _guards(path: str) -> bool:
        return path in WORK or path in OPERATION or path == "/v1" or path.startswith("/v1/")


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


class RequestIdHeader:
    """Gives the caller's X-Request-Id back with the response."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        own = Headers(scope=scope).get("x-request-id") if scope["type"] == "http" else None
        if own is None:
            await self._app(scope, receive, send)
            return

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = own
            await send(message)

        await self._app(scope, receive, send_with_id)

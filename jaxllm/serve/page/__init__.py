"""The page at `/`: a chat, and a view of the engine at work. Static files, and one route of data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.resources import files

from fastapi import FastAPI
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from jaxllm.serve.page.feed import LiveFeed
from jaxllm.serve.state import ServerState
from jaxllm.serve.streaming import EventStream

_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}

# The page's own files, and nothing else, from nowhere else; and no text that becomes markup.
CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)

_HEADERS = {
    "content-security-policy": CONTENT_SECURITY_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    # Asked for anew each time, and sent only where it has changed.
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class StaticFile:
    """A file of the page, in memory."""

    content: bytes
    media_type: str
    etag: str


def load_static_files() -> dict[str, StaticFile]:
    """The page's files by the path of their URL."""
    found = {}
    for entry in files("jaxllm.serve.page").joinpath("static").iterdir():
        content = entry.read_bytes()
        path = "/" if entry.name == "index.html" else f"/page/{entry.name}"
        etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        found[path] = StaticFile(content, _MEDIA_TYPES[entry.name.rpartition(".")[2]], etag)
    return found


def add_page_routes(app: FastAPI, state: ServerState) -> frozenset[str]:
    """The page, and /engine/events for it; returns the paths that hold no secret."""
    static_files = load_static_files()

    async def static(http: HTTPRequest) -> Response:
        # The name of a route is its path, without the prefix under which a proxy serves it.
        file = static_files[http.scope["route"].name]
        headers = {**_HEADERS, "etag": file.etag}
        if http.headers.get("if-none-match") == file.etag:
            return Response(status_code=304, headers=headers)
        return Response(file.content, media_type=file.media_type, headers=headers)

    for path in static_files:
        app.add_api_route(path, static, methods=["GET", "HEAD"], name=path, include_in_schema=False)

    feed = LiveFeed(state.engine)

    @app.get("/engine/events", include_in_schema=False)
    async def engine_events() -> Response:
        watcher = feed.watch()
        return EventStream(watcher.events(), watcher.close)

    return frozenset(static_files)

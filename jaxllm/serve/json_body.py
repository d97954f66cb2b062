"""Bodies as JSON: read strictly, and no deeper than anything here has a use for."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from json import JSONDecodeError
from typing import Any

import orjson
from fastapi.routing import APIRoute
from starlette.requests import Request
from starlette.responses import Response

# Lists and objects within each other. A schema of a person's making has ten levels; what walks a value by
# recursion (templates, grammars, the encoder of an answer) must not run out of stack.
MAX_DEPTH = 100


def parse_json(body: bytes) -> Any:
    """The value of a body. What has no place in an answer has none here: NaN, Infinity, halves of surrogates.

    Raises:
        JSONDecodeError: it is not JSON, or nested too deeply.
    """
    value = orjson.loads(body)
    if body.count(b"[") + body.count(b"{") > MAX_DEPTH and _is_deeper(value, MAX_DEPTH):
        raise JSONDecodeError(f"it is nested more than {MAX_DEPTH} deep", "", 0)
    return value


def _is_deeper(value: Any, depth: int) -> bool:
    """Whether lists and objects stand in each other more than `depth` times."""
    level = [value]
    for _ in range(depth):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


class _JSONRequest(Request):
    async def json(self) -> Any:
        """The body's value."""
        return parse_json(await self.body())


class JSONRoute(APIRoute):
    """A route whose body is read by `parse_json`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            return await handle(_JSONRequest(request.scope, request.receive))

        return handle_strictly

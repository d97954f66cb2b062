"""Exceptions as OpenAI error objects: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

import orjson
from starlette.responses import Response

from jaxllm.errors import EngineDeadError, InvalidRequestError, UnsupportedError


class NotFoundError(Exception):
    """Something the request names that is not here, such as a model.

    Attributes:
        param: the field that names it.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class OverloadedError(Exception):
    """More work than the server takes at once; the client may try again, here or elsewhere."""


class GenerationError(Exception):
    """A request that the engine ended with an error."""


# Seconds after which a client that met a full queue may try again.
RETRY_AFTER = "1"

_TYPES = {
    HTTPStatus.BAD_REQUEST: "BadRequestError",
    HTTPStatus.UNAUTHORIZED: "AuthenticationError",
    HTTPStatus.NOT_FOUND: "NotFoundError",
    HTTPStatus.METHOD_NOT_ALLOWED: "MethodNotAllowedError",
    HTTPStatus.INTERNAL_SERVER_ERROR: "InternalServerError",
    HTTPStatus.NOT_IMPLEMENTED: "NotImplementedError",
    HTTPStatus.SERVICE_UNAVAILABLE: "ServiceUnavailable",
}


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """The JSON object of an error response; also the last event but one of a stream that failed."""
    kind = _TYPES.get(HTTPStatus(status), HTTPStatus(status).phrase.replace(" ", ""))
    return {"error": {"message": message, "type": kind, "param": param, "code": int(status)}}


def error_response(
    status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """An error as an HTTP response."""
    body = orjson.dumps(error_body(status, message, param))
    return Response(body, status, media_type="application/json", headers=dict(headers or {}))


def status_of(error: BaseException) -> HTTPStatus:
    """The HTTP status that an exception means."""
    if isinstance(error, NotFoundError):
        return HTTPStatus.NOT_FOUND
    if isinstance(error, EngineDeadError | OverloadedError):
        return HTTPStatus.SERVICE_UNAVAILABLE
    if isinstance(error, InvalidRequestError | UnsupportedError):
        return HTTPStatus.BAD_REQUEST
    return HTTPStatus.INTERNAL_SERVER_ERROR


def message_of(error: BaseException) -> str:
    """What a client is told; the particulars of a bug stay in the server's log."""
    if status_of(error) is HTTPStatus.INTERNAL_SERVER_ERROR and not isinstance(error, GenerationError):
        return "The server met an unexpected error; its log has the particulars."
    return str(error)


def body_of(error: BaseException) -> dict[str, Any]:
    """The error object of an exception."""
    return error_body(status_of(error), message_of(error), getattr(error, "param", None))


def response_of(error: BaseException) -> Response:
    """The HTTP response of an exception."""
    headers = {"retry-after": RETRY_AFTER} if isinstance(error, OverloadedError) else None
    return error_response(status_of(error), message_of(error), getattr(error, "param", None), headers)


def describe_validation(errors: Sequence[Mapping[str, Any]], fields: Sequence[str]) -> tuple[str, str | None]:
    """Message and field name for what pydantic found wrong with a body.

    Args:
        errors: of `RequestValidationError.errors()`.
        fields: names that the body may hold, to suggest one of for a name that it may not.
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first.get("ctx", {}).get("error", "it does not parse")
        return f"The body is not valid JSON: {reason} (at character {first['loc'][-1]}).", None
    path = [str(part) for part in first["loc"] if part != "body"]
    param = path[0] if path else None
    if first["type"] == "extra_forbidden" and len(path) == 1:
        near = difflib.get_close_matches(path[0], fields, n=1)
        hint = f" Did you mean '{near[0]}'?" if near else " Remove it."
        return f"Unknown field '{path[0]}'.{hint}", param
    if first["type"] == "missing":
        return f"Field '{'.'.join(path)}' is required.", param
    if param is None:
        return f"The body must be a JSON object: {first['msg']}.", None
    # A union reports one error per member; together they say what is allowed.
    same = [e["msg"] for e in errors if [p for p in e["loc"] if p != "body"][:1] == [param]]
    reasons = "; or ".join(dict.fromkeys(same[:4]))
    value = repr(first.get("input"))
    shown = value if len(value) <= 100 else value[:100] + "..."
    label = param if len(same) > 1 else ".".join(path)
    return f"Field '{label}' is {shown}: {reasons}.", param

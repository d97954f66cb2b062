"""The server's log: lines of text, or JSON objects with the id of the request that they are about."""

from __future__ import annotations

import logging
from collections.abc import Collection
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import orjson

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the HTTP request that the running task answers."""

_ACCESS_LOGGER = "uvicorn.access"
_ACCESS_FIELDS = ("client", "method", "path", "http_version", "status")


class JSONFormatter(logging.Formatter):
    """Writes a record as one JSON object: time, level, logger, message, and what else there is to say."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        request_id = REQUEST_ID.get()
        if request_id is not None:
            line["request_id"] = request_id
        if record.name == _ACCESS_LOGGER and isinstance(record.args, tuple):
            line |= dict(zip(_ACCESS_FIELDS, record.args, strict=False))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


class QuietPaths(logging.Filter):
    """Drops the lines of the access log about requests to certain paths."""

    def __init__(self, paths: Collection[str]) -> None:
        super().__init__()
        self._paths = frozenset(paths)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record stays."""
        if not isinstance(record.args, tuple) or len(record.args) < len(_ACCESS_FIELDS):
            return True
        return str(record.args[2]).partition("?")[0] not in self._paths


def configure_logging(log_format: str = "text", quiet_paths: Collection[str] = ()) -> None:
    """Show the log of `jaxllm` on stderr, unless the program that runs this has set up its own.

    Args:
        log_format: "text" or "json"; the latter is for the HTTP server's lines, too.
        quiet_paths: requests to these get no line in the access log.
    """
    root = logging.getLogger("jaxllm")
    if not root.handlers and not logging.getLogger().handlers:
        root.addHandler(_handler(log_format))
        root.propagate = False
    if root.level == logging.NOTSET:
        root.setLevel(logging.INFO)
    if log_format == "json":
        uvicorn = logging.getLogger("uvicorn")
        uvicorn.handlers = [_handler(log_format)]
        uvicorn.propagate = False
    access = logging.getLogger(_ACCESS_LOGGER)
    access.filters = [QuietPaths(quiet_paths)] if quiet_paths else []


def _handler(log_format: str) -> logging.Handler:
    handler = logging.StreamHandler()
    text = logging.Formatter("%(levelname)s %(asctime)s [%(name)s] %(message)s", "%H:%M:%S")
    handler.setFormatter(JSONFormatter() if log_format == "json" else text)
    return handler

"""One connection, and how long it may keep the server waiting."""

from __future__ import annotations

import asyncio
import functools
import logging
from http import HTTPStatus
from typing import Any

import orjson
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState as UvicornState

from jaxllm.serve.config import ServerConfig
from jaxllm.serve.errors import error_body

logger = logging.getLogger(__name__)


class BoundedConnection(H11Protocol):
    """uvicorn's connection, closed on a client that is too slow, and refused where there are too many.

    Without this a client that sends a byte a minute, or never reads what it asked for, holds a connection
    (and a request) for as long as it likes.

    Args:
        limits: `request_timeout`, `write_timeout` and `max_connections` of it are heeded.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: UvicornState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        limits: ServerConfig,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = limits
        self._request_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(
                HTTPStatus.SERVICE_UNAVAILABLE,
                f"The server has {self._limits.max_connections} connections and takes no more"
                " (--max-connections); try again in a moment, or on another server.",
            )
        else:
            self._heed_request()

    def data_received(self, data: bytes) -> None:
        """A part of a request has come, of any size."""
        super().data_received(data)
        self._heed_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone, or was sent away."""
        self._request_timer = _cancelled(self._request_timer)
        self._write_timer = _cancelled(self._write_timer)
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is written to."""
        super().pause_writing()
        if self._write_timer is None:
            self._write_timer = self.loop.call_later(self._limits.write_timeout, self._abort)

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        self._write_timer = _cancelled(self._write_timer)

    def _heed_request(self) -> None:
        """Run the timer while a request is on its way in, and only then."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete and not cycle.more_body:
            self._request_timer = _cancelled(self._request_timer)
        elif self._request_timer is None and not self.transport.is_closing():
            self._request_timer = self.loop.call_later(self._limits.request_timeout, self._give_up)

    def _give_up(self) -> None:
        self._request_timer = None
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            seconds = f"{self._limits.request_timeout:g}"
            self._refuse(HTTPStatus.REQUEST_TIMEOUT, f"The request did not come within {seconds} seconds.")
        else:
            self.transport.close()

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        """Say why, past an application that knows of no request yet, and close."""
        if self.transport.is_closing():
            return
        body = orjson.dumps(error_body(status, message))
        head = (
            f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _abort(self) -> None:
        logger.info("A client read nothing for %g s and was sent away.", self._limits.write_timeout)
        self._write_timer = None
        self.transport.abort()


def bounded_connections(limits: ServerConfig) -> Any:
    """What uvicorn is to make its connections with."""
    return functools.partial(BoundedConnection, limits=limits)


def _cancelled(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """None, in the place of a timer that no longer runs."""
    if timer is not None:
        timer.cancel()
    return None

"""The other hosts' side: a connection to host 0 that brings commands, and tells it that this host lives."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable
from typing import Any, NoReturn

from jaxllm.errors import HostError
from jaxllm.execution.hosts.group import HEARTBEAT, SILENCE, SILENCE_AT_START, nothing_done
from jaxllm.execution.hosts.wire import Message, receive, to_frame

logger = logging.getLogger(__name__)

# Seconds that host 0 may take to tell who died.
_NEWS = 4.0
# How often a host looks whether host 0 is there yet.
_RETRY = 0.5


class HostLink:
    """A connection to host 0. When it ends, so does this process, whatever its devices wait for.

    Attributes:
        host: which this is.
        welcome: what host 0 said when all were there.
        status: what it is told once a second: the last command started and done, a digest of
            all results so far, and which steps are compiled.
    """

    def __init__(self, host: int, connection: socket.socket, welcome: dict[str, Any]) -> None:
        self.host = host
        self.welcome = welcome
        self.status = nothing_done()
        self.ready: Callable[[], list[int]] = list
        self._connection = connection
        self._lock = threading.Lock()
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._last_heard = time.monotonic()
        self._silence = SILENCE_AT_START
        self._stopped = False
        connection.settimeout(None)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=self._read, name="jaxllm-host-0", daemon=True).start()
        threading.Thread(target=self._watch, name="jaxllm-hosts", daemon=True).start()

    def started(self) -> None:
        """From now on host 0 is dead sooner when it is silent."""
        self._silence = SILENCE

    def gather(self, name: str, value: Any) -> list[Any]:
        """See `HostGroup.gather`."""
        self._send({"kind": "value", "name": name, "value": value})
        answer = self.receive().header
        if answer["kind"] != "values" or answer["name"] != name:
            raise HostError(f"out of step: host 0 is at {answer}, and this host at {name!r}")
        values: list[Any] = answer["values"]
        return values

    def receive(self) -> Message:
        """The next thing that host 0 says; waits for it."""
        return self._inbox.get()

    def note_done(self, number: int, result: bytes) -> None:
        """Takes the result of a command into the digest."""
        digest = zlib.crc32(result, self.status["digest"])
        self.status |= {"done": number, "digest": digest}

    def fail(self, error: BaseException) -> NoReturn:
        """Tells host 0 what went wrong here, and ends this process.

        What fails while steps run fails most likely because another host died: host 0 gets time to find
        out and to say so, which ends this process, too.
        """
        reason = str(error) if isinstance(error, HostError) else f"{type(error).__name__}: {error}"
        if self._silence == SILENCE and not isinstance(error, HostError):
            time.sleep(_NEWS)
        with contextlib.suppress(OSError):
            self._send({"kind": "failed", "reason": reason})
        self._leave(reason)

    def close(self) -> None:
        """Host 0 said stop: what it does with the connection matters no more."""
        self._stopped = True

    def _send(self, header: dict[str, Any]) -> None:
        with self._lock:
            self._connection.sendall(to_frame(header))

    def _read(self) -> None:
        try:
            while True:
                message = receive(self._connection)
                self._last_heard = time.monotonic()
                match message.header["kind"]:
                    case "alive":
                        continue
                    case "end":
                        self._leave(f"host 0 ended: {message.header['reason']}")
                    case "stop":
                        self._stopped = True
                self._inbox.put(message)
        except Exception as error:  # Also of what is said in a way that nobody expects.
            if not self._stopped:
                self._leave(f"host 0 is gone ({error or type(error).__name__})")

    def _watch(self) -> None:
        while not self._stopped:
            silent = time.monotonic() - self._last_heard
            if silent > self._silence:
                self._leave(f"host 0 has not been heard of for {silent:.0f} s")
            with contextlib.suppress(OSError):  # Whoever reads from it notices, too.
                self._send({"kind": "alive", **self.status, "ready": self.ready()})
            time.sleep(HEARTBEAT)

    def _leave(self, reason: str) -> NoReturn:
        logger.critical("Host %d ends: %s", self.host, reason)
        leave_now()


def leave_now(status: int = 1) -> NoReturn:
    """Ends this process with whatever its threads and devices wait for."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def connect(address: str, port: int, host: int, hello: dict[str, Any], timeout: float) -> HostLink:
    """Finds host 0 and waits until all hosts are there.

    Args:
        hello: what it is told, see `await_hosts`.

    Raises:
        HostError: it was not found in time, or does not want this host.
    """
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection((address, port), timeout=5)
            break
        except OSError as error:
            if time.monotonic() > deadline:
                raise HostError(
                    f"host 0 was not found at {address}:{port} within {timeout:g} s ({error}). Start it, see"
                    " whether it can be reached from here, and give its own --master-addr and --master-port"
                ) from error
            time.sleep(_RETRY)
    try:
        connection.sendall(to_frame({"kind": "hello", "host": host, **hello}))
        # All of them have to come; host 0 gives up in time, and says so.
        connection.settimeout(timeout + 30)
        header = receive(connection).header
    except OSError as error:
        raise HostError(f"host 0 at {address}:{port} is gone ({error})") from error
    if header["kind"] != "welcome":
        raise HostError(f"host 0 ended: {header.get('reason', header)}")
    return HostLink(host, connection, header)

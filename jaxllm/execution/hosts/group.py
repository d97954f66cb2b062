"""Host 0's side of the hosts that share a model: who is there, what they are told, and whether they live.

One TCP connection to each of the others carries commands one way and signs of life both ways. A host is
dead when its connection ends, when it has not been heard of for some seconds, or when it says so itself;
then all of them end, since a step that lacks one of them never does.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from jaxllm.errors import HostError
from jaxllm.execution.hosts.wire import receive, to_frame

logger = logging.getLogger(__name__)

HEARTBEAT = 1.0  # seconds between two signs of life
SILENCE = 15.0  # seconds without one, after which a host is dead
# A host that loads weights may be deep in one long call.
SILENCE_AT_START = 60.0
# Seconds within which somebody who connects must have said who it is.
_HELLO_TIMEOUT = 10.0


def nothing_done() -> dict[str, Any]:
    """What a host says of its commands before the first of them, see `HostLink`."""
    return {"started": -1, "done": -1, "digest": 0, "ready": []}


class Peer:
    """Another host, as host 0 sees it.

    Attributes:
        last_heard: `time.monotonic()` of its last message.
        status: what it said last about its commands, see `HostLink`.
    """

    def __init__(self, host: int, connection: socket.socket) -> None:
        self.host = host
        self.connection = connection
        self.last_heard = time.monotonic()
        self.status = nothing_done()
        self._lock = threading.Lock()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)

    def send(self, frame: bytes) -> None:
        with self._lock:
            self.connection.sendall(frame)

    def send_if_free(self, frame: bytes) -> None:
        """The same, unless something is being sent already, which is as good as a sign of life."""
        if self._lock.acquire(blocking=False):
            try:
                self.connection.sendall(frame)
            finally:
                self._lock.release()

    def close(self) -> None:
        """Ends the connection, whoever waits on it."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
        self.connection.close()


class HostGroup:
    """The other hosts, from the moment all of them are there.

    Attributes:
        failure: why the hosts ended, or None while they live.
        check: called once a second; says what is wrong, or None.
        let_go: called once the hosts have stopped as was meant to be.
    """

    def __init__(self, peers: list[Peer], timeout: float) -> None:
        self.peers = peers
        self.failure: str | None = None
        self.check: Callable[[float], str | None] = lambda now: None
        self.let_go: Callable[[], None] = lambda: None
        self._timeout = timeout
        self._silence = SILENCE_AT_START
        self._changed = threading.Condition()
        self._values: dict[str, dict[int, Any]] = {}
        self._closed = threading.Event()
        self._callbacks: list[Callable[[HostError], None]] = []
        for peer in peers:
            peer.last_heard = time.monotonic()
            threading.Thread(
                target=self._read, args=[peer], name=f"jaxllm-host-{peer.host}", daemon=True
            ).start()
        threading.Thread(target=self._watch, name="jaxllm-hosts", daemon=True).start()

    @property
    def num_hosts(self) -> int:
        """With this one."""
        return len(self.peers) + 1

    def started(self) -> None:
        """From now on a host that is silent is dead sooner."""
        self._silence = SILENCE

    def broadcast(self, frame: bytes) -> None:
        """Sends a frame to every host.

        Raises:
            HostError: the hosts have ended.
        """
        for peer in self.peers:
            self.raise_if_failed()
            try:
                peer.send(frame)
            except OSError as error:
                self.fail(f"host {peer.host} takes nothing in any more ({error})")
        self.raise_if_failed()

    def gather(self, name: str, value: Any) -> list[Any]:
        """What every host has to say about something, host 0 first; every host calls it, and waits for all.

        Args:
            name: the same on every host, and used once.
            value: of JSON's types.

        Raises:
            HostError: a host did not say in time, or the hosts have ended.
        """
        deadline = time.monotonic() + self._timeout
        with self._changed:
            said = self._values.setdefault(name, {})
            said[0] = value
            while len(said) < self.num_hosts and self.failure is None:
                if not self._changed.wait(deadline - time.monotonic()):
                    break
        missing = [str(peer.host) for peer in self.peers if peer.host not in said]
        if missing and self.failure is None:
            self.fail(
                f"host {', '.join(missing)} did not come as far as {name!r} within {self._timeout:g} s; look"
                " at its log, or raise distributed_timeout_seconds"
            )
        self.raise_if_failed()
        values = [said[host] for host in range(self.num_hosts)]
        self.broadcast(to_frame({"kind": "values", "name": name, "values": values}))
        return values

    def on_failure(self, callback: Callable[[HostError], None]) -> None:
        """Has somebody told, on a thread of its own, when the hosts end; at once where they have."""
        with self._changed:
            if self.failure is None:
                self._callbacks.append(callback)
                return
        callback(HostError(self.failure))

    def fail(self, reason: str) -> None:
        """Ends all hosts; the first reason stands."""
        with self._changed:
            if self.failure is not None or self._closed.is_set():
                return
            self.failure = reason
            callbacks, self._callbacks = self._callbacks, []
            self._changed.notify_all()
        logger.critical("The hosts that share the model end: %s", reason)
        self._end({"kind": "end", "reason": reason})
        for callback in callbacks:
            callback(HostError(reason))

    def raise_if_failed(self) -> None:
        """Raises HostError with the reason, where the hosts have ended."""
        if self.failure is not None:
            raise HostError(self.failure)

    def wait_for_failure(self, seconds: float) -> bool:
        """Whether the hosts end within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: self.failure is not None, seconds)

    def close(self) -> None:
        """Tells the hosts to stop, as is meant to be."""
        if self.failure is None and not self._closed.is_set():
            self._closed.set()
            self._end({"kind": "stop"})

    def _end(self, header: dict[str, Any]) -> None:
        """Says a last word to every host that listens; the connections end when they do."""
        frame = to_frame(header)
        for peer in self.peers:
            with contextlib.suppress(OSError):
                peer.connection.settimeout(1.0)
                peer.send_if_free(frame)
            if self.failure is not None:
                peer.close()

    def _read(self, peer: Peer) -> None:
        try:
            while True:
                header = receive(peer.connection).header
                peer.last_heard = time.monotonic()
                match header["kind"]:
                    case "alive":
                        peer.status = header
                    case "value":
                        with self._changed:
                            self._values.setdefault(header["name"], {})[peer.host] = header["value"]
                            self._changed.notify_all()
                    case "failed":
                        self.fail(f"host {peer.host} failed: {header['reason']}")
                        return
        except Exception as error:  # Also of what is said in a way that nobody expects.
            self.fail(f"host {peer.host} is gone ({error or type(error).__name__})")
        finally:
            peer.connection.close()

    def _watch(self) -> None:
        alive = to_frame({"kind": "alive"})
        while not self._closed.wait(HEARTBEAT) and self.failure is None:
            now = time.monotonic()
            for peer in self.peers:
                silent = now - peer.last_heard
                if silent > self._silence:
                    self.fail(f"host {peer.host} has not been heard of for {silent:.0f} s")
                    return
                with contextlib.suppress(OSError):  # Whoever reads from it notices, too.
                    peer.send_if_free(alive)
            wrong = self.check(now)
            if wrong is not None:
                self.fail(wrong)


def await_hosts(
    listener: socket.socket,
    num_hosts: int,
    timeout: float,
    check_hello: Callable[[dict[str, Any]], str | None],
    welcome: dict[str, Any],
    check_coming: Callable[[], str | None] = lambda: None,
) -> HostGroup:
    """Waits until every host has said hello, and welcomes them.

    Args:
        check_hello: says what is wrong with a host that comes, or None.
        welcome: what all of them are told.
        check_coming: says why a host will not come, or None; asked about once a second.

    Raises:
        HostError: not all of them came, or one was refused; those that came are told to end.
    """
    deadline = time.monotonic() + timeout
    peers: dict[int, Peer] = {}

    def give_up(reason: str) -> NoReturn:
        for peer in peers.values():
            with contextlib.suppress(OSError):
                peer.send(to_frame({"kind": "end", "reason": reason}))
            peer.close()
        raise HostError(reason)

    told = 0.0
    while len(peers) < num_hosts - 1:
        missing = ", ".join(str(host) for host in range(1, num_hosts) if host not in peers)
        left = deadline - time.monotonic()
        if left <= 0:
            address, port = listener.getsockname()[:2]
            give_up(
                f"host {missing} of {num_hosts} did not come to {address}:{port} within {timeout:g} s. Start"
                " it with the same command and its own --node-rank, see whether it reaches this address, or"
                " raise distributed_timeout_seconds"
            )
        if time.monotonic() - told > 10:
            told = time.monotonic()
            logger.info("Waiting for host %s of %d.", missing, num_hosts)
        wrong = check_coming()
        if wrong is not None:
            give_up(wrong)
        listener.settimeout(min(left, 1.0))
        try:
            connection, address = listener.accept()
        except TimeoutError:
            continue
        hello = _hello(connection, num_hosts)
        if hello is None:
            logger.warning("Refused %s, which is none of the %d hosts.", address[0], num_hosts)
            connection.close()
            continue
        wrong = check_hello(hello)
        if wrong is None and hello["host"] not in peers:
            peers[hello["host"]] = Peer(hello["host"], connection)
            continue
        reason = wrong or f"host {hello['host']} is here already; every host has a --node-rank of its own"
        logger.warning("Refused %s: %s.", address[0], reason)
        with contextlib.suppress(OSError):
            connection.sendall(to_frame({"kind": "end", "reason": reason}))
        connection.close()
        if wrong is not None:
            give_up(wrong)
    for peer in peers.values():
        peer.send(to_frame({"kind": "welcome", **welcome}))
    return HostGroup([peers[host] for host in sorted(peers)], timeout)


def _hello(connection: socket.socket, num_hosts: int) -> dict[str, Any] | None:
    """What somebody who connected says first; None where it is no host."""
    connection.settimeout(_HELLO_TIMEOUT)
    try:
        header = receive(connection).header
    except (OSError, HostError):
        return None
    return header if header["kind"] == "hello" and header.get("host") in range(1, num_hosts) else None

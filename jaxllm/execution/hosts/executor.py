"""Has commands done by every host: sent to the others, and done here on threads that may wait for them.

A step that another host does not take part in never ends, and the thread that waits for it is lost. So the
engine's thread waits for neither: one thread begins what is to be done here, another waits for it to be
done, and the engine waits for either of them or for the news that the hosts have ended.
"""

from __future__ import annotations

import atexit
import logging
import queue
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.errors import HostError
from jaxllm.execution.batch import Program
from jaxllm.execution.commands import Command, RunStep, SampleLate
from jaxllm.execution.hosts.group import HostGroup
from jaxllm.execution.hosts.wire import CommandCodec
from sharding import leave_hosts

logger = logging.getLogger(__name__)

# A host that has not begun what this one began so many seconds ago is hung: it waits for nobody else.
_LATE = 20.0
# Digests that are kept for hosts that are behind.
_DIGESTS = 4096
# Seconds within which the connection of a host that died tells so, once a step failed because of it.
_NEWS = 5.0


class _Pending:
    """A command under way; the engine's thread waits on it."""

    def __init__(self, number: int, command: Command) -> None:
        self.number = number
        self.command = command
        self.started: float | None = None
        self._done = threading.Event()
        self._result: Any = None
        self._error: HostError | None = None

    def set(self, result: Any, error: HostError | None = None) -> None:
        if not self._done.is_set():
            self._result, self._error = result, error
            self._done.set()

    def wait(self) -> Any:
        self._done.wait()
        if self._error is not None:
            raise self._error
        return self._result


class HostsExecutor:
    """The executor of host 0.

    Args:
        run: does a command on the devices of this host.
        programs: that there are; the others say which of these they have by number.
        ready: numbers of those that each host has from the start.
        hosts: the other hosts.
        timeout: seconds that a command may take.

    Attributes:
        num_bytes: sent for commands, to each host.
    """

    def __init__(
        self,
        run: Callable[[Command], Any],
        programs: Sequence[Program],
        ready: Sequence[Sequence[int]],
        hosts: HostGroup,
        timeout: float,
    ) -> None:
        self.num_bytes = 0
        self._run = run
        self._programs = programs
        self._ready_everywhere = self._common(ready)
        self._hosts = hosts
        self._timeout = timeout
        self._codec = CommandCodec()
        self._next = 0
        self._under_way: deque[_Pending] = deque()
        self._to_begin: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._to_finish: queue.SimpleQueue[tuple[_Pending, Any] | None] = queue.SimpleQueue()
        self._digest = 0
        self._digests: dict[int, int] = {}
        self._threads = [
            threading.Thread(target=target, name=name, daemon=True)
            for target, name in ((self._begin, "jaxllm-devices"), (self._finish, "jaxllm-results"))
        ]
        for thread in self._threads:
            thread.start()
        hosts.check = self._check
        hosts.started()
        hosts.on_failure(self._give_up)
        # A script that ends without a word ends the others as well.
        atexit.register(self.close)

    def launch(self, command: Command) -> Callable[[], Any]:
        """See `Executor`."""
        frame = self._codec.encode(command)
        self._hosts.broadcast(frame)
        self.num_bytes += len(frame)
        pending = _Pending(self._next, command)
        self._next += 1
        self._under_way.append(pending)
        self._to_begin.put(pending)
        if self._hosts.failure is not None:  # Perhaps before it was among those under way.
            pending.set(None, HostError(self._hosts.failure))
        return pending.wait

    def admits(self, program: Program) -> bool:
        """Whether every host has compiled a program."""
        return program in self._ready_everywhere

    def _common(self, ready: Iterable[Sequence[int]]) -> frozenset[Program]:
        return frozenset(self._programs[number] for number in frozenset.intersection(*map(frozenset, ready)))

    def on_failure(self, callback: Callable[[HostError], None]) -> None:
        """See `HostGroup.on_failure`."""
        self._hosts.on_failure(callback)

    def close(self) -> None:
        """Tells the other hosts to stop, and parts from them."""
        atexit.unregister(self.close)
        if self._hosts.failure is not None:
            return
        self._to_begin.put(None)
        for thread in self._threads:
            while thread.is_alive() and self._hosts.failure is None:
                thread.join(0.1)
        if self._hosts.wait_for_failure(0):
            return
        self._hosts.close()
        leave_hosts()
        self._hosts.let_go()

    def _begin(self) -> None:
        while (pending := self._to_begin.get()) is not None:
            pending.started = time.monotonic()
            try:
                self._to_finish.put((pending, self._run(pending.command)))
            except Exception as error:
                self._failed(pending, error)
                return
        self._to_finish.put(None)

    def _finish(self) -> None:
        while (item := self._to_finish.get()) is not None:
            pending, result = item
            try:
                jax.block_until_ready(result)
                self._digest = zlib.crc32(digest_of(pending.command, result), self._digest)
            except Exception as error:
                self._failed(pending, error)
                return
            self._digests[pending.number] = self._digest
            self._digests.pop(pending.number - _DIGESTS, None)
            self._under_way.popleft()
            pending.set(result)

    def _failed(self, pending: _Pending, error: Exception) -> None:
        """A command did not work here, most likely because another host died of it first."""
        if not self._hosts.wait_for_failure(_NEWS):
            logger.error("command %d failed", pending.number, exc_info=error)
            self._hosts.fail(f"host 0 failed: {type(error).__name__}: {error}")

    def _give_up(self, error: HostError) -> None:
        for pending in list(self._under_way):
            pending.set(None, error)

    def _check(self, now: float) -> str | None:
        """What is wrong with how far the hosts have come; notes what they have compiled."""
        told = [peer.status["ready"] for peer in self._hosts.peers]
        if all(told):  # With the first sign of life after the start.
            self._ready_everywhere = self._common(told)
        for peer in self._hosts.peers:
            done, digest = peer.status["done"], peer.status["digest"]
            if self._digests.get(done, digest) != digest:
                return f"host {peer.host} is out of step: its results up to command {done} are others"
        oldest = next(iter(list(self._under_way)), None)
        if oldest is None or oldest.started is None:
            return None
        age = now - oldest.started
        if age > _LATE:
            late = [str(p.host) for p in self._hosts.peers if p.status["started"] < oldest.number]
            if late:
                return f"host {', '.join(late)} has not begun command {oldest.number} within {age:.0f} s"
        if age > self._timeout:
            return f"command {oldest.number} is not done after {age:.0f} s (distributed_timeout_seconds)"
        return None


def digest_of(command: Command, result: Any) -> bytes:
    """What of a result has to be the same on every host: the tokens that were sampled."""
    samples = isinstance(command, RunStep | SampleLate)
    token_ids = getattr(result, "token_ids", None) if samples else None
    return b"" if token_ids is None else np.asarray(token_ids).tobytes()

"""What the engine does, step by step, as a stream of events for each of those who watch."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from jaxllm.async_engine import AsyncEngine
from jaxllm.errors import EngineDeadError
from jaxllm.scheduling.recording.live_recorder import LiveRecorder, all_runs
from jaxllm.serve.errors import OverloadedError
from jaxllm.serve.streaming import event

if TYPE_CHECKING:
    from jaxllm.engine import Engine

MAX_WATCHERS = 32

_INTERVAL = 0.1  # seconds of events in a message
_SILENCE = 10.0  # seconds after which a comment shows that the connection lives


class LiveFeed:
    """Records an engine while, and only while, somebody watches.

    All watchers read one recorder. It is added, asked for its state and removed on the engine's thread,
    between two steps, so that a watcher's first state and the events after it fit together.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._num_watchers = 0  # of the event loop
        self._recorder: LiveRecorder | None = None  # these two are of the engine's thread
        self._num_recorded = 0

    def watch(self) -> Watcher:
        """A new watcher, which must be closed.

        Raises:
            OverloadedError: there are as many as may be.
        """
        if self._num_watchers >= MAX_WATCHERS:
            raise OverloadedError(f"{MAX_WATCHERS} clients watch the engine already, and no more may.")
        self._num_watchers += 1
        return Watcher(self, self._engine)

    # On the engine's thread

    def _join(self, engine: Engine) -> None:
        if self._recorder is None:
            self._recorder = LiveRecorder(engine.scheduler)
            engine.add_recorder(self._recorder)
        self._num_recorded += 1

    def _snapshot(self, engine: Engine) -> tuple[LiveRecorder, int, dict[str, Any], bytes]:
        assert self._recorder is not None  # Whoever asks has joined, and not left.
        return self._recorder, *self._recorder.snapshot()

    def _leave(self, engine: Engine) -> None:
        self._num_recorded -= 1
        if self._num_recorded == 0 and self._recorder is not None:
            engine.remove_recorder(self._recorder)
            self._recorder = None


class Watcher:
    """One who watches: `events` is a stream of server-sent events.

    The first is {"type": "snapshot", ...} with what `LiveRecorder.snapshot` says, and those after it are
    {"type": "events", "events": [...]} with `LiveRecorder`'s events. A watcher who is too slow for them
    gets a new snapshot. The last one is {"type": "stopped"}, where the engine has.
    """

    def __init__(self, feed: LiveFeed, engine: AsyncEngine) -> None:
        self._feed = feed
        self._engine = engine
        self._closed = asyncio.Event()
        self._joined = False

    def close(self) -> None:
        """Stop watching."""
        if self._closed.is_set():
            return
        self._closed.set()
        self._feed._num_watchers -= 1
        if self._joined:
            self._engine.tell(self._feed._leave)

    async def events(self) -> AsyncIterator[bytes]:
        """Bodies of one or more whole events each."""
        # Not a call, which could be cancelled: each who joined leaves.
        self._joined = True
        self._engine.tell(self._feed._join)
        try:
            recorder, count, state, pages = await self._engine.call(self._feed._snapshot)
            yield _message("snapshot", **state, pages=all_runs(pages))
            heard = time.monotonic()
            while not await self._pause():
                if self._engine.is_dead or self._engine.is_draining:
                    break
                found = recorder.since(count)
                now = time.monotonic()
                if found is None:
                    recorder, count, state, pages = await self._engine.call(self._feed._snapshot)
                    yield _message("snapshot", **state, pages=all_runs(pages))
                elif found:
                    count += len(found)
                    yield _message("events", events=found)
                elif now - heard < _SILENCE:
                    continue
                else:
                    yield b": nothing happens\n\n"
                heard = now
        except EngineDeadError:
            pass
        if not self._closed.is_set():
            yield _message("stopped")

    async def _pause(self) -> bool:
        """Wait until there may be something new; whether the watcher was closed meanwhile."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._closed.wait(), _INTERVAL)
        return self._closed.is_set()


def _message(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields})

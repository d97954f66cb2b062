"""What an engine tells those who keep a record of it, and the record of its traffic."""

from __future__ import annotations

from collections.abc import Sequence

from jaxllm.request import Request, RequestStatus
from jaxllm.scheduling.plan import Plan, RequestUpdate
from jaxllm.scheduling.recording.blocks import BlockHasher, HashedRequest
from jaxllm.scheduling.recording.lines import LineWriter, json_line


class Recorder:
    """What an engine tells; derive from it and listen to what matters.

    All times are seconds of `time.monotonic()`. Everything is told from one thread.
    """

    def arrived(self, request: Request) -> None:
        """A request was taken in."""

    def planned(self, plan: Plan, shape: Sequence[int], now: float) -> None:
        """A plan was launched in a compiled shape: tokens, sequences, (pages,) whether it only decodes."""

    def applied(self, plan: Plan, updates: Sequence[RequestUpdate], now: float) -> None:
        """A step's result was taken in; requests that it ended are among the updates."""

    def ended(self, request: Request, now: float) -> None:
        """A request was ended from outside: a stop string, an abort."""

    def forgotten(self, now: float) -> None:
        """The prefix cache was emptied."""

    def close(self) -> None:
        """The engine stops, or this recorder was removed."""


class TraceRecorder(Recorder):
    """Writes every request that ended as a line of a trace, which `read_trace` reads.

    Args:
        path: of the file.
        block_size: tokens of a KV page.
        start: the time from which arrivals are counted.
    """

    def __init__(self, path: str, block_size: int, start: float) -> None:
        self._lines = LineWriter(path)
        self._hasher = BlockHasher(block_size)
        self._start = start

    def applied(self, plan: Plan, updates: Sequence[RequestUpdate], now: float) -> None:
        """See `Recorder`."""
        for update in updates:
            status = update.request.status
            # Nearly all run, which takes no time to see.
            if status is not RequestStatus.RUNNING and status.is_finished:
                self.ended(update.request, now)

    def ended(self, request: Request, now: float) -> None:
        """See `Recorder`."""
        hashed = HashedRequest(
            request.arrival_time - self._start,
            request.num_prompt_tokens,
            len(request.token_ids) - request.num_prompt_tokens,
            self._hasher.block_size,
            self._hasher.names(request),
            request.terms,
        )
        self._lines.write(json_line(hashed.row()))

    def close(self) -> None:
        """See `Recorder`."""
        self._lines.close()

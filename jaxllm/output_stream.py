"""The outputs of one request as they come, for a consumer on an event loop."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace

from jaxllm.outputs import CompletionOutput, RequestOutput
from jaxllm.sampling_params import RequestOutputKind


class OutputStream:
    """The outputs of one request, in order; iterate over it on the event loop that made it.

    A consumer that is slower than the engine gets fewer and larger outputs: what piled up is merged,
    and nothing that a DELTA output brought is lost. The iteration ends after the finished output, or
    with the exception that ended the request.

    Args:
        abort: tells the engine to end the request.
        when_ended: called once, whatever ends it.

    Attributes:
        loop: the event loop, on which alone the methods may be called.
    """

    def __init__(
        self,
        request_id: str,
        output_kind: RequestOutputKind,
        abort: Callable[[], None],
        when_ended: Callable[[], None],
    ) -> None:
        self.request_id = request_id
        self.loop = asyncio.get_running_loop()
        self._abort = abort
        self._when_ended = when_ended
        self._output_kind = output_kind
        self._pending: list[RequestOutput] = []
        self._error: BaseException | None = None
        self._ended = False
        self._waiter: asyncio.Future[None] | None = None

    def __aiter__(self) -> OutputStream:
        return self

    async def __anext__(self) -> RequestOutput:
        while not self._pending:
            if self._error is not None:
                raise self._error
            if self._ended:
                raise StopAsyncIteration
            self._waiter = self.loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        pending, self._pending = self._pending, []
        return pending[0] if len(pending) == 1 else merge_outputs(pending, self._output_kind)

    def close(self) -> None:
        """Abort the request unless it has ended, and end the iteration; for consumers that stop listening."""
        if not self._ended:
            self.end()
            self._abort()

    def put(self, output: RequestOutput) -> None:
        """Take in the next output."""
        if not self._ended:
            self._pending.append(output)
            if output.finished:
                self.end()
            else:
                self._wake()

    def fail(self, error: BaseException) -> None:
        """End the iteration with an exception."""
        if not self._ended:
            self._error = error
            self.end()

    def end(self) -> None:
        """End the iteration after what is there."""
        if not self._ended:
            self._ended = True
            self._when_ended()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def merge_outputs(outputs: list[RequestOutput], kind: RequestOutputKind) -> RequestOutput:
    """One output that says what several in a row said.

    Deltas are concatenated per completion; of cumulative outputs the last of each completion stays.
    """
    last = outputs[-1]
    by_index: dict[int, list[CompletionOutput]] = {}
    for completion in itertools.chain.from_iterable(output.outputs for output in outputs):
        by_index.setdefault(completion.index, []).append(completion)
    if kind is RequestOutputKind.DELTA:
        completions = [_concatenate(parts) for parts in by_index.values()]
    else:
        completions = [parts[-1] for parts in by_index.values()]
    prompt_logprobs = next((o.prompt_logprobs for o in outputs if o.prompt_logprobs is not None), None)
    return replace(last, outputs=completions, prompt_logprobs=prompt_logprobs)


def _concatenate(parts: list[CompletionOutput]) -> CompletionOutput:
    if len(parts) == 1:
        return parts[0]
    logprobs = None
    if any(part.logprobs is not None for part in parts):
        logprobs = [position for part in parts for position in part.logprobs or ()]
    return replace(
        parts[-1],
        text="".join(part.text for part in parts),
        token_ids=[token_id for part in parts for token_id in part.token_ids],
        logprobs=logprobs,
    )

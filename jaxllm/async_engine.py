"""The engine on a thread of its own, its outputs as asynchronous streams.

The engine's thread owns the engine and the table of streams; everything else reaches it through one
inbox of commands. Outputs travel back with one wake-up of the event loop per step, however many
requests advanced in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from jaxllm.errors import EngineDeadError, JaxLLMError
from jaxllm.input_threads import InputThreads
from jaxllm.output_stream import OutputStream
from jaxllm.outputs import RequestOutput
from jaxllm.request import NO_TERMS, Request, SchedulingTerms
from jaxllm.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from jaxllm.engine import Engine
    from jaxllm.input_processor import ProcessedInput
    from jaxllm.stats import EngineStats

logger = logging.getLogger(__name__)

T = TypeVar("T")


def _ignore(error: BaseException) -> None:
    pass


class _Command(NamedTuple):
    """Something for the engine's thread to do, and whom to tell when it cannot be done."""

    run: Callable[[], None]
    fail: Callable[[BaseException], object] = _ignore


class AsyncEngine:
    """Serves many asynchronous consumers from one synchronous `Engine`.

    Args:
        engine: from now on touched by this object's thread only.

    A failure inside `Engine.step` ends every request with `EngineDeadError`, and the engine with it:
    `is_dead` is true and `error` says why.

    Attributes:
        num_unfinished: sequences submitted whose streams have not ended.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: queue.SimpleQueue[_Command | None] = queue.SimpleQueue()
        self._gate = threading.Lock()
        self._refusal: str | None = None  # why no more commands are taken; guarded by _gate
        self._draining = False
        self.num_unfinished = 0
        self._unfinished: dict[OutputStream, list[Request]] = {}  # guarded by _gate
        self._error: BaseException | None = None
        self._streams: dict[str, OutputStream] = {}  # of the engine's thread alone
        self._input_threads = InputThreads()
        self._thread = threading.Thread(target=self._run, name="jaxllm-engine", daemon=True)
        self._thread.start()

    # -- what consumers call, on an event loop ------------------------------------------------------

    async def generate(
        self,
        prompt: Any,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        terms: SchedulingTerms = NO_TERMS,
        cache_salt: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Yield the outputs of one request; leaving the iteration early aborts it.

        Args:
            prompt: text, token ids, `TextPrompt` or `TokensPrompt`.
            request_id: unique among unfinished requests.
            terms: how the request wants to be scheduled.
            cache_salt: shares cached prefixes only with requests of the same salt.

        Raises:
            InvalidRequestError: the request cannot be served as it stands.
            EngineDeadError: the engine stopped, before or meanwhile.
        """
        processed = await self.process(
            request_id, prompt, sampling_params, terms=terms, cache_salt=cache_salt
        )
        stream = self.submit(request_id, processed, sampling_params.output_kind)
        try:
            async for output in stream:
                yield output
        finally:
            stream.close()

    async def process(
        self,
        request_id: str,
        prompt: Any,
        sampling_params: SamplingParams,
        *,
        terms: SchedulingTerms = NO_TERMS,
        cache_salt: str | None = None,
    ) -> ProcessedInput:
        """Tokenize and validate a prompt, off the event loop, without submitting it."""
        arrival_time = time.monotonic()
        await self.compile_grammar(sampling_params)
        return await self.run_in_thread(
            self.engine.input_processor.process,
            request_id,
            prompt,
            sampling_params,
            terms=terms,
            arrival_time=arrival_time,
            cache_salt=cache_salt,
            num_characters=len(prompt) if isinstance(prompt, str) else 0,
        )

    async def compile_grammar(self, sampling_params: SamplingParams) -> None:
        """Wait until the grammar of a constraint is compiled, on threads that compile and do nothing else.

        Raises:
            InvalidRequestError: it takes too long.
        """
        if sampling_params.structured_outputs is not None:
            await self.engine.input_processor.grammars.wait(sampling_params.structured_outputs)

    def submit(
        self, request_id: str, processed: ProcessedInput, output_kind: RequestOutputKind
    ) -> OutputStream:
        """Hand processed input to the engine; whoever stops reading the stream early must close it."""
        stream = OutputStream(
            request_id,
            output_kind,
            abort=lambda: self.abort([request_id]),
            when_ended=lambda: self._forget(stream),
        )

        def run() -> None:
            self.engine.submit(processed.requests, processed.prompt)
            self._streams[request_id] = stream

        self._send(_Command(run, functools.partial(self._fail_stream, stream)))
        with self._gate:
            self._unfinished[stream] = processed.requests
            self.num_unfinished += len(processed.requests)
        return stream

    async def run_in_thread(
        self, function: Callable[..., T], *args: Any, num_characters: int = 0, **kwargs: Any
    ) -> T:
        """Run tokenizer work (chat templates, encoding, validation) of some characters off the event loop."""
        self._raise_if_refusing()
        return await self._input_threads.run(functools.partial(function, *args, **kwargs), num_characters)

    async def call(self, function: Callable[[Engine], T]) -> T:
        """Run something on the engine's thread between two steps, such as `reset_prefix_cache`."""
        future: Future[T] = Future()

        def run() -> None:
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(self.engine))
                except Exception as error:
                    future.set_exception(error)

        self._send(_Command(run, future.set_exception), new_work=False)
        return await asyncio.wrap_future(future)

    def tell(self, function: Callable[[Engine], object]) -> None:
        """The same without waiting; nothing happens where the engine has ended. It must not raise."""

        def run() -> None:
            function(self.engine)

        with contextlib.suppress(EngineDeadError):
            self._send(_Command(run), new_work=False)

    # -- what any thread may call -------------------------------------------------------------------

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests with finish reason "abort"; unknown and finished ids are ignored."""
        ids = list(request_ids)
        with contextlib.suppress(EngineDeadError):  # The end of the engine ended every request.
            self._send(_Command(lambda: self._abort(ids)), new_work=False)

    def fail(self, error: EngineDeadError) -> None:
        """End the engine with an error of which it learns nothing by itself while it has nothing to do."""

        def run() -> None:
            raise error

        with contextlib.suppress(EngineDeadError):  # It has ended already.
            self._send(_Command(run), new_work=False)

    def stats(self) -> EngineStats:
        """What the engine counted so far; read it, do not change it."""
        return self.engine.stats()

    def num_queued_tokens(self) -> int:
        """Tokens of the prompts of those sequences, unfinished, that have got no token yet."""
        with self._gate:
            requests = [request for group in self._unfinished.values() for request in group]
        return sum(r.num_prompt_tokens for r in requests if r.first_token_time is None)

    @property
    def is_dead(self) -> bool:
        """Whether the engine failed."""
        return self._error is not None

    @property
    def error(self) -> BaseException | None:
        """What the engine failed with."""
        return self._error

    @property
    def is_draining(self) -> bool:
        """Whether new requests are refused because the engine is about to stop."""
        return self._draining

    def start_draining(self) -> None:
        """Refuse new requests from now on; those that run go on."""
        self._draining = True

    async def shutdown(self, *, drain: bool = True, timeout: float | None = None) -> bool:
        """Stop the engine and its thread.

        Args:
            drain: let running requests finish first.
            timeout: seconds to wait for them; None is as long as it takes. The rest is aborted.

        Returns:
            Whether every request had finished, so that none was aborted.
        """
        self.start_draining()
        finished = await self.wait_until_idle(timeout if drain else 0.0)
        # Joining waits for the step that runs now, which may take seconds for a long prompt.
        await asyncio.get_running_loop().run_in_executor(None, self.stop)
        return finished

    async def wait_until_idle(self, timeout: float | None = None) -> bool:
        """Wait until no request is unfinished; False when `timeout` seconds passed first."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while self._thread.is_alive():
            try:
                busy = await self.call(lambda engine: engine.has_unfinished_requests())
            except EngineDeadError:
                break
            if not busy:
                return True
            if deadline is not None and time.monotonic() >= deadline:
                return False
            await asyncio.sleep(0.02)
        return True

    def stop(self, timeout: float | None = None) -> None:
        """Abort what runs and end the thread.

        Returns when it has ended, or after `timeout` seconds; then it ends after the step that it is in.
        """
        self._draining = True
        with self._gate:
            if self._refusal is None:
                self._refusal = "the engine has been shut down"
                self._inbox.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        self._input_threads.close()

    def _forget(self, stream: OutputStream) -> None:
        with self._gate:
            self.num_unfinished -= len(self._unfinished.pop(stream))

    # -- commands -----------------------------------------------------------------------------------

    def _send(self, command: _Command, *, new_work: bool = True) -> None:
        with self._gate:
            if new_work:
                self._raise_if_refusing()
            elif self._refusal is not None:
                raise EngineDeadError(self._refusal)
            self._inbox.put(command)

    def _raise_if_refusing(self) -> None:
        if self._refusal is not None:
            raise EngineDeadError(self._refusal)
        if self._draining:
            raise EngineDeadError("the engine is shutting down and takes no new requests")

    def _abort(self, request_ids: list[str]) -> None:
        known = [request_id for request_id in request_ids if request_id in self._streams]
        if known:
            self._publish(self.engine.abort(known))
            for request_id in known:
                stream = self._streams.pop(request_id, None)
                if stream is not None:
                    self._post(stream.loop, stream.end)

    # -- the engine's thread ------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_commands():
                outputs = self.engine.step()
                if outputs:
                    self._publish(outputs)
            self._abort(list(self._streams))
        except BaseException as error:
            self._die(error)
        finally:
            self.engine.shutdown()

    def _take_commands(self) -> bool:
        """Run what is in the inbox, waiting for something while idle; False when told to stop."""
        while True:
            try:
                command = self._inbox.get(block=not self.engine.has_unfinished_requests())
            except queue.Empty:
                return True
            if command is None:
                return False
            try:
                command.run()
            except EngineDeadError as error:
                command.fail(error)
                raise
            except JaxLLMError as error:
                command.fail(error)
            except BaseException as error:
                command.fail(error)
                raise

    def _publish(self, outputs: list[RequestOutput]) -> None:
        """Pass outputs to the streams that wait for them, with one wake-up per event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[OutputStream, RequestOutput]]] = {}
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if output.finished:
                del self._streams[output.request_id]
            by_loop.setdefault(stream.loop, []).append((stream, output))
        for loop, deliveries in by_loop.items():
            if not self._post(loop, _deliver, deliveries):
                orphans = [s.request_id for s, output in deliveries if not output.finished]
                self.engine.abort(orphans)
                for request_id in orphans:
                    self._streams.pop(request_id, None)

    def _post(self, loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: Any) -> bool:
        """Call something on an event loop; False where the loop is gone, and its consumers with it."""
        try:
            loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:
            return False
        return True

    def _die(self, error: BaseException) -> None:
        logger.critical("The engine failed and takes no more requests.", exc_info=error)
        reason = f"the engine stopped after an error: {type(error).__name__}: {error}"
        with self._gate:
            self._error = error
            self._refusal = reason
        # Nothing enters the inbox any more.
        dead = EngineDeadError(reason)
        dead.__cause__ = error
        while True:
            try:
                command = self._inbox.get_nowait()
            except queue.Empty:
                break
            if command is not None:
                command.fail(dead)
        for stream in self._streams.values():
            self._fail_stream(stream, dead)
        self._streams.clear()

    def _fail_stream(self, stream: OutputStream, error: BaseException) -> None:
        self._post(stream.loop, stream.fail, error)


def _deliver(deliveries: list[tuple[OutputStream, RequestOutput]]) -> None:
    for stream, output in deliveries:
        stream.put(output)

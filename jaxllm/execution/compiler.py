"""Compiled steps: the covering shapes before the first request, the others behind its back."""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tqdm import tqdm

from jaxllm.errors import RecompilationError
from jaxllm.execution.batch import StepShape
from jaxllm.execution.buckets import choose, num_covering

logger = logging.getLogger(__name__)


class StepCompiler:
    """The steps that are ready to run, and the threads that make more of them.

    Args:
        compile_step: makes the executable of a shape.
        shapes: every shape there will be, the covering ones first.
        complete: compile all of them before `wait` returns, and none after.

    Attributes:
        shapes: every shape, compiled or not yet.
        admits: whether a shape that is ready here may be chosen; other hosts may not have it yet.
    """

    admits: Callable[[StepShape], bool] | None = None

    def __init__(
        self, compile_step: Callable[[StepShape], Any], shapes: Sequence[StepShape], *, complete: bool
    ) -> None:
        self._compile_step = compile_step
        self._ready: dict[StepShape, Any] = {}
        self.shapes = list(shapes)
        self._closed = threading.Event()
        self._started = time.monotonic()
        self._num_foreground = len(self.shapes) if complete else num_covering(self.shapes)
        pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="jaxllm-compile")
        self._foreground = [pool.submit(self._compile, s) for s in self.shapes[: self._num_foreground]]
        pool.shutdown(wait=False)
        self._background: threading.Thread | None = None
        self._background_error: BaseException | None = None

    def _compile(self, shape: StepShape) -> None:
        if not self._closed.is_set():
            self._ready[shape] = self._compile_step(shape)

    def wait(self, progress: bool) -> None:
        """Returns once every plan can run; the remaining shapes go on in the background."""
        for future in tqdm(self._foreground, desc="Compiling", unit="step", disable=not progress):
            future.result()
        logger.info("compiled %d steps in %.1f s", len(self._foreground), time.monotonic() - self._started)
        rest = self.shapes[self._num_foreground :]
        if rest:
            logger.info("compiling %d more in the background; each is used as soon as it is ready", len(rest))
            self._background = threading.Thread(
                target=_compile_rest, args=[weakref.ref(self), self._closed, rest], name="jaxllm-compile"
            )
            self._background.start()

    def _compile_in_background(self, shape: StepShape) -> None:
        try:
            self._compile(shape)
        except Exception as error:
            # Larger shapes that are ready take its plans; they only cost more.
            logger.warning("compiling %s failed, larger steps take its place: %s", shape, error)
            self._background_error = error

    def wait_for_all(self) -> None:
        """Returns once every shape is compiled; raises what went wrong with one."""
        for future in self._foreground:
            future.result()
        if self._background is not None:
            self._background.join()
        if self._background_error is not None:
            raise self._background_error

    @property
    def num_ready(self) -> int:
        """Shapes that are compiled."""
        return len(self._ready)

    def ready_numbers(self) -> list[int]:
        """Which of `shapes` are compiled."""
        return [number for number, shape in enumerate(self.shapes) if shape in self._ready]

    def choose(self, num_tokens: int, num_seqs: int, decode_only: bool) -> StepShape:
        """The cheapest ready shape that a plan fits into.

        Raises:
            RecompilationError: there is none, although every shape was to be compiled ahead.
        """
        ready = list(self._ready)
        if self.admits is not None:
            ready = [shape for shape in ready if self.admits(shape)]
        shape = choose(ready, num_tokens, num_seqs, decode_only)
        if shape is None:
            raise RecompilationError(
                f"no compiled step takes {num_tokens} tokens of {num_seqs} sequences; the scheduler must "
                f"keep within max_num_batched_tokens and max_num_seqs; the largest is {self.shapes[0]}."
            )
        return shape

    def executable(self, shape: StepShape) -> Any:
        """The step of a shape that is ready."""
        return self._ready[shape]

    def close(self) -> None:
        """Starts no further compilation, and waits for those under way."""
        self._closed.set()
        for future in self._foreground:
            future.cancel()
        if self._background is not None:
            self._background.join()


# Of all engines of a process one compiles behind its back at a time: together they would only take the
# cores from one another, and from those who serve.
_background_turn = threading.Lock()


def _compile_rest(
    owner: weakref.ref[StepCompiler], closed: threading.Event, shapes: Sequence[StepShape]
) -> None:
    """Compiles shapes one after the other for as long as anybody has the compiler, and it is not closed."""
    for shape in shapes:
        while not _background_turn.acquire(timeout=0.1):
            if closed.is_set() or owner() is None:
                return
        try:
            compiler = owner()
            # A program that ends must not wait for what it will never run.
            if compiler is None or closed.is_set() or not threading.main_thread().is_alive():
                return
            compiler._compile_in_background(shape)
            del compiler
        finally:
            _background_turn.release()

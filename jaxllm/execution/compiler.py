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
from jaxllm.execution.batch import Program, StepShape
from jaxllm.execution.buckets import choose, num_covering, with_late_shapes

logger = logging.getLogger(__name__)


class StepCompiler:
    """The steps that are ready to run, and the threads that make more of them.

    Args:
        compile_step: makes the executable of a shape.
        shapes: every shape there will be, the covering ones first.
        complete: compile all of them before `wait` returns, and none after.
        late: compile what samples late after them, too.

    Attributes:
        shapes: every shape, compiled or not yet.
        programs: the same, with what samples late.
        admits: whether a program that is ready here may be chosen; other hosts may not have it yet.
    """

    admits: Callable[[Program], bool] | None = None

    def __init__(
        self,
        compile_step: Callable[[Program], Any],
        shapes: Sequence[StepShape],
        *,
        complete: bool,
        late: bool = False,
    ) -> None:
        self._compile_step = compile_step
        self._ready: dict[Program, Any] = {}
        self.shapes = list(shapes)
        self.programs: list[Program] = list(shapes)
        num_first = num_covering(self.shapes)
        if late:
            self.programs, num_first = with_late_shapes(shapes)
        self._closed = threading.Event()
        self._started = time.monotonic()
        self._num_foreground = len(self.programs) if complete else num_first
        pool = ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="jaxllm-compile")
        self._foreground = [pool.submit(self._compile, p) for p in self.programs[: self._num_foreground]]
        pool.shutdown(wait=False)
        self._background: threading.Thread | None = None
        self._background_error: BaseException | None = None

    def _compile(self, program: Program) -> None:
        if not self._closed.is_set():
            self._ready[program] = self._compile_step(program)

    def wait(self, progress: bool) -> None:
        """Returns once every plan can run; the remaining shapes go on in the background."""
        for future in tqdm(self._foreground, desc="Compiling", unit="step", disable=not progress):
            future.result()
        logger.info("compiled %d steps in %.1f s", len(self._foreground), time.monotonic() - self._started)
        rest = self.programs[self._num_foreground :]
        if rest:
            logger.info("compiling %d more in the background; each is used as soon as it is ready", len(rest))
            self._background = threading.Thread(
                target=_compile_rest, args=[weakref.ref(self), self._closed, rest], name="jaxllm-compile"
            )
            self._background.start()

    def _compile_in_background(self, program: Program) -> None:
        try:
            self._compile(program)
        except Exception as error:
            # Larger shapes that are ready take its plans; they only cost more.
            logger.warning("compiling %s failed, larger steps take its place: %s", program, error)
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
        """Programs that are compiled."""
        return len(self._ready)

    def ready_numbers(self) -> list[int]:
        """Which of `programs` are compiled."""
        return [number for number, program in enumerate(self.programs) if program in self._ready]

    def choose(self, num_tokens: int, num_seqs: int, decode_only: bool, *, late: bool = False) -> StepShape:
        """The cheapest ready shape that a plan fits into.

        Args:
            late: some sequence of it is sampled late.

        Raises:
            RecompilationError: there is none, although every shape was to be compiled ahead.
        """
        ready = list(self._ready)
        if self.admits is not None:
            ready = [program for program in ready if self.admits(program)]
        shape = choose(ready, num_tokens, num_seqs, decode_only, late=late)
        if shape is None:
            raise RecompilationError(
                f"no compiled step takes {num_tokens} tokens of {num_seqs} sequences; the scheduler must "
                f"keep within max_num_batched_tokens and max_num_seqs; the largest is {self.shapes[0]}."
            )
        return shape

    def executable(self, program: Program) -> Any:
        """A program that is ready."""
        return self._ready[program]

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
    owner: weakref.ref[StepCompiler], closed: threading.Event, programs: Sequence[Program]
) -> None:
    """Compiles one after the other for as long as anybody has the compiler, and it is not closed."""
    for program in programs:
        while not _background_turn.acquire(timeout=0.1):
            if closed.is_set() or owner() is None:
                return
        try:
            compiler = owner()
            # A program that ends must not wait for what it will never run.
            if compiler is None or closed.is_set() or not threading.main_thread().is_alive():
                return
            compiler._compile_in_background(program)
            del compiler
        finally:
            _background_turn.release()

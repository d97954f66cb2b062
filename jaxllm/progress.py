"""Progress bars, and Ctrl-C at a moment when nothing breaks."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from tqdm.auto import tqdm

from jaxllm.outputs import RequestOutput
from jaxllm.pooling_outputs import PoolingRequestOutput


class SpeedDisplay:
    """Shows prompts done and tokens per second on a progress bar."""

    def __init__(self, bar: tqdm[Any]) -> None:
        self._bar = bar
        self._start = time.monotonic()
        self._num_input_tokens = 0
        self._num_output_tokens = 0

    def add(self, output: RequestOutput | PoolingRequestOutput[Any]) -> None:
        """Count a request that ended."""
        completions = output.outputs if isinstance(output, RequestOutput) else ()
        self._num_input_tokens += len(output.prompt_token_ids)
        self._num_output_tokens += sum(len(completion.token_ids) for completion in completions)
        elapsed = max(time.monotonic() - self._start, 1e-9)
        self._bar.set_postfix_str(
            f"est. speed input: {self._num_input_tokens / elapsed:.2f} toks/s, "
            f"output: {self._num_output_tokens / elapsed:.2f} toks/s",
            refresh=False,
        )
        self._bar.update(1)


@contextlib.contextmanager
def progress_bar(
    use_tqdm: bool | Callable[..., Any], description: str, total: int, unit: str
) -> Iterator[tqdm[Any]]:
    """A bar, closed again at the end, drawn by `tqdm` or what is given in its place; False draws none."""
    make = use_tqdm if callable(use_tqdm) else tqdm
    bar = make(total=total, desc=description, unit=unit, dynamic_ncols=True, disable=not use_tqdm)
    try:
        yield bar
    finally:
        bar.close()


@contextlib.contextmanager
def interrupt_between_steps() -> Iterator[Callable[[], None]]:
    """Hold Ctrl-C back until the function that this yields is called; a second one comes through at once.

    A step that is cut short would leave the scheduler and the device at odds.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield lambda: None
        return
    interrupted = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            signal.default_int_handler(number, frame)
        interrupted.set()

    def check() -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    check()

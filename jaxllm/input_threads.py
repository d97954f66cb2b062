"""The threads that tokenize: long inputs have one of their own, so that short ones never wait for them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

LONG_INPUT = 200_000
"""Characters from which on an input is long: tokenizing them takes a tenth of a second."""


class InputThreads:
    """Tokenizers release the interpreter lock, so that a prompt delays nobody else on another thread.

    Inputs of one kind are served in the order in which they come; how many of the long ones come at once
    matters to nobody who sends a short one.
    """

    def __init__(self) -> None:
        self._short = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="jaxllm-input")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="jaxllm-long-input")

    async def run(self, call: Callable[[], T], num_characters: int) -> T:
        """Calls on one of the threads; the event loop goes on meanwhile."""
        threads = self._long if num_characters >= LONG_INPUT else self._short
        return await asyncio.get_running_loop().run_in_executor(threads, call)

    def close(self) -> None:
        """Lets the threads go, and drops what has not begun."""
        for threads in (self._short, self._long):
            threads.shutdown(wait=False, cancel_futures=True)

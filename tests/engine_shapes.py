"""Which of its step shapes an engine compiles in a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from jaxllm.execution import runner
from jaxllm.execution.batch import StepShape
from jaxllm.execution.buckets import step_shapes


@contextmanager
def largest_shapes() -> Iterator[None]:
    """The largest of mixed steps and of decodes, which take every plan: so for all tests, by `conftest.py`.

    The others only make steps cheaper, and compiling them takes longer than any test could save by them.
    """
    with _chosen(lambda shapes: shapes[:2]):
        yield


@contextmanager
def every_shape() -> Iterator[None]:
    """All of them, as users have it: for tests of what each computes, and of which one is chosen."""
    with _chosen(lambda shapes: shapes):
        yield


@contextmanager
def _chosen(choose: Callable[[list[StepShape]], list[StepShape]]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "step_shapes", lambda *sizes: choose(step_shapes(*sizes)))
        yield

"""Which of its step shapes an engine compiles in a test, and when."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from jaxllm.execution import runner
from jaxllm.execution.batch import Program, StepShape
from jaxllm.execution.buckets import step_shapes

_compile = runner.Runner._compile


@contextmanager
def largest_shapes() -> Iterator[None]:
    """The largest of mixed steps and of decodes, which take every plan: so for all tests, by `conftest.py`.

    The others only make steps cheaper, and compiling them takes longer than any test could save by them.
    These, too, are compiled when they first run, since many tests have no use for one of them.
    """
    with _patched(lambda shapes: shapes[:2], _when_it_runs):
        yield


@contextmanager
def every_shape() -> Iterator[None]:
    """All of them, and ahead, as users have it: for tests of what each computes, and of which is chosen."""
    with _patched(lambda shapes: shapes, _compile):
        yield


@contextmanager
def _patched(
    choose: Callable[[list[StepShape]], list[StepShape]], compile_program: Callable[..., Any]
) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "step_shapes", lambda *sizes: choose(step_shapes(*sizes)))
        patch.setattr(runner.Runner, "_compile", compile_program)
        yield


def _when_it_runs(owner: runner.Runner, program: Program) -> Callable[..., Any]:
    executable = functools.cache(lambda: _compile(owner, program))
    return lambda *arguments: executable()(*arguments)

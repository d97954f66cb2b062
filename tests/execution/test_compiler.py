"""Covering shapes are compiled before the first plan, the others behind it, and failures are told."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable

import pytest

from jaxllm.errors import RecompilationError
from jaxllm.execution.batch import StepShape
from jaxllm.execution.buckets import num_covering, step_shapes
from jaxllm.execution.compiler import StepCompiler

SHAPES = step_shapes(8, 64, 1)


class Compile:
    """Names instead of executables; shapes that do not cover wait for `go_on`."""

    def __init__(self, shapes: list[StepShape] = SHAPES) -> None:
        self.covering = shapes[: num_covering(shapes)]
        self.go_on = threading.Event()
        self.compiled: list[StepShape] = []
        self.fails: Callable[[StepShape], bool] = lambda shape: False

    def __call__(self, shape: StepShape) -> str:
        if shape not in self.covering:
            assert self.go_on.wait(30)
        if self.fails(shape):
            raise ValueError(f"no {shape}")
        self.compiled.append(shape)
        return str(shape)


def test_serves_with_the_covering_shapes_and_switches_to_cheaper_ones() -> None:
    compile_step = Compile()
    compiler = StepCompiler(compile_step, SHAPES, complete=False)
    compiler.wait(progress=False)
    assert compiler.num_ready == num_covering(SHAPES) < len(SHAPES)
    shape = compiler.choose(3, 3, True)
    assert shape == StepShape(8, 8, 1, True) and compiler.executable(shape) == str(shape)
    compile_step.go_on.set()
    compiler.wait_for_all()
    assert compiler.num_ready == len(SHAPES)
    assert compiler.choose(3, 3, True) == StepShape(4, 4, 1, True)
    compiler.close()


def test_complete_compiles_all_before_it_returns() -> None:
    compile_step = Compile()
    compile_step.go_on.set()
    compiler = StepCompiler(compile_step, SHAPES, complete=True)
    compiler.wait(progress=False)
    assert set(compile_step.compiled) == set(SHAPES) and compiler.num_ready == len(SHAPES)
    compiler.close()


def test_a_plan_beyond_every_shape_is_refused() -> None:
    compile_step = Compile()
    compile_step.go_on.set()
    compiler = StepCompiler(compile_step, SHAPES, complete=True)
    compiler.wait(progress=False)
    with pytest.raises(RecompilationError, match=r"no compiled step takes 65 tokens of 2 sequences"):
        compiler.choose(65, 2, False)
    compiler.close()


def test_a_covering_shape_that_fails_stops_the_start() -> None:
    compile_step = Compile()
    compile_step.fails = lambda shape: shape == SHAPES[0]
    compiler = StepCompiler(compile_step, SHAPES, complete=False)
    with pytest.raises(ValueError, match="no StepShape"):
        compiler.wait(progress=False)
    compiler.close()


def test_another_shape_that_fails_is_told_and_done_without(caplog: pytest.LogCaptureFixture) -> None:
    compile_step = Compile()
    bad = StepShape(4, 4, 1, True)
    compile_step.fails = lambda shape: shape == bad
    compile_step.go_on.set()
    compiler = StepCompiler(compile_step, SHAPES, complete=False)
    compiler.wait(progress=False)
    with pytest.raises(ValueError, match="no StepShape"):
        compiler.wait_for_all()
    assert compiler.choose(3, 3, True) == StepShape(8, 8, 1, True)
    assert compiler.num_ready == len(SHAPES) - 1
    assert "larger steps take its place" in caplog.text
    compiler.close()


def test_close_starts_nothing_further() -> None:
    compile_step = Compile()
    compiler = StepCompiler(compile_step, SHAPES, complete=False)
    compiler.wait(progress=False)
    closing = threading.Thread(target=compiler.close)
    closing.start()
    while not compiler._closed.is_set():
        pass
    compile_step.go_on.set()
    closing.join(30)
    assert not closing.is_alive()
    assert compiler.num_ready <= num_covering(SHAPES) + 1  # the one that was under way


def background_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "jaxllm-compile"]


def test_a_compiler_that_nobody_has_any_more_stops() -> None:
    compile_step, others = Compile(), background_threads()
    compiler = StepCompiler(compile_step, SHAPES, complete=False)
    compiler.wait(progress=False)
    [thread] = [thread for thread in background_threads() if thread not in others]
    del compiler
    gc.collect()
    compile_step.go_on.set()
    thread.join(30)
    assert not thread.is_alive()
    # The one under way is finished, and no other is begun.
    assert len(compile_step.compiled) <= num_covering(SHAPES) + 1


def test_compilers_take_turns_behind_the_back() -> None:
    steps = [Compile(), Compile()]
    compilers = [StepCompiler(step, SHAPES, complete=False) for step in steps]
    running, most = [], []

    def watched(step: Compile) -> Callable[[StepShape], str]:
        def compile_one(shape: StepShape) -> str:
            running.append(shape)
            most.append(len(running))
            try:
                return step(shape)
            finally:
                running.pop()

        return compile_one

    for compiler, step in zip(compilers, steps, strict=True):
        step.go_on.set()
        for future in compiler._foreground:
            future.result()
        compiler._compile_step = watched(step)
    for compiler in compilers:
        compiler.wait(progress=False)
    for compiler in compilers:
        compiler.wait_for_all()
        assert compiler.num_ready == len(SHAPES)
        compiler.close()
    assert max(most) == 1

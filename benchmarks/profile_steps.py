"""Times steps of the engine in every compiled shape, and fits the simulator's cost model to them.

    python -m benchmarks.profile_steps --shape llama-135m --out cost.json
    python -m jaxllm.simulate --cost cost.json --num-gpu-blocks 4000 --model MODEL ...

The time of a step is that from the end of the one before it, or from its own launch where that comes
later: what the host does meanwhile is hidden, as it is when the engine serves.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.engine import add_model_arguments, generate, model_arguments, model_name, wait_until_compiled
from benchmarks.report import add_output_arguments, figure, print_table, save, write_json
from jaxllm.scheduling.simulator.fitted import FittedCost, RecordedStep, Shape

if TYPE_CHECKING:
    from jaxllm import LLM
    from jaxllm.execution.runner import PendingResult
    from jaxllm.scheduling import Plan, StepResult


class StepRecorder:
    """Notes the plan, the shape and the time of every step of an engine."""

    def __init__(self, llm: LLM) -> None:
        self.steps: list[RecordedStep] = []
        runner = llm.llm_engine.runner
        self._shape = Shape(0, 0, False)
        self._last_end = 0.0
        self._execute, self._executable = runner.execute, runner.compiler.executable
        runner.execute = self._timed  # type: ignore[method-assign]
        runner.compiler.executable = self._noted  # type: ignore

    def _noted(self, *arguments: Any) -> Any:
        shape, run = self._executable(*arguments)
        self._shape = Shape(shape.num_tokens, shape.num_seqs, shape.decode_only)
        return shape, run

    def _timed(self, plan: Plan) -> PendingResult:
        launched = time.perf_counter()
        pending = self._execute(plan)
        shape, wait = self._shape, pending.result

        def result() -> StepResult:
            answer = wait()
            end = time.perf_counter()
            self.steps.append(RecordedStep.of(plan, shape, end - max(launched, self._last_end)))
            self._last_end = end
            return answer

        pending.result = result  # type: ignore[method-assign]
        return pending


def workloads(shapes: list[Shape], max_model_len: int) -> Iterator[tuple[int, int, int]]:
    """(prompts, tokens of each, tokens out of each) that use every shape, at short and long contexts."""
    for shape in shapes:
        if shape.decode_only:
            for context in (16, max_model_len // 2):
                yield shape.num_seqs, context, 12
        else:
            for num_prompts in (1, min(4, shape.num_seqs), min(16, shape.num_seqs)):
                length = shape.num_tokens // num_prompts
                if 1 < length < max_model_len:
                    yield num_prompts, length, 1


def record(llm: LLM, repeats: int, seed: int) -> list[RecordedStep]:
    """Steps of every shape that is compiled; the first time that a workload runs does not count."""
    engine = llm.llm_engine
    compiled = [Shape(s.num_tokens, s.num_seqs, s.decode_only) for s in engine.runner.compiler.shapes]
    max_model_len = engine.input_processor.max_model_len
    generator = np.random.default_rng(seed)
    recorder = StepRecorder(llm)
    for num_prompts, length, output_len in workloads(compiled, max_model_len):
        for repeat in range(repeats + 1):
            before = len(recorder.steps)
            prompts = generator.integers(0, engine.model_config.vocab_size, (num_prompts, length)).tolist()
            generate(llm, prompts, output_len)
            if repeat == 0:
                del recorder.steps[before:]
    return recorder.steps


def fit(arguments: dict[str, Any], repeats: int, seed: int) -> tuple[FittedCost, list[RecordedStep]]:
    """The cost model of an engine, and the steps that it comes from."""
    from jaxllm import LLM

    with LLM(**arguments) as llm:
        wait_until_compiled(llm)
        steps = record(llm, repeats, seed)
    return FittedCost.fit(steps), steps


def print_fit(cost: FittedCost, steps: list[RecordedStep], title: str) -> None:
    """Each shape's price, and how far the recorded steps are from the fit."""
    rows: list[list[object]] = []
    for shape, seconds in sorted(cost.shapes.items()):
        own = [step for step in steps if step.shape == shape]
        errors = [abs(_fitted(cost, step) / step.seconds - 1) for step in own]
        kind = "decode" if shape.decode_only else "mixed"
        rows.append(
            [
                f"{kind}, {shape.num_tokens} tokens",
                len(own),
                f"{seconds * 1e3:.2f}",
                f"{np.median(errors):.1%}",
            ]
        )
    note = (
        f"and {cost.decode_context * 1e9:.1f} ns for a position of a decode, "
        f"{cost.prompt_pairs * 1e9:.2f} ns for a pair of prompt positions"
    )
    print_table(title, ["shape", "steps", "ms", "median error"], rows, note=note)


def _fitted(cost: FittedCost, step: RecordedStep) -> float:
    attention = cost.decode_context * step.decode_context + cost.prompt_pairs * step.prompt_pairs
    return cost.shapes[step.shape] + attention


def draw(cost: FittedCost, steps: list[RecordedStep], path: Path) -> None:
    """Recorded against fitted: points on the diagonal are steps that the model knows."""
    picture, axes = figure(width=6, height=6)
    for decode_only, label in ((True, "decode"), (False, "mixed")):
        own = [step for step in steps if step.shape.decode_only == decode_only]
        axes.plot([s.seconds for s in own], [_fitted(cost, s) for s in own], ".", label=label, alpha=0.5)
    ends = [min(s.seconds for s in steps), max(s.seconds for s in steps)]
    axes.plot(ends, ends, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("recorded, s")
    axes.set_ylabel("fitted, s")
    axes.legend()
    save(picture, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.profile_steps", description=__doc__.split("\n")[0]
    )
    add_model_arguments(parser)
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the cost model here, for `jaxllm.simulate --cost`")
    add_output_arguments(parser)
    options = parser.parse_args(arguments)
    with model_arguments(options) as engine_arguments:
        limits = {"max_model_len": options.max_model_len, "max_num_seqs": options.max_num_seqs}
        cost, steps = fit(engine_arguments | limits, options.repeats, options.seed)
    print_fit(cost, steps, model_name(options))
    if options.out is not None:
        cost.save(options.out)
    write_json(options.json, steps)
    if options.plot:
        draw(cost, steps, options.plot)


if __name__ == "__main__":
    main()

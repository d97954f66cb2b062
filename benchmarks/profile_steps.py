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
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tqdm import tqdm

from benchmarks.engine import add_model_arguments, model_arguments, model_name, wait_until_compiled
from benchmarks.report import add_output_arguments, figure, print_table, save, write_json
from jaxllm.scheduling.simulator.fitted import FittedCost, RecordedStep, Shape, Work

if TYPE_CHECKING:
    from jaxllm import LLM
    from jaxllm.execution.runner import PendingResult
    from jaxllm.request import Request
    from jaxllm.scheduling import Plan, StepResult

_numbers = count()


class StepRecorder:
    """Notes the plan, the shape and the time of every step of an engine, until it is closed."""

    def __init__(self, llm: LLM) -> None:
        self.steps: list[RecordedStep] = []
        self._runner = runner = llm.llm_engine.runner
        self._last_end = 0.0
        self._execute = runner.execute
        runner.execute = self._timed  # type: ignore[method-assign]

    def close(self) -> None:
        self._runner.execute = self._execute  # type: ignore[method-assign]

    def _timed(self, plan: Plan) -> PendingResult:
        launched = time.perf_counter()
        pending = self._execute(plan)
        num_tokens, num_seqs, _, decode_only = pending.shape
        shape, wait = Shape(num_tokens, num_seqs, decode_only), pending.result

        def result() -> StepResult:
            answer = wait()
            end = time.perf_counter()
            self.steps.append(RecordedStep(shape, Work.of(plan), end - max(launched, self._last_end)))
            self._last_end = end
            return answer

        pending.result = result  # type: ignore[method-assign]
        return pending


class Workload(NamedTuple):
    """What is given to the engine so that a shape runs.

    Attributes:
        decodes: requests that have their prompt behind them when the others arrive.
        context: tokens of their prompts.
        prompts, length: requests that arrive then, and their tokens.
        output_len: tokens that each of the latter generates.
    """

    decodes: int
    context: int
    prompts: int
    length: int
    output_len: int


def workloads(shapes: list[Shape], max_model_len: int) -> Iterator[Workload]:
    """Some that use every shape: alone and beside others, at short and long contexts."""
    for shape in shapes:
        if shape.decode_only:
            for context in (16, max_model_len // 2):
                yield Workload(0, 0, shape.num_seqs, context, min(12, max_model_len - context))
            continue
        for num_prompts in (1, min(4, shape.num_seqs), min(16, shape.num_seqs)):
            length = shape.num_tokens // num_prompts
            if 1 < length < max_model_len:
                yield Workload(0, 0, num_prompts, length, 1)
        for decodes, context in ((shape.num_seqs // 4, 16), (shape.num_seqs // 2, max_model_len // 2)):
            num_prompts = -(-(shape.num_tokens - decodes) // (max_model_len - 1))
            length = (shape.num_tokens - decodes) // num_prompts
            if decodes and length > 1 and decodes + num_prompts <= shape.num_seqs:
                yield Workload(decodes, context, num_prompts, length, 1)


def run_workload(llm: LLM, workload: Workload, generator: np.random.Generator) -> None:
    """Serves it to its end."""
    from jaxllm import SamplingParams, TokensPrompt

    engine = llm.llm_engine

    def submit(
        count: int, length: int, output_len: int, generator: np.random.Generator = generator
    ) -> list[Request]:
        params = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
        requests = []
        for _ in range(count):
            prompt = generator.integers(0, engine.model_config.vocab_size, length).tolist()
            processed = engine.input_processor.process(
                f"profiled-{next(_numbers)}", TokensPrompt(prompt_token_ids=prompt), params
            )
            engine.submit(processed.requests, processed.prompt)
            requests += processed.requests
        return requests

    # The same prompts each time: their pages are still in the prefix cache.
    for_ever = engine.input_processor.max_model_len - workload.context
    running = submit(workload.decodes, workload.context, for_ever, np.random.default_rng(workload.context))
    while any(request.num_output_tokens < 2 for request in running):
        engine.step()
    waited_for = submit(workload.prompts, workload.length, workload.output_len)
    while not all(request.status.is_finished for request in waited_for):
        engine.step()
    engine.abort([request.request_id for request in running])
    while engine.has_unfinished_requests():
        engine.step()


def record(llm: LLM, repeats: int, seed: int) -> list[RecordedStep]:
    """Steps of every shape that is compiled; the first time that a workload runs does not count."""
    engine = llm.llm_engine
    compiled = [Shape(s.num_tokens, s.num_seqs, s.decode_only) for s in engine.runner.compiler.shapes]
    max_model_len = engine.input_processor.max_model_len
    generator = np.random.default_rng(seed)
    recorder = StepRecorder(llm)
    for workload in tqdm(list(workloads(compiled, max_model_len)), desc="Recording", unit="workload"):
        for repeat in range(repeats + 1):
            before = len(recorder.steps)
            run_workload(llm, workload, generator)
            if repeat == 0:
                del recorder.steps[before:]
    recorder.close()
    return recorder.steps


def fit(llm: LLM, repeats: int, seed: int) -> tuple[FittedCost, list[RecordedStep]]:
    """The cost model of an engine, and the steps that it comes from."""
    wait_until_compiled(llm)
    steps = record(llm, repeats, seed)
    return FittedCost.fit(steps), steps


def print_fit(cost: FittedCost, steps: list[RecordedStep], title: str) -> None:
    """Each shape's price, and how far the recorded steps are from the fit."""
    rows: list[list[object]] = []
    for shape, seconds in sorted(cost.shapes.items()):
        own = [step for step in steps if step.shape == shape]
        errors = [abs(cost.price(step.shape, step.work) / step.seconds - 1) for step in own]
        kind = "decode" if shape.decode_only else "mixed"
        rows.append(
            [
                f"{kind}, {shape.num_tokens} tokens",
                len(own),
                f"{seconds * 1e3:.2f}",
                f"{np.median(errors):.1%}",
            ]
        )
    context, beside_prompts, prompt, pair, _ = cost.prices
    note = (
        f"and {context * 1e9:.1f} ns for a position of a decode, {beside_prompts * 1e9:.1f} beside prompts, "
        f"{prompt * 1e6:.0f} µs for a prompt, {pair * 1e9:.2f} ns for a pair of its positions"
    )
    print_table(title, ["shape", "steps", "ms", "median error"], rows, note=note)


def draw(cost: FittedCost, steps: list[RecordedStep], path: Path) -> None:
    """Recorded against fitted: points on the diagonal are steps that the model knows."""
    picture, axes = figure(width=6, height=6)
    for decode_only, label in ((True, "decode"), (False, "mixed")):
        own = [step for step in steps if step.shape.decode_only == decode_only]
        axes.plot(
            [s.seconds for s in own], [cost.price(s.shape, s.work) for s in own], ".", label=label, alpha=0.5
        )
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
    from jaxllm import LLM

    limits = {"max_model_len": options.max_model_len, "max_num_seqs": options.max_num_seqs}
    with model_arguments(options) as engine_arguments, LLM(**engine_arguments | limits) as llm:
        cost, steps = fit(llm, options.repeats, options.seed)
    print_fit(cost, steps, model_name(options))
    if options.out is not None:
        cost.save(options.out)
    write_json(options.json, steps)
    if options.plot:
        draw(cost, steps, options.plot)


if __name__ == "__main__":
    main()

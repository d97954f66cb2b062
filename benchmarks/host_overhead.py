"""Host time of a decode step outside the device, at 1, 16, 64 and 256 running sequences.

    python -m benchmarks.host_overhead
    python -m benchmarks.host_overhead --shape llama-135m --running 64 --json host.json --plot host.png
    python -m benchmarks.host_overhead --record-schedule /tmp/schedule.jsonl.gz  # and what that costs

The model is tiny unless one is named: the host's work does not depend on it, and on a CPU a large one would
compete for the cores. The call of the compiled step and the wait for its result are timed apart; what is
left is the host's: schedule, pack, unpack, apply, detokenize, and the rest of `Engine.step`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.engine import add_model_arguments, model_arguments, model_name, wait_until_compiled
from benchmarks.report import add_output_arguments, figure, print_table, save, write_json
from benchmarks.shapes import SHAPES, write_model_directory
from benchmarks.workloads import Workload

if TYPE_CHECKING:
    from jaxllm.engine import Engine

HOST_STAGES = ("schedule", "pack", "unpack", "apply", "detokenize", "record", "other")
DEVICE_STAGES = ("launch", "wait")

TINY = {
    **SHAPES["llama-135m"],
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@dataclass(frozen=True, slots=True)
class Overhead:
    """Milliseconds per decode step at one number of running sequences.

    Attributes:
        stages: stage -> one entry a step; `HOST_STAGES` and `DEVICE_STAGES`.
    """

    running: int
    stages: dict[str, list[float]]

    @property
    def host(self) -> list[float]:
        """The host's part of each step."""
        return [sum(step) for step in zip(*(self.stages[name] for name in HOST_STAGES), strict=True)]


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that one run of this benchmark measured."""

    model: str
    input_len: int
    rows: list[Overhead]


class StepTimer:
    """Times the stages of an engine's steps by standing between its parts."""

    def __init__(self, engine: Engine) -> None:
        self.spent: dict[str, float] = defaultdict(float)
        self._engine = engine
        scheduler, runner, processor = engine.scheduler, engine.runner, engine._output_processor
        runner.execute = self._execute(runner.execute)  # type: ignore[method-assign]
        runner.compiler.executable = self._executable(runner.compiler.executable)  # type: ignore[method-assign]
        scheduler.schedule = self._timed("schedule", scheduler.schedule)  # type: ignore[method-assign]
        scheduler.apply = self._timed("apply", scheduler.apply)  # type: ignore[method-assign]
        processor.process = self._timed("detokenize", processor.process)  # type: ignore[method-assign]
        for recorder in engine._recorders:
            recorder.planned = self._timed("record", recorder.planned)  # type: ignore[method-assign]
            recorder.applied = self._timed("record", recorder.applied)  # type: ignore[method-assign]

    def step(self) -> tuple[list[Any], dict[str, float]]:
        """One step: its outputs, and the milliseconds of each stage."""
        self.spent.clear()
        start = time.perf_counter()
        outputs = self._engine.step()
        total = time.perf_counter() - start
        self.spent["other"] = total - sum(self.spent.values())
        return outputs, {name: self.spent[name] * 1000 for name in (*HOST_STAGES, *DEVICE_STAGES)}

    def _timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            start = time.perf_counter()
            try:
                return call(*args)
            finally:
                self.spent[stage] += time.perf_counter() - start

        return timed

    def _executable(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def executable(*args: Any) -> Any:
            return self._timed("launch", call(*args))

        return executable

    def _execute(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def execute(plan: Any) -> Any:
            launched, start = self.spent["launch"], time.perf_counter()
            pending = call(plan)
            launch = self.spent["launch"] - launched
            self.spent["pack"] += time.perf_counter() - start - launch
            return _TimedResult(self, pending)

        return execute


class _TimedResult:
    """A pending result that tells waiting for the device from reading what it returned."""

    def __init__(self, timer: StepTimer, pending: Any) -> None:
        self._timer, self._pending = timer, pending
        self.shape = pending.shape

    def result(self) -> Any:
        self._timer._timed("wait", self._pending.output().token_ids.block_until_ready)()
        return self._timer._timed("unpack", self._pending.result)()


def measure(
    engine: Engine, timer: StepTimer, running: int, input_len: int, steps: int, seed: int
) -> Overhead:
    """Decodes `running` sequences together, and times the steps in which they all take part."""
    from jaxllm import RequestOutputKind, SamplingParams, TokensPrompt

    # All prompts are computed long before the first of them has its last token.
    output_len = steps + running * input_len // (engine.config.max_num_batched_tokens or 1) + 16
    prompts = Workload(running, input_len, output_len).prompts(engine.model_config.vocab_size, seed=seed)
    params = SamplingParams(
        temperature=0.0, max_tokens=output_len, ignore_eos=True, output_kind=RequestOutputKind.DELTA
    )
    for i, prompt in enumerate(prompts):
        engine.add_request(f"host-{seed}-{running}-{i}", TokensPrompt(prompt_token_ids=prompt), params)
    stages: dict[str, list[float]] = {name: [] for name in (*HOST_STAGES, *DEVICE_STAGES)}
    decoding = 0
    while engine.has_unfinished_requests():
        outputs, spent = timer.step()
        # The first such steps may still pack a prompt for the next one.
        decoding = decoding + 1 if len(outputs) == running and not any(o.finished for o in outputs) else 0
        if decoding > 4 and len(stages["other"]) < steps:
            for name, milliseconds in spent.items():
                stages[name].append(milliseconds)
    if len(stages["other"]) < steps:
        raise RuntimeError(f"only {len(stages['other'])} of {steps} steps decoded all {running} sequences")
    return Overhead(running, stages)


def run(options: argparse.Namespace) -> Results:
    from jaxllm import LLM

    counts = options.running or [1, 16, 64, 256]
    recorded = {"record_schedule": options.record_schedule}
    with model_arguments(options) as arguments, tempfile.TemporaryDirectory(prefix="jaxllm-tiny-") as scratch:
        name = model_name(options)
        if not options.shape and not options.model:
            name = "a tiny model"
            arguments |= {"model": str(write_model_directory(TINY, Path(scratch))), "load_format": "dummy"}
        llm = LLM(
            max_num_seqs=max(counts),
            max_model_len=2 * (options.input_len + options.steps),
            **arguments,
            **recorded,
        )
        wait_until_compiled(llm)
        engine = llm.llm_engine
        timer = StepTimer(engine)
        rows = []
        for running in counts:
            measure(engine, timer, running, options.input_len, min(options.steps, 20), options.seed + 1)
            rows.append(measure(engine, timer, running, options.input_len, options.steps, options.seed))
        llm.shutdown()
    return Results(name, options.input_len, rows)


def print_results(results: Results) -> None:
    columns = ["running", *HOST_STAGES, "host, ms", "p99", "us/sequence", *DEVICE_STAGES]
    rows: list[list[object]] = []
    for row in results.rows:
        host = statistics.median(row.host)
        rows.append(
            [
                row.running,
                *(f"{statistics.median(row.stages[name]):.3f}" for name in HOST_STAGES),
                f"{host:.3f}",
                f"{np.percentile(row.host, 99):.3f}",
                f"{host * 1000 / row.running:.1f}",
                *(f"{statistics.median(row.stages[name]):.3f}" for name in DEVICE_STAGES),
            ]
        )
    print_table(
        f"{results.model}: milliseconds per decode step, {results.input_len} tokens of prompt",
        columns,
        rows,
        note="medians; host is what is neither launching the compiled step nor waiting for it",
    )


def draw(results: Results, path: Path) -> None:
    picture, axes = figure()
    names = [str(row.running) for row in results.rows]
    bottom = [0.0] * len(names)
    for stage in HOST_STAGES:
        heights = [statistics.median(row.stages[stage]) for row in results.rows]
        axes.bar(names, heights, bottom=bottom, label=stage)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_xlabel("running sequences")
    axes.set_ylabel("host milliseconds per step")
    axes.set_title(results.model)
    axes.legend(fontsize="small")
    save(picture, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.host_overhead", description=__doc__.split("\n")[0]
    )
    add_model_arguments(parser)
    parser.add_argument("--running", type=int, action="append", help="sequences; default: 1, 16, 64 and 256")
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200, help="decode steps measured for each")
    parser.add_argument("--record-schedule", metavar="FILE", help="record the schedule meanwhile")
    add_output_arguments(parser)
    options = parser.parse_args(arguments)
    for name in ("input_len", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    results = run(options)
    print_results(results)
    write_json(options.json, results)
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()

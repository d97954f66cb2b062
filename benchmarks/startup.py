"""From process start to the first token, with a cold and with a warm compilation cache.

    python -m benchmarks.startup --shape llama-135m
    python -m benchmarks.startup MODEL --json startup.json --plot startup.png

Every run is a new process. Stages end at what the engine logs; the time until a line belongs to that line.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine import add_model_arguments, model_arguments, model_name
from benchmarks.report import add_output_arguments, figure, print_table, save, write_json

ROOT = Path(__file__).parent.parent

# Runs in the child. It marks stages on the monotonic clock, which processes of one machine share.
_CHILD = """
import json, logging, sys, time
marks = [("python", time.monotonic())]
arguments, input_len = json.loads(sys.argv[1]), int(sys.argv[2])

class Marks(logging.Handler):
    def emit(self, record):
        marks.append((f"log: {record.getMessage()}", time.monotonic()))

logger = logging.getLogger("jaxllm")
logger.addHandler(Marks())
logger.setLevel(logging.INFO)
from jaxllm import LLM, SamplingParams
marks.append(("import jaxllm", time.monotonic()))
llm = LLM(**arguments)
marks.append(("LLM()", time.monotonic()))
prompt = {"prompt_token_ids": [10 + i % 50 for i in range(input_len)]}
llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True), use_tqdm=False)
marks.append(("first token", time.monotonic()))
with open(sys.argv[3], "w") as file:
    json.dump(marks, file)
llm.shutdown()
"""

STAGES = ("python", "import jaxllm", "LLM()", "first token")


@dataclass(frozen=True, slots=True)
class Start:
    """One start.

    Attributes:
        cache: "cold" or "warm".
        stages: what happened, and how many seconds after the previous entry it was done.
        log: every line that the engine logged, and how many seconds after process start.
    """

    cache: str
    stages: list[tuple[str, float]]
    log: list[tuple[str, float]]

    @property
    def seconds(self) -> float:
        return sum(seconds for _, seconds in self.stages)


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that one run of this benchmark measured."""

    model: str
    starts: list[Start]


def start_once(arguments: dict[str, object], input_len: int, cache: str) -> Start:
    """Starts a process that generates one token, and waits until it has ended.

    Raises:
        RuntimeError: if it fails; the message holds the end of what it printed.
    """
    with tempfile.NamedTemporaryFile("r", suffix=".json") as marks_file:
        command = [sys.executable, "-c", _CHILD, json.dumps(arguments), str(input_len), marks_file.name]
        began = time.monotonic()
        child = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
        if child.returncode != 0:
            raise RuntimeError(f"the engine did not start:\n{child.stderr[-3000:]}")
        marks: list[tuple[str, float]] = [tuple(mark) for mark in json.load(marks_file)]
    stages, previous = [], began
    for name, when in marks:
        if name in STAGES:
            stages.append((name, when - previous))
            previous = when
    log = [(name.removeprefix("log: "), when - began) for name, when in marks if name not in STAGES]
    return Start(cache, stages, log)


def run(options: argparse.Namespace) -> Results:
    starts = []
    with model_arguments(options) as arguments:
        arguments |= {"max_num_seqs": options.max_num_seqs}
        if options.max_model_len:
            arguments["max_model_len"] = options.max_model_len
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory(prefix="jaxllm-cache-") as cache:
                arguments["compilation_cache_dir"] = cache
                for state in ("cold", "warm"):
                    starts.append(start_once(arguments, options.input_len, state))
                    print(f"{state}: {starts[-1].seconds:.1f} s", flush=True)
    return Results(model_name(options), starts)


def print_results(results: Results, *, verbose: bool) -> None:
    rows: list[list[object]] = []
    for state in ("cold", "warm"):
        starts = [start for start in results.starts if start.cache == state]
        stages = [statistics.median(start.stages[i][1] for start in starts) for i in range(len(STAGES))]
        total = statistics.median(start.seconds for start in starts)
        rows.append([state, *(f"{seconds:.2f}" for seconds in stages), f"{total:.2f}"])
    print_table(f"{results.model}: seconds to the first token", ["cache", *STAGES, "in all"], rows)
    if verbose:
        for start in results.starts[:2]:
            print(f"\n{start.cache} start, as logged:")
            for message, seconds in start.log:
                print(f"{seconds:8.2f} s  {message}")


def draw(results: Results, path: Path) -> None:
    picture, axes = figure(height=2.5)
    for row, state in enumerate(("cold", "warm")):
        starts = [start for start in results.starts if start.cache == state]
        left = 0.0
        for i, name in enumerate(STAGES):
            seconds = statistics.median(start.stages[i][1] for start in starts)
            axes.barh(state, seconds, left=left, color=f"C{i}", label=name if state == "cold" else None)
            left += seconds
        axes.text(left, row, f" {left:.1f} s", va="center")
    axes.invert_yaxis()
    axes.set_xlabel("seconds from process start to the first token")
    axes.set_title(results.model)
    axes.legend(fontsize="small", ncols=len(STAGES), loc="upper center", bbox_to_anchor=(0.5, -0.35))
    save(picture, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.split("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--input-len", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=1, help="pairs of a cold and a warm start")
    parser.add_argument("--verbose", action="store_true", help="print when the engine logged what")
    add_output_arguments(parser)
    options = parser.parse_args(arguments)
    if options.repeats < 1 or options.input_len < 1:
        parser.error("--repeats and --input-len must be at least 1")
    if options.compilation_cache_dir:
        parser.error("--compilation-cache-dir: this benchmark makes empty ones of its own")
    results = run(options)
    print_results(results, verbose=options.verbose)
    write_json(options.json, results)
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()

"""How far the simulator is from the engine: the same traces on both, with a cost model fitted here.

    python -m benchmarks.fidelity --shape llama-135m --max-num-batched-tokens 1024 --json fidelity.json

Serves five traces with the engine in real time, and records steps before, between and after them
(`benchmarks.profile_steps`), since what else runs on a machine changes within minutes. Then fits a cost
model to the recorded steps, none of which is of a trace, serves the traces in the simulator with it, and
compares throughput, mean TTFT and mean TPOT.

Each trace comes at `--load` of the rate that this machine can serve, which the simulator says from the
first steps recorded: the time that requests wait grows as load / (1 - load) (Kleinrock 1975, section 5.6),
so that near saturation the smallest error of a step becomes a large one of TTFT, and the trace would
compare two noises. One trace comes all at once, which saturates the engine.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.engine import add_model_arguments, model_arguments, model_name, wait_until_compiled
from benchmarks.profile_steps import print_fit, record, tiles_of
from benchmarks.report import add_output_arguments, figure, print_table, save, write_json
from benchmarks.workloads import scaled_trace
from jaxllm.scheduling.simulator import FittedCost, TracedRequest, simulate, summarize

if TYPE_CHECKING:
    from jaxllm import LLM
    from jaxllm.config import SchedulerConfig
    from jaxllm.request import Request


@dataclass(frozen=True, slots=True)
class Figures:
    """What is compared, of one run of one trace.

    Attributes:
        throughput: output tokens a second.
        ttft, tpot: means, in seconds.
    """

    throughput: float
    ttft: float
    tpot: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """A trace, served and simulated.

    Attributes:
        rate: requests a second; 0 where all came at once.
    """

    trace: str
    num_requests: int
    rate: float
    engine: Figures
    simulated: Figures

    def error(self, name: str) -> float:
        """How far the simulated figure is from the real one, as a fraction of it."""
        return float(getattr(self.simulated, name) / getattr(self.engine, name)) - 1


def traces(
    options: argparse.Namespace, config: SchedulerConfig, cost: FittedCost
) -> Iterator[tuple[str, float, list[TracedRequest]]]:
    """Five traces, each at the same part of what an engine of that cost can serve, and their rates."""

    def trace(name: str, rate: float) -> list[TracedRequest]:
        return scaled_trace(
            name,
            rate=rate,
            num_requests=options.num_requests,
            scale=options.scale,
            longest=options.max_model_len,
            seed=7,
        )

    for name in ("poisson", "bursty", "chat", "tenants"):
        saturated = simulate(_all_at_once(trace(name, 1.0)), config, cost)
        rate = options.load * options.num_requests / saturated.seconds
        yield name, rate, trace(name, rate)
    yield "all at once", 0.0, _all_at_once(trace("code", 1.0))


def _all_at_once(trace: list[TracedRequest]) -> list[TracedRequest]:
    return [replace(request, arrival_time=0.0) for request in trace]


def serve(llm: LLM, trace: list[TracedRequest]) -> Figures:
    """The engine, in real time."""
    from jaxllm import SamplingParams, TokensPrompt

    engine = llm.llm_engine
    vocabulary = engine.model_config.vocab_size
    requests: list[Request] = []
    start = time.monotonic()
    pending = list(reversed(trace))
    while pending or engine.has_unfinished_requests():
        now = time.monotonic() - start
        while pending and pending[-1].arrival_time <= now:
            traced = pending.pop()
            prompt = TokensPrompt(prompt_token_ids=[t % vocabulary for t in traced.prompt_token_ids()])
            params = SamplingParams(temperature=0.0, max_tokens=traced.output_len, ignore_eos=True)
            processed = engine.input_processor.process(
                str(len(requests)), prompt, params, arrival_time=start + traced.arrival_time
            )
            engine.submit(processed.requests, processed.prompt)
            requests += processed.requests
        if engine.has_unfinished_requests():
            engine.step()
        else:
            time.sleep(max(0.0, pending[-1].arrival_time - (time.monotonic() - start)))
    first = np.array([r.first_token_time for r in requests], float)
    last = np.array([r.last_token_time for r in requests], float)
    arrival = np.array([r.arrival_time for r in requests])
    lengths = np.array([r.num_output_tokens for r in requests])
    return Figures(
        float(lengths.sum() / (last.max() - start)),
        float((first - arrival).mean()),
        float(((last - first) / (lengths - 1)).mean()),
    )


def run(options: argparse.Namespace) -> tuple[FittedCost, list[Comparison]]:
    from jaxllm import LLM

    generator = np.random.default_rng(options.seed)
    with model_arguments(options) as arguments:
        arguments |= {"max_model_len": options.max_model_len, "max_num_seqs": options.max_num_seqs}
        with LLM(**arguments) as llm:
            wait_until_compiled(llm)
            config, tiles = llm.llm_engine.scheduler.config, tiles_of(llm)
            record(llm, 1, generator)  # what runs first takes longer
            steps = record(llm, 1, generator)
            served = []
            for name, rate, trace in traces(options, config, FittedCost.fit(steps, tiles)):
                llm.reset_prefix_cache()
                served.append((name, rate, trace, serve(llm, trace)))
                print(f"{name}, {rate:.2f} requests/s: {served[-1][-1]}", flush=True)
                steps += record(llm, 1, generator)
    cost = FittedCost.fit(steps, tiles)
    print_fit(cost, steps, f"{model_name(options)}: steps")
    rows = []
    for name, rate, trace, real in served:
        summary = summarize(simulate(trace, config, cost))
        virtual = Figures(summary.output_tokens_per_second, summary.ttft.mean, summary.tpot.mean)
        rows.append(Comparison(name, len(trace), rate, real, virtual))
    return cost, rows


def print_comparisons(rows: list[Comparison], title: str) -> None:
    columns = [
        "trace",
        "requests",
        "a second",
        "tok/s",
        "simulated",
        "",
        "TTFT, s",
        "simulated",
        "",
        "TPOT, ms",
        "simulated",
        "",
    ]
    table: list[list[object]] = []
    for row in rows:
        cells: list[object] = [row.trace, row.num_requests, f"{row.rate:.2f}" if row.rate else ""]
        for name, unit in (("throughput", 1), ("ttft", 1), ("tpot", 1000)):
            real, virtual = getattr(row.engine, name) * unit, getattr(row.simulated, name) * unit
            cells += [f"{real:.3g}", f"{virtual:.3g}", f"{row.error(name):+.0%}"]
        table.append(cells)
    print_table(title, columns, table)


def draw(rows: list[Comparison], path: Path) -> None:
    picture, axes = figure()
    places = np.arange(len(rows))
    for offset, name in ((-0.25, "throughput"), (0, "ttft"), (0.25, "tpot")):
        axes.bar(places + offset, [100 * row.error(name) for row in rows], width=0.25, label=name)
    axes.axhspan(-15, 15, color="tab:green", alpha=0.1)
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xticks(places, [row.trace for row in rows])
    axes.set_ylabel("simulated against measured, %")
    axes.legend()
    save(picture, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fidelity", description=__doc__.split("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--num-requests", type=int, default=48)
    parser.add_argument("--load", type=float, default=0.6, help="part of the rate that can be served")
    parser.add_argument("--scale", type=float, default=0.125, help="of the workloads' lengths")
    add_output_arguments(parser)
    options = parser.parse_args(arguments)
    _, rows = run(options)
    print_comparisons(rows, model_name(options))
    write_json(options.json, rows)
    if options.plot:
        draw(rows, options.plot)


if __name__ == "__main__":
    main()

"""How far the simulator is from the engine: the same traces on both, with a cost model fitted here.

    python -m benchmarks.fidelity --shape llama-135m --json fidelity.json

First records steps and fits a cost model (`benchmarks.profile_steps`), then serves five traces with the
engine in real time and with the simulator, and compares throughput, mean TTFT and mean TPOT.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.engine import add_model_arguments, model_arguments, model_name
from benchmarks.profile_steps import fit, print_fit
from benchmarks.report import add_output_arguments, figure, print_table, save, write_json
from benchmarks.workloads import scaled_trace
from jaxllm.scheduling.simulator import FittedCost, TracedRequest, simulate, summarize

if TYPE_CHECKING:
    from jaxllm import LLM
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
    """A trace, served and simulated."""

    trace: str
    num_requests: int
    engine: Figures
    simulated: Figures

    def error(self, name: str) -> float:
        """How far the simulated figure is from the real one, as a fraction of it."""
        return float(getattr(self.simulated, name) / getattr(self.engine, name)) - 1


def traces(
    num_requests: int, rate: float, scale: float, longest: int
) -> Iterator[tuple[str, list[TracedRequest]]]:
    """Five traces of a size that the machine can serve.

    Args:
        rate: requests a second.
        scale: of the workloads' lengths, which are those of a service on accelerators.
        longest: tokens of a request.
    """

    sizes: Any = {"num_requests": num_requests, "scale": scale, "longest": longest, "seed": 7}
    for name in ("poisson", "bursty", "chat", "tenants"):
        yield name, scaled_trace(name, rate=rate, **sizes)
    yield "all at once", [replace(r, arrival_time=0.0) for r in scaled_trace("code", rate=1.0, **sizes)]


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


def simulated(llm: LLM, trace: list[TracedRequest], cost: FittedCost) -> Figures:
    """The same on the virtual clock."""
    llm.reset_prefix_cache()
    summary = summarize(simulate(trace, llm.llm_engine.scheduler.config, cost))
    return Figures(summary.output_tokens_per_second, summary.ttft.mean, summary.tpot.mean)


def run(options: argparse.Namespace) -> tuple[FittedCost, list[Comparison]]:
    from jaxllm import LLM

    with model_arguments(options) as arguments:
        arguments |= {"max_model_len": options.max_model_len, "max_num_seqs": options.max_num_seqs}
        rows = []
        with LLM(**arguments) as llm:
            cost, steps = fit(llm, options.repeats, options.seed)
            print_fit(cost, steps, f"{model_name(options)}: steps")
            given = traces(options.num_requests, options.rate, options.scale, options.max_model_len)
            for name, trace in given:
                llm.reset_prefix_cache()
                real = serve(llm, trace)
                rows.append(Comparison(name, len(trace), real, simulated(llm, trace, cost)))
                print(f"{name}: {real} engine, {rows[-1].simulated} simulated", flush=True)
    return cost, rows


def print_comparisons(rows: list[Comparison], title: str) -> None:
    columns = [
        "trace",
        "requests",
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
        cells: list[object] = [row.trace, row.num_requests]
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
    parser.add_argument("--repeats", type=int, default=3, help="times that each step is recorded")
    parser.add_argument("--num-requests", type=int, default=60)
    parser.add_argument("--rate", type=float, default=1.5, help="requests a second")
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

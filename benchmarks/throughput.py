"""Tokens per second of the offline engine, beside what the machine could do at best.

    python -m benchmarks.throughput --shape llama-135m
    python -m benchmarks.throughput MODEL --row 256x1024->128 --json throughput.json --plot throughput.png

Achieved FLOP/s and bytes/s count what the workload needs at the least (`benchmarks.cost`), not what was
spent. "of best" is the time that a machine at its measured ceilings would take, over the time taken.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks.cost import ModelCost, Work
from benchmarks.engine import add_model_arguments, generate, model_arguments, model_name, wait_until_compiled
from benchmarks.machine import Machine, measure
from benchmarks.report import add_output_arguments, figure, print_table, save, write_json
from benchmarks.workloads import STANDARD, Workload, parse_workload


@dataclass(frozen=True, slots=True)
class Throughput:
    """One workload, measured."""

    workload: Workload
    seconds: list[float]
    work: Work
    fastest_seconds: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def flops_per_second(self) -> float:
        return self.work.flops / self.median

    @property
    def bytes_per_second(self) -> float:
        return self.work.bytes / self.median


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that one run of this benchmark measured."""

    model: str
    dtype: str
    machine: Machine
    rows: list[Throughput]


def run(options: argparse.Namespace, machine: Machine, workloads: list[Workload]) -> Results:
    from jaxllm import LLM

    with model_arguments(options) as arguments:
        llm = LLM(
            max_model_len=max(w.input_len + w.output_len for w in workloads),
            max_num_seqs=max(w.num_prompts for w in workloads),
            **arguments,
        )
        wait_until_compiled(llm)
        engine = llm.llm_engine
        dtype, budget = engine.config.dtype, engine.config.max_num_batched_tokens or 1
        cost = ModelCost.from_config(engine.model_config, dtype)
        rows = []
        for workload in workloads:
            seconds = []
            for repeat in range(options.repeats + 1):  # the first warms up
                prompts = workload.prompts(engine.model_config.vocab_size, seed=options.seed + repeat)
                start = time.perf_counter()
                generate(llm, prompts, workload.output_len)
                seconds.append(time.perf_counter() - start)
            work = cost.workload(workload, max_num_batched_tokens=budget)
            rows.append(Throughput(workload, seconds[1:], work, work.fastest_seconds(machine, dtype)))
        llm.shutdown()
    return Results(model_name(options), dtype, machine, rows)


def print_results(results: Results) -> None:
    columns = ["prompts x in -> out", "seconds", "prompt tok/s", "output tok/s"]
    columns += ["GFLOP/s", "of peak", "GB/s", "of peak", "of best"]
    peak_flops = results.machine.flops(results.dtype)
    peak_bytes = results.machine.read_bandwidth
    rows: list[list[object]] = []
    for row in results.rows:
        rows.append(
            [
                row.workload,
                f"{row.median:.2f}",
                f"{row.workload.num_computed_prompt_tokens / row.median:,.0f}",
                f"{row.workload.num_output_tokens / row.median:,.1f}",
                f"{row.flops_per_second / 1e9:,.0f}",
                f"{row.flops_per_second / peak_flops:.0%}",
                f"{row.bytes_per_second / 1e9:,.1f}",
                f"{row.bytes_per_second / peak_bytes:.0%}",
                f"{row.fastest_seconds / row.median:.0%}",
            ]
        )
    print_table(f"{results.model}, {results.dtype}", columns, rows, note=results.machine.describe())


def draw(results: Results, path: Path) -> None:
    """The roofline (Williams et al. 2009): where each workload stands under the machine's two ceilings."""
    picture, axes = figure()
    machine, peak = results.machine, results.machine.flops(results.dtype)
    intensities = [row.work.intensity for row in results.rows]
    ridge = peak / machine.read_bandwidth
    low, high = min([*intensities, ridge]) / 2, max([*intensities, ridge]) * 2
    axes.plot(
        [low, ridge, high],
        [low * machine.read_bandwidth, peak, peak],
        color="black",
        label="measured ceilings",
    )
    for row in results.rows:
        axes.plot(row.work.intensity, row.flops_per_second, "o", label=str(row.workload))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte that the workload needs")
    axes.set_ylabel("FLOP/s")
    axes.set_title(f"{results.model}, {results.dtype}, {machine.device}")
    axes.legend(fontsize="small")
    save(picture, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.throughput", description=__doc__.split("\n")[0]
    )
    add_model_arguments(parser)
    parser.add_argument("--row", type=parse_workload, action="append", help="16x512->32/448; may be repeated")
    parser.add_argument("--repeats", type=int, default=3)
    add_output_arguments(parser)
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    results = run(options, measure(), options.row or STANDARD)
    print_results(results)
    write_json(options.json, results)
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()

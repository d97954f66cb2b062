"""What one user waits for: time to first token, and time per token after it.

    python -m benchmarks.latency --shape llama-135m
    python -m benchmarks.latency MODEL --input-len 512 --output-len 64 --request-rate 2 --num-requests 100

Without `--request-rate`, rows of 1, 8, 32, ... requests that arrive at once. With it, requests arrive as a
Poisson process, whether or not earlier ones have finished, as independent users do.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.cost import ModelCost
from benchmarks.engine import add_model_arguments, generate, model_arguments, model_name, wait_until_compiled
from benchmarks.machine import Machine, measure
from benchmarks.report import add_output_arguments, figure, print_table, save, write_json
from benchmarks.workloads import Workload

PERCENTILES = (50, 90, 99)


@dataclass(slots=True)
class Latency:
    """Seconds, one entry a request.

    Attributes:
        first_token: from arrival to the first token.
        per_token: mean over the tokens after the first.
        fastest_per_token: what the machine's measured ceilings allow for a decode step of this batch.
    """

    name: str
    first_token: list[float]
    per_token: list[float]
    fastest_per_token: float


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that one run of this benchmark measured."""

    model: str
    dtype: str
    input_len: int
    output_len: int
    machine: Machine
    rows: list[Latency]


def from_outputs(name: str, outputs: list[Any], fastest_per_token: float) -> Latency:
    latency = Latency(name, [], [], fastest_per_token)
    for output in outputs:
        metrics = output.metrics
        tokens = len(output.outputs[0].token_ids)
        latency.first_token.append(metrics.first_token_time - metrics.arrival_time)
        latency.per_token.append((metrics.last_token_time - metrics.first_token_time) / max(tokens - 1, 1))
    return latency


def poisson(llm: Any, workload: Workload, rate: float, seed: int) -> list[Any]:
    """Feeds the engine requests at their arrival times, and steps it in between."""
    from jaxllm import RequestOutputKind, SamplingParams

    engine = llm.llm_engine
    prompts = workload.prompts(engine.model_config.vocab_size, seed=seed)
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(prompts))
    params = SamplingParams(
        temperature=0.0,
        max_tokens=workload.output_len,
        ignore_eos=True,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    arrivals = time.monotonic() + np.cumsum(gaps)
    finished: list[Any] = []
    added = 0
    while len(finished) < len(prompts):
        while added < len(prompts) and time.monotonic() >= arrivals[added]:
            engine.add_request(
                f"latency-{seed}-{added}",
                {"prompt_token_ids": prompts[added]},
                params,
                arrival_time=float(arrivals[added]),
            )
            added += 1
        if engine.has_unfinished_requests():
            finished += [output for output in engine.step() if output.finished]
        elif added < len(prompts):
            time.sleep(max(0.0, arrivals[added] - time.monotonic()))
    return finished


def run(options: argparse.Namespace, machine: Machine) -> Results:
    from jaxllm import LLM

    batches = options.batch_size or [1, 8, 32]
    with model_arguments(options) as arguments:
        llm = LLM(
            max_model_len=options.input_len + options.output_len,
            max_num_seqs=max(batches) if options.request_rate is None else options.max_num_seqs,
            **arguments,
        )
        wait_until_compiled(llm)
        engine = llm.llm_engine
        cost = ModelCost.from_config(engine.model_config, engine.config.dtype)

        def fastest(batch: int) -> float:
            seen = batch * cost.seen(options.input_len + options.output_len // 2)
            return cost.step(batch, batch, seen, seen).fastest_seconds(machine, engine.config.dtype)

        rows = []
        if options.request_rate is None:
            for batch in batches:
                workload = Workload(batch, options.input_len, options.output_len)
                outputs = []
                for repeat in range(options.repeats + 1):  # the first warms up
                    prompts = workload.prompts(engine.model_config.vocab_size, seed=options.seed + repeat)
                    results = generate(llm, prompts, options.output_len)
                    outputs += results if repeat else []
                rows.append(from_outputs(f"{batch} at once", outputs, fastest(batch)))
        else:
            workload = Workload(options.num_requests, options.input_len, options.output_len)
            poisson(llm, Workload(4, options.input_len, options.output_len), 10.0, options.seed + 1)
            outputs = poisson(llm, workload, options.request_rate, options.seed)
            rows.append(from_outputs(f"{options.request_rate:g} a second", outputs, fastest(1)))
        llm.shutdown()
    return Results(
        model_name(options), engine.config.dtype, options.input_len, options.output_len, machine, rows
    )


def print_results(results: Results) -> None:
    columns = ["requests", *(f"TTFT p{p}, ms" for p in PERCENTILES), *(f"TPOT p{p}, ms" for p in PERCENTILES)]
    rows: list[list[object]] = []
    for row in results.rows:
        cells: list[object] = [row.name]
        for values in (row.first_token, row.per_token):
            cells += [f"{value * 1000:,.1f}" for value in np.percentile(values, PERCENTILES)]
        rows.append([*cells, f"{row.fastest_per_token / float(np.median(row.per_token)):.0%}"])
    print_table(
        f"{results.model}, {results.dtype}, {results.input_len} -> {results.output_len}",
        [*columns, "of best"],
        rows,
        note="TTFT: time to first token; TPOT: time per token after it; of best: a decode step at the "
        f"ceilings of {results.machine.describe()}",
    )


def draw(results: Results, path: Path) -> None:
    """How many requests waited at most so long."""
    picture, axes = figure()
    for row in results.rows:
        for values, style, what in (
            (row.first_token, "-", "first token"),
            (row.per_token, "--", "per token"),
        ):
            share = np.arange(1, len(values) + 1) / len(values)
            axes.step(np.sort(values) * 1000, share, style, where="post", label=f"{row.name}, {what}")
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds")
    axes.set_ylabel("share of requests")
    axes.set_title(f"{results.model}, {results.dtype}, {results.input_len} -> {results.output_len}")
    axes.legend(fontsize="small")
    save(picture, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__.split("\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--batch-size", type=int, action="append", help="default: 1, 8 and 32")
    parser.add_argument("--repeats", type=int, default=3, help="of each batch size")
    parser.add_argument("--request-rate", type=float, help="requests a second, instead of batches")
    parser.add_argument("--num-requests", type=int, default=50, help="with --request-rate")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="with --request-rate")
    add_output_arguments(parser)
    options = parser.parse_args(arguments)
    for name in ("input_len", "output_len", "repeats", "num_requests", "max_num_seqs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if options.request_rate is not None and options.request_rate <= 0:
        parser.error("--request-rate must be above 0")
    results = run(options, measure())
    print_results(results)
    write_json(options.json, results)
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()

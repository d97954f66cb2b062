"""`python -m jaxllm.simulate`: traffic on a device that need not be there, under any scheduling policy.

    python -m jaxllm.simulate --policy fcfs,vtc --workload chat --rate 2:20 --device h200 --model config.json

Prints a table of what each policy comes to at each rate; `--html` and `--plots` draw it. The scheduler
and the policies are those that serve; how long a step takes comes from a roofline of the device, or from
a cost model fitted to recorded steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as PrintedTable
from tqdm import tqdm

from jaxllm.config import DEMO_MODEL, SchedulerConfig
from jaxllm.errors import ConfigError, JaxLLMError
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import translate_config
from jaxllm.models.hub import read_config_of
from jaxllm.scheduling.policies import load_policy
from jaxllm.scheduling.simulator import (
    DEVICES,
    INTERCONNECTS,
    WORKLOADS,
    CostModel,
    Device,
    FittedCost,
    ModelFigures,
    RooflineCost,
    TracedRequest,
    make_workload,
    read_trace,
    simulate,
    summarize,
    this_cpu,
)
from jaxllm.scheduling.simulator.report import Outcome, Table, draw, write_html, write_pictures

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def figures_of(config: ModelConfig, dtype: str) -> ModelFigures:
    """What the cost of a step follows from; where layers differ in their windows, most of them decide."""
    [(window, _)] = Counter(config.layer_windows or (None,)).most_common(1)
    return ModelFigures(
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        layer_parameters=config.layer_parameters,
        head_parameters=config.head_parameters,
        hidden_size=config.hidden_size,
        dtype_bytes=_DTYPE_BYTES[dtype],
        window=window,
        moe=config.moe,
        expert_parameters=config.expert_parameters,
        mla=config.mla,
    )


def parse_rates(text: str) -> list[float]:
    """Requests a second: "4", "2,4,8", or "2:20", which is five rates in even ratios from 2 to 20."""
    try:
        if ":" in text:
            first, last, *count = text.split(":")
            low, high, steps = float(first), float(last), int(count[0]) if count else 5
            if len(count) > 1 or steps < 2 or not 0 < low < high:
                raise ValueError
            return [round(low * (high / low) ** (i / (steps - 1)), 3) for i in range(steps)]
        rates = [float(part) for part in text.split(",")]
        if min(rates) <= 0:
            raise ValueError
        return rates
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no rate; write 4, or 2,4,8, or 2:20 (five rates) or 2:20:9 (nine)"
        ) from None


def parse_policies(text: str) -> list[str]:
    """Names between commas."""
    return [name for name in text.split(",") if name]


def run(options: argparse.Namespace) -> list[Outcome]:
    """Every policy at every rate.

    Raises:
        ConfigError: a combination of options that makes no sense.
        JaxLLMError, ValueError: the model, the policy or a file cannot be used.
    """
    model = translate_config(read_config_of(options.model))
    figures = figures_of(model, options.dtype)
    device = this_cpu() if options.device == "cpu" else DEVICES[options.device]
    config = _scheduler_config(options, model, figures, device)
    cost: CostModel
    if options.cost is not None:
        cost = FittedCost.load(options.cost)
    else:
        cost = RooflineCost(
            figures,
            device,
            options.tensor_parallel_size,
            options.pipeline_parallel_size,
            INTERCONNECTS.get(options.device),
            page_size=options.block_size,
        )
    rates: Sequence[float | None] = [None] if options.trace else options.rate
    pairs = [(policy, rate) for rate in rates for policy in options.policy]
    outcomes = []
    for policy, rate in tqdm(pairs, desc="Simulating", unit="run", disable=not sys.stderr.isatty()):
        arguments = options.scheduling_config.get(policy, {})
        simulation = simulate(_trace(options, rate), config, cost, load_policy(policy, arguments))
        summary = summarize(simulation, ttft=options.ttft, tpot=options.tpot)
        outcomes.append(Outcome(policy, rate, summary, simulation))
    return outcomes


def _trace(options: argparse.Namespace, rate: float | None) -> Iterable[TracedRequest]:
    if rate is None:
        return read_trace(options.trace)
    return make_workload(options.workload, rate=rate, num_requests=options.num_requests, seed=options.seed)


def _scheduler_config(
    options: argparse.Namespace, model: ModelConfig, figures: ModelFigures, device: Device
) -> SchedulerConfig:
    num_pages, tensor, stages = (
        options.num_gpu_blocks,
        options.tensor_parallel_size,
        options.pipeline_parallel_size,
    )
    if stages > model.num_layers:
        raise ConfigError(
            f"--pipeline-parallel-size {stages} is more than the {model.num_layers} layers of "
            f"{options.model}; pass at most that.",
            param="pipeline_parallel_size",
        )
    # Pages have a part on every chip, of the layers and heads that are there.
    page_bytes = figures.kv_bytes_per_token * options.block_size * tensor / figures.cache_shards(tensor)
    if num_pages is None:
        memory = device.memory * tensor * stages * options.gpu_memory_utilization
        num_pages = int((memory - figures.weight_bytes) / page_bytes)
        if num_pages < 2:
            raise ConfigError(
                f"{tensor * stages} x {device.name} have {memory / 1e9:.0f} GB and the weights take "
                f"{figures.weight_bytes / 1e9:.0f} GB: none is left for the KV cache; raise "
                "--tensor-parallel-size or --pipeline-parallel-size.",
                param="tensor_parallel_size",
            )
    most = min(options.max_model_len or model.max_position_embeddings, (num_pages - 1) * options.block_size)
    return SchedulerConfig(
        max_num_seqs=options.max_num_seqs,
        max_num_batched_tokens=options.max_num_batched_tokens,
        max_model_len=most,
        page_size=options.block_size,
        num_pages=num_pages,
        num_host_pages=int(options.swap_space * 2**30 / page_bytes / options.data_parallel_size),
        enable_prefix_caching=options.enable_prefix_caching,
        num_stages=stages,
        data_parallel_size=options.data_parallel_size,
    )


COLUMNS = ("policy", "req/s in", "req/s out", "goodput", "tok/s", "TTFT mean", "p99", "TPOT mean", "p99",
           "cache hits", "preempted", "busy", "fairness")  # fmt: skip


def table_row(outcome: Outcome) -> list[str]:
    """An outcome as the cells of `COLUMNS`."""
    s = outcome.summary
    return [
        outcome.policy,
        "trace" if outcome.rate is None else f"{outcome.rate:g}",
        f"{s.requests_per_second:.2f}",
        f"{s.goodput:.2f}",
        f"{s.output_tokens_per_second:,.0f}",
        f"{s.ttft.mean:.2f} s",
        f"{s.ttft.p99:.2f} s",
        f"{s.tpot.mean * 1e3:.1f} ms",
        f"{s.tpot.p99 * 1e3:.1f} ms",
        f"{s.cache_hit_rate:.0%}",
        str(s.num_preemptions),
        f"{s.device_busy:.0%}",
        f"{s.fairness:.2f}",
    ]


REPLICA_COLUMNS = ("policy", "req/s in", "replica", "requests", "tok/s", "TTFT mean", "p99",
                   "TPOT mean", "p99", "cache hits", "preempted", "busy", "KV cache")  # fmt: skip


def replica_rows(outcome: Outcome) -> list[list[str]]:
    """The replicas of an outcome, each as the cells of `REPLICA_COLUMNS`; none where there is one."""

    def share(value: float | None) -> str:
        return "" if value is None else f"{value:.0%}"

    return [
        [
            *table_row(outcome)[:2],
            str(replica),
            str(s.num_requests),
            f"{s.output_tokens_per_second:,.0f}",
            f"{s.ttft.mean:.2f} s",
            f"{s.ttft.p99:.2f} s",
            f"{s.tpot.mean * 1e3:.1f} ms",
            f"{s.tpot.p99 * 1e3:.1f} ms",
            f"{s.cache_hit_rate:.0%}",
            str(s.num_preemptions),
            share(s.device_busy),
            share(s.kv_cache_usage),
        ]
        for replica, s in enumerate(outcome.summary.replicas)
    ]


def tables_of(outcomes: Sequence[Outcome]) -> list[Table]:
    """What is printed: a row for each outcome, and where there are replicas a table of these."""
    tables: list[Table] = [(COLUMNS, [table_row(outcome) for outcome in outcomes])]
    if replicas := [row for outcome in outcomes for row in replica_rows(outcome)]:
        tables.append((REPLICA_COLUMNS, replicas))
    return tables


def print_outcomes(outcomes: Sequence[Outcome], title: str) -> None:
    """The tables."""
    console = Console()
    for (columns, rows), heading in zip(tables_of(outcomes), (title, "Replicas"), strict=False):
        table = PrintedTable(title=heading, title_justify="left")
        for name in columns:
            table.add_column(name, justify="left" if name == "policy" else "right")
        previous = rows[0][1]
        for row in rows:
            if row[1] != previous:
                table.add_section()
                previous = row[1]
            table.add_row(*row)
        # Where the output goes to a file there is no width to keep to.
        (console if console.is_terminal else Console(width=160)).print(table)
    refused = max(outcome.summary.num_refused for outcome in outcomes)
    if refused:
        print(f"{refused} requests were refused: longer than the model or the KV cache allows.")


def write_files(options: argparse.Namespace, outcomes: Sequence[Outcome], title: str) -> None:
    """What the command line wants beside the table.

    Raises:
        ConfigError: pictures are wanted, and matplotlib is missing.
    """
    if options.json is not None:
        rows = [
            {"policy": o.policy, "rate": o.rate, "summary": dataclasses.asdict(o.summary)} for o in outcomes
        ]
        options.json.write_text(json.dumps(rows, indent=2) + "\n")
    if options.html is None and options.plots is None:
        return
    try:
        pictures = draw(outcomes)
    except ImportError as error:
        raise ConfigError(f"pictures need matplotlib ({error}): pip install 'jaxllm[plots]'") from error
    if options.plots is not None:
        write_pictures(options.plots, pictures)
    if options.html is not None:
        write_html(options.html, title, tables_of(outcomes), pictures)


def make_parser(program: str = "python -m jaxllm.simulate") -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Serve simulated traffic under one scheduling policy or several, and compare.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--policy", type=parse_policies, default=["fcfs"], metavar="NAME,...", help="default: fcfs")
    add("--scheduling-config", type=json.loads, default={}, metavar="JSON",
        help='arguments by policy: {"mlfq": {"quantum": 512}}')  # fmt: skip
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--workload", choices=list(WORKLOADS), default="poisson")
    source.add_argument(
        "--trace", type=Path, metavar="FILE", help="JSONL or CSV: ours, Azure's or BurstGPT's"
    )
    add("--rate", type=parse_rates, default=[4.0], metavar="R", help="requests a second: 4, 2,4,8 or 2:20")
    add("--num-requests", type=int, default=1000, metavar="N", help="of the workload (default: 1000)")
    add("--seed", type=int, default=0)
    add("--model", default=DEMO_MODEL, help="directory, hub name or config.json, which is all that is read")
    add("--dtype", choices=list(_DTYPE_BYTES), default="bfloat16")
    add(
        "--device",
        choices=[*DEVICES, "cpu"],
        default="h100",
        help="cpu is this machine's, measured now, with all its memory",
    )
    add(
        "--tensor-parallel-size",
        "-tp",
        type=int,
        default=1,
        metavar="N",
        help=f"chips that share every product; what they send is counted on {', '.join(INTERCONNECTS)}",
    )
    add(
        "--pipeline-parallel-size",
        "-pp",
        type=int,
        default=1,
        metavar="N",
        help="stages that share the layers",
    )
    add(
        "--data-parallel-size",
        "-dp",
        type=int,
        default=1,
        metavar="N",
        help="replicas, each of so many chips, with all of the model and the limits below, "
        "which requests are shared out among",
    )
    add("--cost", type=Path, metavar="FILE", help="fitted cost model, in place of the device's roofline")
    add("--max-num-seqs", type=int, default=256, metavar="N")
    add("--max-num-batched-tokens", type=int, default=8192, metavar="N")
    add("--max-model-len", type=int, metavar="N")
    add("--block-size", type=int, default=16, metavar="N")
    add("--num-gpu-blocks", type=int, metavar="N", help="KV pages; by default what the memory holds")
    add("--swap-space", type=float, default=0.0, metavar="GiB", help="host memory for preempted requests")
    add("--gpu-memory-utilization", type=float, default=0.9, metavar="F")
    add("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    add("--ttft", type=float, default=1.0, metavar="S", help="objective for goodput, in seconds")
    add("--tpot", type=float, default=0.05, metavar="S", help="objective for goodput, in seconds")
    add("--json", type=Path, metavar="FILE", help="write everything in the table, and more, to this file")
    add("--html", type=Path, metavar="FILE", help="write the table and pictures as one HTML file")
    add("--plots", type=Path, metavar="DIR", help="write the pictures as PNG files")
    return parser


def main(argv: Sequence[str] | None = None, program: str = "python -m jaxllm.simulate") -> int:
    """Runs the command line; returns the exit status."""
    parser = make_parser(program)
    options = parser.parse_args(argv)
    if not isinstance(options.scheduling_config, dict) or not options.scheduling_config.keys() <= set(
        options.policy
    ):
        parser.error(f"argument --scheduling-config: its keys must be among the policies, {options.policy}")
    if options.swap_space < 0:
        parser.error(f"argument --swap-space: {options.swap_space} GiB; give 0 or more")
    sizes = (options.data_parallel_size, options.pipeline_parallel_size, options.tensor_parallel_size)
    if not options.policy or min(options.num_requests, *sizes) < 1:
        parser.error("give at least one policy, one request, and 1 of each parallel size")
    traffic = options.trace or f"{options.workload}, {options.num_requests} requests"
    where = options.cost or f"{math.prod(sizes)} x {options.device}"
    if options.data_parallel_size > 1:
        where = f"{options.data_parallel_size} replicas on {where}"
    title = f"{options.model} on {where}: {traffic}"
    try:
        outcomes = run(options)
        print_outcomes(outcomes, title)
        write_files(options, outcomes, title)
    except (JaxLLMError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

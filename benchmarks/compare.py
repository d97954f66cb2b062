"""The same prompts on jaxllm and on a peer, in alternating runs: the ratio row by row.

    python -m benchmarks.compare --peer vllm --peer-python /path/to/vllm/venv/bin/python
    python -m benchmarks.compare --peer transformers

Both engines load the same checkpoint of random weights, each in a process of its own, with prefix caching
where they have it, and decode greedily to a fixed length. Prompts are fresh in every run, so that only the
sharing a row states can hit. The figure of a row is the median of its runs; a ratio above 1 means that
jaxllm is faster. "at the ceilings" is the ratio that an engine would reach which does nothing but what the
workload needs (`benchmarks.cost`) at the bandwidth and FLOP/s measured here before the engines start.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.checkpoint import write_checkpoint
from benchmarks.cost import ModelCost
from benchmarks.machine import Machine, measure
from benchmarks.peers import Peer
from benchmarks.report import add_output_arguments, figure, print_table, save, write_json
from benchmarks.shapes import SHAPES
from benchmarks.workloads import STANDARD, Workload, parse_workload
from jaxllm.models.families import translate_config


@dataclass(slots=True)
class Measured:
    """Seconds of every run of one workload on one engine."""

    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(slots=True)
class Comparison:
    """Everything measured: per engine its start, and per workload its runs."""

    shape: str
    dtype: str
    engines: list[str]
    load_seconds: list[float]
    machine: Machine
    workloads: list[Workload]
    fastest_seconds: list[float]
    runs: list[list[Measured]]

    def ratio(self, row: int) -> float:
        """How many times as fast as the peer jaxllm is."""
        ours, theirs = self.runs[row]
        return theirs.median / ours.median

    def bound(self, row: int) -> float:
        """How many times as fast as the peer an engine at the machine's ceilings would be."""
        return self.runs[row][1].median / self.fastest_seconds[row]

    def geometric_mean(self, of: Callable[[int], float]) -> float:
        return statistics.geometric_mean(of(row) for row in range(len(self.workloads)))


def compare(
    peers: list[Peer],
    checkpoint: Path,
    shape: str,
    dtype: str,
    workloads: list[Workload],
    repeats: int,
    seed: int,
    max_num_batched_tokens: int | None = None,
) -> Comparison:
    """Loads the engines one after the other, then runs each workload in turn on each of them."""
    machine = measure()
    cost = ModelCost.from_config(translate_config(SHAPES[shape]), dtype)
    max_model_len = max(w.input_len + w.output_len for w in workloads)
    max_num_seqs = max(w.num_prompts for w in workloads)
    engines, load_seconds = [], []
    for peer in peers:
        engine, seconds = peer.load(
            model=str(checkpoint),
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
        )
        print(f"{engine} loaded in {seconds:.1f} s", flush=True)
        engines.append(engine)
        load_seconds.append(seconds)

    vocab_size = SHAPES[shape]["vocab_size"]
    runs = [[Measured() for _ in peers] for _ in workloads]
    for row, workload in enumerate(workloads):
        # Run 0 warms up and does not count.
        for run in range(repeats + 1):
            prompts = workload.prompts(vocab_size, seed=seed + run)
            for peer, measured in zip(peers, runs[row], strict=True):
                seconds = peer.generate(prompts, workload.output_len)
                if run:
                    measured.seconds.append(seconds)
        medians = ", ".join(f"{e} {m.median:.2f} s" for e, m in zip(engines, runs[row], strict=True))
        print(f"{workload}: {medians}", flush=True)
    # The largest steps there could be: fewer of them read the weights less often.
    budget = max_num_batched_tokens or max(w.num_prompts * w.input_len for w in workloads)
    fastest = [
        cost.workload(w, max_num_batched_tokens=budget).fastest_seconds(machine, dtype) for w in workloads
    ]
    return Comparison(shape, dtype, engines, load_seconds, machine, workloads, fastest, runs)


def print_comparison(result: Comparison) -> None:
    columns = ["prompts x in -> out", *(f"{engine}, tok/s" for engine in result.engines)]
    if len(result.engines) == 2:
        columns += ["ratio", "at the ceilings", "spread of runs"]
    rows: list[list[object]] = []
    for row, (workload, runs) in enumerate(zip(result.workloads, result.runs, strict=True)):
        # Where next to nothing is generated, the prompt is what takes the time.
        prefill = workload.output_len == 1
        tokens = workload.num_computed_prompt_tokens if prefill else workload.num_output_tokens
        cells: list[object] = [f"{workload}{', prompt' if prefill else ''}"]
        cells += [f"{tokens / measured.median:,.1f}" for measured in runs]
        if len(runs) == 2:
            spread = " / ".join(f"{_spread(measured):.0%}" for measured in runs)
            cells += [f"{result.ratio(row):.2f}", f"{result.bound(row):.2f}", spread]
        rows.append(cells)
    starts = ", ".join(f"{e} {s:.1f} s" for e, s in zip(result.engines, result.load_seconds, strict=True))
    note = f"start: {starts}; ceilings: {result.machine.describe()}"
    print_table(f"{result.shape}, {result.dtype}", columns, rows, note=note)
    if len(result.engines) == 2:
        mean, bound = result.geometric_mean(result.ratio), result.geometric_mean(result.bound)
        print(f"geometric mean of the ratios: {mean:.2f}; at the ceilings {bound:.2f}")


def _spread(measured: Measured) -> float:
    return (max(measured.seconds) - min(measured.seconds)) / measured.median


def draw(result: Comparison, path: Path) -> None:
    picture, axes = figure()
    ratios = [result.ratio(row) for row in range(len(result.workloads))]
    names = [str(workload) for workload in result.workloads]
    bars = axes.barh(names, ratios, color=["tab:green" if ratio >= 1 else "tab:red" for ratio in ratios])
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel(f"{result.engines[0]} is so many times as fast as {result.engines[1]}")
    axes.set_title(
        f"{result.shape}, {result.dtype}; geometric mean {result.geometric_mean(result.ratio):.2f}"
    )
    save(picture, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.split("\n")[0])
    parser.add_argument("--peer", choices=["vllm", "transformers"], required=True)
    parser.add_argument(
        "--peer-python", default=sys.executable, help="interpreter that has the peer installed"
    )
    parser.add_argument("--alone", action="store_true", help="measure the peer without jaxllm beside it")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-135m")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--row", type=parse_workload, action="append", help="16x512->32/448; may be repeated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--max-num-batched-tokens", type=int, help="of both engines; default: what each chooses"
    )
    parser.add_argument("--checkpoint", type=Path, help="keep the random checkpoint here and use it again")
    parser.add_argument("--logs", type=Path, help="directory for what the engines print")
    add_output_arguments(parser)
    options = parser.parse_args(arguments)
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    if options.plot and options.alone:
        parser.error("--plot shows ratios, and there are none with --alone")

    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxllm-compare-")))
        checkpoint = options.checkpoint or scratch / "checkpoint"
        if not (checkpoint / "model.safetensors.index.json").exists():
            print(f"writing random weights to {checkpoint}", flush=True)
            write_checkpoint(options.shape, checkpoint, dtype=options.dtype)
        logs = options.logs or scratch
        logs.mkdir(parents=True, exist_ok=True)
        names = [] if options.alone else [("jaxllm", sys.executable)]
        names.append((options.peer, options.peer_python))
        peers = [stack.enter_context(Peer(name, python, logs / f"{name}.log")) for name, python in names]
        workloads = options.row or STANDARD
        result = compare(
            peers,
            checkpoint,
            options.shape,
            options.dtype,
            workloads,
            options.repeats,
            options.seed,
            options.max_num_batched_tokens,
        )
    print_comparison(result)
    write_json(options.json, result)
    if options.plot:
        draw(result, options.plot)


if __name__ == "__main__":
    main()

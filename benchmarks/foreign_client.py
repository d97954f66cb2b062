"""vLLM's own client (`vllm bench serve`) against our server and against vLLM's, under the same load.

    python -m benchmarks.foreign_client --peer-python /path/to/vllm/venv/bin/python
    python -m benchmarks.foreign_client --peer-python ... --load 1.5 2.5:0.25 inf --repeats 3

Another project's client decides here what a request is, when it is sent and what counts as its first token:
what it prints of our server, any user of vLLM can print. A load is requests a second, with the client's
burstiness behind a colon: 1 is Poisson arrivals, less comes in bursts, more is more even; inf is all at once.
The servers take turns under every load, and whoever waits is stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import write_checkpoint
from benchmarks.peers import ENVIRONMENTS, ROOT
from benchmarks.report import add_output_arguments, print_table, write_json
from benchmarks.servers import Server, start_servers
from benchmarks.shapes import SHAPES

# The command of a build for CPUs does not find its own version; its module runs all the same.
CLIENT = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


# Requests of the first run, of which nothing is kept.
_WARM_UP = 8


@dataclass(frozen=True, slots=True)
class Load:
    """When requests are sent.

    Attributes:
        rate: requests a second; infinite is all at once.
        burstiness: shape of the gamma distribution of the times between them.
    """

    rate: float
    burstiness: float = 1.0

    @staticmethod
    def parse(text: str) -> Load:
        """A load as it is written: `RATE` or `RATE:BURSTINESS`."""
        rate, colon, burstiness = text.partition(":")
        try:
            load = Load(float(rate), float(burstiness) if colon else 1.0)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no load; write 2.5, 2.5:0.25 or inf") from None
        if not load.rate > 0 or not 0 < load.burstiness < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r}: rate and burstiness must be above 0")
        if load.rate == math.inf and colon:
            raise argparse.ArgumentTypeError(f"{text!r}: all at once is one burst; write inf")
        return load

    def __str__(self) -> str:
        if self.rate == math.inf:
            return "all at once"
        return f"{self.rate:g}/s" + ("" if self.burstiness == 1 else f", burstiness {self.burstiness:g}")


@dataclass(frozen=True, slots=True)
class Run:
    """What the client reports of one server under one load; times in milliseconds."""

    server: str
    load: str
    completed: int
    failed: int
    output_throughput: float
    median_ttft_ms: float
    p99_ttft_ms: float
    median_tpot_ms: float
    p99_tpot_ms: float


@dataclass(frozen=True, slots=True)
class Ratio:
    """Ours over theirs under one load, above 1 where ours is better: the median of the turns.

    Attributes:
        spread: lowest and highest throughput ratio of a turn.
    """

    load: str
    throughput: float
    spread: tuple[float, float]
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float


def ratios_of(runs: Sequence[Run]) -> list[Ratio]:
    """What the turns of two servers under the same loads come to.

    Args:
        runs: of ours and of theirs in turn, each pair under one load.
    """
    pairs: dict[str, list[tuple[Run, Run]]] = {}
    for ours, theirs in zip(runs[::2], runs[1::2], strict=True):
        if ours.load != theirs.load or ours.server == theirs.server:
            raise ValueError(f"{ours} and {theirs} are no turn of two servers under one load")
        pairs.setdefault(ours.load, []).append((ours, theirs))
    ratios = []
    for load, turns in pairs.items():
        throughputs = [ours.output_throughput / theirs.output_throughput for ours, theirs in turns]
        times = (
            statistics.median(getattr(theirs, name) / getattr(ours, name) for ours, theirs in turns)
            for name in ("median_ttft_ms", "p99_ttft_ms", "median_tpot_ms", "p99_tpot_ms")
        )
        spread = (min(throughputs), max(throughputs))
        ratios.append(Ratio(load, statistics.median(throughputs), spread, *times))
    return ratios


def drive(
    python: str, server: Server, model: Path, load: Load, num_requests: int, options: argparse.Namespace
) -> Run:
    """Has the client load a server.

    Raises:
        RuntimeError: the client failed, with the end of what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="jaxllm-client-") as scratch:
        flags: dict[str, object] = {
            "backend": "openai",
            "base-url": server.url,
            "endpoint": "/v1/completions",
            "model": "served",
            "tokenizer": model,
            "dataset-name": "random",
            "random-input-len": options.input_len,
            "random-output-len": options.output_len,
            "num-prompts": num_requests,
            "request-rate": load.rate,
            "burstiness": load.burstiness,
            "seed": options.seed,
            "percentile-metrics": "ttft,tpot",
            "metric-percentiles": "99",
            "result-dir": scratch,
            "result-filename": "result.json",
        }
        command = [python, "-c", CLIENT, "--save-result", "--ignore-eos", "--disable-tqdm"]
        command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        environment = {**ENVIRONMENTS["vllm"], **os.environ}
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False
        )
        result = Path(scratch) / "result.json"
        if done.returncode or not result.exists():
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise RuntimeError(f"vLLM's client failed against {server.name}:\n{tail}")
        fields: dict[str, Any] = json.loads(result.read_text())
    reported = {name: fields[name] for name in Run.__slots__ if name in fields}
    return Run(server=server.name, load=str(load), **reported)


def print_runs(runs: Sequence[Run]) -> None:
    columns = ["load", "server", "tok/s", "TTFT p50", "p99", "TPOT p50", "p99", "completed", "failed"]
    rows: list[list[object]] = [
        [
            run.load,
            run.server,
            f"{run.output_throughput:.1f}",
            f"{run.median_ttft_ms:.0f}",
            f"{run.p99_ttft_ms:.0f}",
            f"{run.median_tpot_ms:.0f}",
            f"{run.p99_tpot_ms:.0f}",
            run.completed,
            run.failed,
        ]
        for run in runs
    ]
    print_table("as vLLM's client sees it, times in ms", columns, rows)


def print_ratios(ratios: Sequence[Ratio]) -> None:
    columns = ["load", "throughput", "lowest", "highest", "TTFT p50", "p99", "TPOT p50", "p99"]
    rows: list[list[object]] = [
        [
            ratio.load,
            *(f"{value:.2f}" for value in (ratio.throughput, *ratio.spread)),
            *(f"{v:.2f}" for v in (ratio.ttft_p50, ratio.ttft_p99, ratio.tpot_p50, ratio.tpot_p99)),
        ]
        for ratio in ratios
    ]
    print_table("jaxllm over vllm (above 1: jaxllm is better)", columns, rows, note="medians of the turns")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.foreign_client", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--peer-python", required=True, help="interpreter that has vLLM")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-135m")
    parser.add_argument(
        "--load",
        type=Load.parse,
        nargs="+",
        default=[Load(1.5), Load(1.5, 0.25), Load(math.inf)],
        metavar="RATE[:BURSTINESS]",
        help="requests a second; inf is all at once (default: 1.5 1.5:0.25 inf)",
    )
    parser.add_argument("--num-requests", type=int, default=60, help="of each run")
    parser.add_argument("--repeats", type=int, default=1, help="turns that the servers take under each load")
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logs", type=Path, help="directory for what the servers print")
    add_output_arguments(parser, plot=False)
    options = parser.parse_args(arguments)
    for name in ("repeats", "num_requests"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")

    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxllm-foreign-")))
        model = write_checkpoint(options.shape, scratch / options.shape)
        flags = ["--served-model-name", "served", "--dtype", "float32", "--max-model-len", "2048"]
        flags += ["--max-num-seqs", str(options.max_num_seqs)]
        servers: list[Server] = []
        for server in start_servers(stack, str(model), options.logs or scratch, flags, options.peer_python):
            servers.append(server)
            drive(options.peer_python, server, model, Load(math.inf), _WARM_UP, options)
        runs: list[Run] = []
        for load in [load for load in options.load for _ in range(options.repeats)]:
            for server in servers:
                server.resume()
                runs.append(drive(options.peer_python, server, model, load, options.num_requests, options))
                server.pause()
    print_runs(runs)
    ratios = ratios_of(runs)
    print_ratios(ratios)
    write_json(options.json, {"runs": runs, "ratios": ratios})


if __name__ == "__main__":
    main()

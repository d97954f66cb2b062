"""vLLM's own client (`vllm bench serve`) against our server and against vLLM's, under the same load.

    python -m benchmarks.foreign_client --peer-python /path/to/vllm/venv/bin/python --rate 1.5 2.5

Another project's client decides here what a request is, when it is sent and what counts as its first token:
what it prints of our server, any user of vLLM can print. The servers take turns; whoever waits is stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
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


@dataclass(frozen=True, slots=True)
class Run:
    """What the client reports of one server at one rate; times in milliseconds."""

    server: str
    rate: float
    completed: int
    failed: int
    output_throughput: float
    median_ttft_ms: float
    p99_ttft_ms: float
    median_tpot_ms: float
    p99_tpot_ms: float


def drive(python: str, server: Server, model: Path, rate: float, options: argparse.Namespace) -> Run:
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
            "num-prompts": options.num_requests,
            "request-rate": rate,
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
    return Run(server=server.name, rate=rate, **reported)


def print_runs(runs: list[Run]) -> None:
    columns = ["a second", "server", "tok/s", "TTFT p50", "p99", "TPOT p50", "p99", "failed"]
    rows: list[list[object]] = [
        [
            run.rate,
            run.server,
            f"{run.output_throughput:.1f}",
            f"{run.median_ttft_ms:.0f}",
            f"{run.p99_ttft_ms:.0f}",
            f"{run.median_tpot_ms:.0f}",
            f"{run.p99_tpot_ms:.0f}",
            run.failed,
        ]
        for run in runs
    ]
    print_table("as vLLM's client sees it, times in ms", columns, rows)
    ratios: list[list[object]] = [
        [
            ours.rate,
            f"{ours.output_throughput / theirs.output_throughput:.2f}",
            f"{theirs.p99_ttft_ms / ours.p99_ttft_ms:.2f}",
            f"{theirs.p99_tpot_ms / ours.p99_tpot_ms:.2f}",
        ]
        for ours, theirs in zip(runs[::2], runs[1::2], strict=True)
    ]
    columns = ["a second", "throughput", "TTFT p99", "TPOT p99"]
    print_table("jaxllm over vllm (above 1: jaxllm is better)", columns, ratios)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.foreign_client", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--peer-python", required=True, help="interpreter that has vLLM")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="llama-135m")
    parser.add_argument("--rate", type=float, nargs="+", default=[1.5], help="requests a second")
    parser.add_argument("--num-requests", type=int, default=60)
    parser.add_argument("--input-len", type=int, default=128)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--logs", type=Path, help="directory for what the servers print")
    add_output_arguments(parser, plot=False)
    options = parser.parse_args(arguments)

    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxllm-foreign-")))
        model = write_checkpoint(options.shape, scratch / options.shape)
        flags = ["--served-model-name", "served", "--dtype", "float32", "--max-model-len", "2048"]
        flags += ["--max-num-seqs", str(options.max_num_seqs)]
        servers: list[Server] = []
        for server in start_servers(stack, str(model), options.logs or scratch, flags, options.peer_python):
            servers.append(server)
            drive(options.peer_python, server, model, options.rate[0], options)  # warms up
        runs: list[Run] = []
        for rate in options.rate:
            for server in servers:
                server.resume()
                runs.append(drive(options.peer_python, server, model, rate, options))
                server.pause()
    print_runs(runs)
    write_json(options.json, runs)


if __name__ == "__main__":
    main()

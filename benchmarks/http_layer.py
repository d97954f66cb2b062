"""The HTTP layer alone: how many streamed tokens a second it carries, and how late it makes them.

    python -m benchmarks.http_layer
    python -m benchmarks.http_layer --tokens 1000 3000 6000 12000 --json http.json --plot http.png

The server is a process of its own, all of it real but the engine, which is a clock (`steady_engine`): it has
a token for every stream at once, as a batch has. The client, in this process, does nothing but read. The gap
of a token is from the moment at which the engine had it to the one at which its bytes were read from the
socket. Goal: 3,000 tokens a second over 256 connections with a gap under 20 ms at the 99th percentile, on two
cores.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import selectors
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import cpu_name
from benchmarks.peers import ROOT, EngineProcess
from benchmarks.report import add_output_arguments, figure, print_table, save, write_json
from benchmarks.servers import free_port
from jaxllm.scheduling.simulator.metrics import Percentiles

GOAL_TOKENS, GOAL_GAP = 3000, 0.020

_STAMP = re.compile(rb"@(\d+)@")
_ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}),
    "completions": ("/v1/completions", {"prompt": "Hello"}),
}


@dataclass(frozen=True, slots=True)
class Flow:
    """One rate on one server. Seconds.

    Attributes:
        offered: tokens a second that the engine was to have.
        delivered: that the client read.
        gap: from the engine to the client.
        worst_gap: of all tokens.
        cpu_per_token: processor time of the server.
    """

    offered: float
    delivered: float
    gap: Percentiles
    worst_gap: float
    cpu_per_token: float

    @property
    def meets_goal(self) -> bool:
        return self.delivered >= 0.99 * GOAL_TOKENS and self.gap.p99 < GOAL_GAP


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that one run of this benchmark measured."""

    machine: str
    cores: int
    route: str
    connections: int
    seconds: float
    flows: list[Flow]


class Server(EngineProcess):
    """A server around a `SteadyEngine`."""

    def __init__(self, steps_a_second: float, log: Path) -> None:
        self.port = free_port()
        where = ["--host", "127.0.0.1", "--port", str(self.port)]
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.steady_engine", str(steps_a_second), *where],
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        super().__init__(process)
        began = time.monotonic()
        while not self._listens():
            if process.poll() is not None or time.monotonic() - began > 60:
                self.close()
                raise RuntimeError(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.05)

    def _listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def cpu_seconds(self) -> float:
        """Processor time that it has used so far."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Streams:
    """Streams that one thread reads as fast as they come."""

    def __init__(self, port: int, connections: int, route: str) -> None:
        path, fields = _ROUTES[route]
        body = json.dumps({**fields, "max_tokens": 1 << 19, "ignore_eos": True, "stream": True}).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        self._selector = selectors.DefaultSelector()
        self._rest: dict[int, bytes] = {}
        self._sockets = []
        for _ in range(connections):
            one = socket.create_connection(("127.0.0.1", port))
            one.sendall(head.encode() + body)
            one.setblocking(False)
            self._selector.register(one, selectors.EVENT_READ)
            self._rest[one.fileno()] = b""
            self._sockets.append(one)

    def read(self, seconds: float) -> Iterator[tuple[int, float]]:
        """Stream and gap of every token that comes within a time.

        Raises:
            RuntimeError: the server ended a stream.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                data = key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
                now = time.monotonic_ns()
                if not data:
                    raise RuntimeError(f"the server ended a stream after {self._rest[key.fd]!r}")
                whole, mark, rest = (self._rest[key.fd] + data).rpartition(b"\n\n")
                self._rest[key.fd] = rest
                for stamp in _STAMP.findall(whole + mark):
                    yield key.fd, (now - int(stamp)) / 1e9

    def wait(self, seconds: float) -> None:
        """Read until every stream has had a token.

        Raises:
            RuntimeError: one has had none in time.
        """
        silent = set(self._rest)
        for stream, _ in self.read(seconds):
            silent.discard(stream)
            if not silent:
                return
        raise RuntimeError(f"{len(silent)} of {len(self._rest)} streams had no token within {seconds} s")

    def close(self) -> None:
        self._selector.close()
        for one in self._sockets:
            one.close()


@contextmanager
def streams(port: int, connections: int, route: str) -> Iterator[Streams]:
    """Open streams, closed in the end."""
    opened = Streams(port, connections, route)
    try:
        yield opened
    finally:
        opened.close()


def measure(tokens: float, connections: int, route: str, seconds: float, log: Path) -> Flow:
    """One rate, on a server of its own."""
    with Server(tokens / connections, log) as server, streams(server.port, connections, route) as opened:
        opened.wait(60)
        for _ in opened.read(1.0):
            pass  # All have begun; nothing of the beginning is counted.
        cpu, began = server.cpu_seconds(), time.monotonic()
        gaps = [gap for _, gap in opened.read(seconds)]
        elapsed = time.monotonic() - began
        cpu = server.cpu_seconds() - cpu
    return Flow(
        offered=tokens,
        delivered=len(gaps) / elapsed,
        gap=Percentiles.of(gaps),
        worst_gap=max(gaps),
        cpu_per_token=cpu / len(gaps),
    )


def draw(results: Results, path: Path) -> None:
    """The gap over the rate, and where the goal is."""
    picture, axes = figure()
    offered = [flow.offered for flow in results.flows]
    axes.plot(offered, [flow.gap.p50 * 1e3 for flow in results.flows], marker="o", label="median")
    axes.plot(offered, [flow.gap.p99 * 1e3 for flow in results.flows], marker="o", label="99th percentile")
    axes.plot([GOAL_TOKENS], [GOAL_GAP * 1e3], "v", color="black", label="goal: below, at this rate or more")
    axes.set_xlabel(f"tokens a second over {results.connections} connections")
    axes.set_ylabel("ms from the engine to the client")
    axes.set_ylim(bottom=0)
    axes.legend()
    save(picture, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.http_layer", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--connections", type=int, default=256)
    parser.add_argument(
        "--tokens", type=float, nargs="+", default=[1500, 3000, 6000], help="a second, in all"
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="that each rate is measured for")
    parser.add_argument("--route", choices=sorted(_ROUTES), default="chat")
    add_output_arguments(parser)
    options = parser.parse_args(arguments)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxllm-http-")))
        at = (options.connections, options.route, options.seconds, scratch / "server.log")
        flows = [measure(tokens, *at) for tokens in options.tokens]
    cores = len(os.sched_getaffinity(0))
    results = Results(cpu_name(), cores, options.route, options.connections, options.seconds, flows)
    rows: list[list[object]] = [
        [
            f"{flow.offered:,.0f}",
            f"{flow.delivered:,.0f}",
            *(f"{gap * 1e3:.1f}" for gap in (flow.gap.p50, flow.gap.p99, flow.worst_gap)),
            f"{flow.cpu_per_token * 1e6:.0f}",
            "yes" if flow.meets_goal else "no",
        ]
        for flow in flows
    ]
    columns = ["tokens/s", "delivered", "gap p50 ms", "p99", "worst", "CPU µs a token", "meets the goal"]
    title = f"{options.connections} streams of {_ROUTES[options.route][0]}, {results.machine}, {cores} cores"
    note = f"goal: {GOAL_TOKENS:,} tokens/s or more, p99 under {GOAL_GAP * 1e3:.0f} ms"
    print_table(title, columns, rows, note=note)
    write_json(options.json, results)
    if options.plot:
        draw(results, options.plot)


if __name__ == "__main__":
    main()

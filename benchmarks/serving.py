"""An OpenAI server under open-loop load: throughput, goodput, and how long users wait.

    python -m benchmarks.serving --shape llama-135m --workload poisson bursty chat --rate 1 2 4
    python -m benchmarks.serving --base-url http://localhost:8000 --model NAME --rate 10
    python -m benchmarks.serving --shape llama-135m --peer-python /path/to/vllm/venv/bin/python --rate 2

Requests come when the trace says, whether or not earlier ones have been answered, and stream; the workloads
are those of `jaxllm.simulate`, their lengths scaled to the machine. A request's first token is counted from
the moment at which it should have been sent. Goodput is of the requests that met both objectives (Zhong et
al., DistServe, 2024). With a peer, both servers get the same traces, one after the other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import httpx
from tqdm import tqdm

from benchmarks.checkpoint import write_checkpoint
from benchmarks.report import add_output_arguments, figure, print_table, save, write_json
from benchmarks.servers import Server, start_servers
from benchmarks.shapes import SHAPES
from benchmarks.workloads import scaled_trace
from jaxllm.scheduling.simulator import WORKLOADS, TracedRequest
from jaxllm.scheduling.simulator.metrics import Percentiles


@dataclass(slots=True)
class Answer:
    """One request as its client saw it.

    Attributes:
        sent: seconds after its arrival time that it left.
        token_times: seconds after its arrival time, of every piece of the stream that held tokens.
        num_tokens: generated, as the server counts them.
        error: why it failed; None where it did not.
    """

    sent: float
    token_times: list[float] = field(default_factory=list)
    num_tokens: int = 0
    error: str | None = None

    @property
    def ttft(self) -> float:
        return self.token_times[0]

    @property
    def tpot(self) -> float | None:
        steps = self.num_tokens - 1
        return (self.token_times[-1] - self.token_times[0]) / steps if steps > 0 else None

    def meets(self, ttft: float, tpot: float) -> bool:
        """Whether it was answered within both objectives."""
        if self.error is not None or not self.token_times:
            return False
        return self.ttft <= ttft and (self.tpot is None or self.tpot <= tpot)


@dataclass(frozen=True, slots=True)
class Load:
    """One trace on one server, in numbers; seconds.

    Attributes:
        goodput: requests a second that met their objectives.
        gap: between one piece of a stream and the next.
        num_late: requests that the client itself sent more than 50 ms late, as if it were overloaded.
    """

    server: str
    workload: str
    rate: float
    num_requests: int
    num_failed: int
    num_late: int
    seconds: float
    output_tokens_per_second: float
    goodput: float
    ttft: Percentiles
    tpot: Percentiles
    gap: Percentiles
    answers: list[Answer]


async def ask(
    client: httpx.AsyncClient, model: str, traced: TracedRequest, vocab_size: int, start: float
) -> Answer:
    """Sends one request when its time has come, and reads its stream to the end."""
    due = start + traced.arrival_time
    await asyncio.sleep(max(0.0, due - time.perf_counter()))
    answer = Answer(time.perf_counter() - due)
    body = {
        "model": model,
        "prompt": [token % vocab_size for token in traced.prompt_token_ids()],
        "max_tokens": traced.output_len,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
    }
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                answer.error = f"{response.status_code}: {response.text[:200]}"
                return answer
            async for line in response.aiter_lines():
                _read_line(answer, line, time.perf_counter() - due)
    except httpx.HTTPError as error:
        answer.error = repr(error)
    if answer.error is None and answer.num_tokens != traced.output_len:
        answer.error = f"{answer.num_tokens} tokens came, not {traced.output_len}"
    return answer


def _read_line(answer: Answer, line: str, now: float) -> None:
    """One line of the stream of events."""
    if not line.startswith("data: ") or line == "data: [DONE]":
        return
    event = json.loads(line.removeprefix("data: "))
    if "error" in event:
        answer.error = str(event["error"])[:200]
    elif any(choice.get("token_ids") or choice.get("text") for choice in event["choices"]):
        answer.token_times.append(now)
    if event.get("usage"):
        answer.num_tokens = event["usage"]["completion_tokens"]


async def send_all(
    url: str, model: str, trace: Sequence[TracedRequest], vocab_size: int, api_key: str | None
) -> tuple[list[Answer], float]:
    """All requests of a trace, and the seconds from its start to the last answer."""
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, limits=limits, timeout=None) as client:
        start = time.perf_counter() + 0.1
        tasks = [asyncio.create_task(ask(client, model, traced, vocab_size, start)) for traced in trace]
        with tqdm(total=len(tasks), desc="Answered", unit="request", leave=False) as bar:
            for task in tasks:
                task.add_done_callback(lambda _: bar.update())
            answers = await asyncio.gather(*tasks)
        return answers, time.perf_counter() - start


def load_of(
    server: str,
    workload: str,
    rate: float,
    answers: list[Answer],
    seconds: float,
    objectives: tuple[float, float],
) -> Load:
    """The numbers of a trace that has been answered."""
    answered = [answer for answer in answers if answer.error is None]
    return Load(
        server=server,
        workload=workload,
        rate=rate,
        num_requests=len(answers),
        num_failed=len(answers) - len(answered),
        num_late=sum(answer.sent > 0.05 for answer in answers),
        seconds=seconds,
        output_tokens_per_second=sum(answer.num_tokens for answer in answered) / seconds,
        goodput=sum(answer.meets(*objectives) for answer in answers) / seconds,
        ttft=Percentiles.of([answer.ttft for answer in answered]),
        tpot=Percentiles.of([answer.tpot for answer in answered if answer.tpot is not None]),
        gap=Percentiles.of([b - a for answer in answered for a, b in pairwise(answer.token_times)]),
        answers=answers,
    )


def measure(
    url: str,
    server: str,
    model: str,
    vocab_size: int,
    options: argparse.Namespace,
    workload: str,
    rate: float,
) -> Load:
    """One trace on one server."""
    trace = scaled_trace(
        workload,
        rate=rate,
        num_requests=options.num_requests,
        scale=options.scale,
        longest=options.max_model_len,
        seed=options.seed,
    )
    answers, seconds = asyncio.run(send_all(url, model, trace, vocab_size, options.api_key))
    load = load_of(server, workload, rate, answers, seconds, (options.ttft, options.tpot))
    for answer in answers:
        if answer.error is not None:
            print(f"{server}, {workload}: a request failed: {answer.error}", flush=True)
            break
    return load


def print_loads(loads: list[Load], options: argparse.Namespace) -> None:
    columns = [
        "workload",
        "a second",
        "server",
        "tok/s",
        "goodput",
        "TTFT p50",
        "p99",
        "TPOT p50",
        "p99",
        "gap p99",
    ]
    columns += ["failed", "late"]
    rows: list[list[object]] = [
        [
            load.workload,
            load.rate,
            load.server,
            f"{load.output_tokens_per_second:,.1f}",
            f"{load.goodput:.2f}",
            *(
                f"{x * 1e3:,.0f}"
                for x in (load.ttft.p50, load.ttft.p99, load.tpot.p50, load.tpot.p99, load.gap.p99)
            ),
            load.num_failed,
            load.num_late,
        ]
        for load in loads
    ]
    note = f"times in ms; goodput in requests a second within {options.ttft} s and {options.tpot} s a token"
    print_table("open-loop load", columns, rows, note=note)


def print_ratios(loads: list[Load]) -> None:
    """jaxllm over its peer, row by row: above 1 is better."""
    rows: list[list[object]] = []
    for ours, theirs in zip(loads[::2], loads[1::2], strict=True):
        rows.append(
            [
                ours.workload,
                ours.rate,
                f"{ours.output_tokens_per_second / theirs.output_tokens_per_second:.2f}",
                f"{theirs.ttft.p99 / ours.ttft.p99:.2f}",
                f"{theirs.tpot.p99 / ours.tpot.p99:.2f}",
            ]
        )
    columns = ["workload", "a second", "throughput", "TTFT p99", "TPOT p99"]
    print_table("jaxllm over vllm (above 1: jaxllm is better)", columns, rows)


def draw(loads: list[Load], path: Path) -> None:
    """How many users wait how long for their first token, per server and rate of the first workload."""
    picture, axes = figure()
    for load in (load for load in loads if load.workload == loads[0].workload):
        ttft = sorted(answer.ttft for answer in load.answers if answer.error is None)
        share = [(i + 1) / load.num_requests for i in range(len(ttft))]
        axes.step(ttft, share, where="post", label=f"{load.server}, {load.rate:g} a second")
    axes.set_xscale("log")
    axes.set_xlabel("seconds to the first token")
    axes.set_ylabel("share of the requests")
    axes.set_title(loads[0].workload)
    axes.legend()
    save(picture, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.serving", description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--base-url", help="a server that runs already")
    which.add_argument("--shape", choices=sorted(SHAPES), help="a public shape with random weights")
    parser.add_argument("--model", default="demo", help="directory or hub name; the name at a running server")
    parser.add_argument("--vocab-size", type=int, default=1000, help="of the model at a running server")
    parser.add_argument("--api-key", help="of a running server")
    parser.add_argument("--peer-python", help="interpreter that has vLLM: it gets the same load")
    parser.add_argument("--workload", choices=sorted(WORKLOADS), nargs="+", default=["poisson"])
    parser.add_argument("--rate", type=float, nargs="+", default=[2.0], help="requests a second")
    parser.add_argument("--num-requests", type=int, default=60)
    parser.add_argument("--scale", type=float, default=0.125, help="of the workloads' lengths")
    parser.add_argument("--max-model-len", type=int, default=512)
    parser.add_argument("--max-num-seqs", type=int, default=32)
    parser.add_argument("--ttft", type=float, default=1.0, help="objective, in seconds")
    parser.add_argument("--tpot", type=float, default=0.2, help="objective, in seconds a token")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--logs", type=Path, help="directory for what the servers print")
    add_output_arguments(parser)
    options = parser.parse_args(arguments)
    if options.peer_python and options.base_url:
        parser.error("--peer-python compares servers that are started here; leave out --base-url")

    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxllm-serving-")))
        loads: list[Load] = []
        points = [(workload, rate) for workload in options.workload for rate in options.rate]
        if options.base_url:
            for workload, rate in points:
                at = (options.base_url, "server", options.model, options.vocab_size, options)
                loads.append(measure(*at, workload, rate))
        else:
            model, vocab_size = options.model, options.vocab_size
            if options.shape:
                model = str(write_checkpoint(options.shape, scratch / options.shape))
                vocab_size = SHAPES[options.shape]["vocab_size"]
            flags = ["--served-model-name", "served", "--max-model-len", str(options.max_model_len)]
            flags += ["--max-num-seqs", str(options.max_num_seqs), "--dtype", "float32"]
            servers: list[Server] = []
            for server in start_servers(stack, model, options.logs or scratch, flags, options.peer_python):
                servers.append(server)
                warm_up = (server.url, server.name, "served", vocab_size, options)
                measure(*warm_up, options.workload[0], options.rate[0])
            for workload, rate in points:
                for server in servers:
                    server.resume()
                    at = (server.url, server.name, "served", vocab_size, options)
                    loads.append(measure(*at, workload, rate))
                    server.pause()
    print_loads(loads, options)
    if options.peer_python:
        print_ratios(loads)
    write_json(options.json, loads)
    if options.plot:
        draw(loads, options.plot)


if __name__ == "__main__":
    main()

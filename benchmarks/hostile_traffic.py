"""Ten minutes of the worst clients there are, beside good ones: what the server loses by them.

    python -m benchmarks.hostile_traffic
    python -m benchmarks.hostile_traffic --minutes 1 --json hostile.json --plot hostile.png

The demo model is served by a process of its own. Good clients stream and compare what they get with what they
got before; the others (`hostile_clients`) hang up, send garbage, half-close, trickle bytes, never read, send
bodies without end, and open 2,000 connections. In the end the server must hold no more pages, asyncio tasks
and files than when it was warm, its memory must have ceased to grow, and the same request must have the same
answer. Exits with 1 where something is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.hostile_clients import HOSTILE, Target, crowd
from benchmarks.report import add_output_arguments, print_table, save, write_json
from benchmarks.servers import Server

MODEL = "jaxllm-demo"
# All steps are compiled before the first request: what compiles later takes memory that no client took.
FLAGS = ["--forbid-recompile", "--enable-dev-routes", "--request-timeout", "5", "--write-timeout", "5"]
FLAGS += ["--max-model-len", "1k", "--max-num-seqs", "16", "--max-sequences-per-request", "64"]
FLAGS += ["--disable-uvicorn-access-log"]

# Memory may grow by this much a minute in the second half of the time: less is noise of the allocator.
MAX_GROWTH = 4.0  # MiB
# Tasks and files that come and go with the client that asks for them.
SLACK = 4


@dataclass(frozen=True, slots=True)
class Sample:
    """What the server holds at one moment. Seconds, MiB.

    Attributes:
        at: since the start.
        latency: that the answer to this very question took.
        pages: of the KV cache, held by requests.
        tasks: of asyncio.
    """

    at: float
    latency: float
    memory: float
    files: int
    tasks: int
    pages: int
    requests: int


@dataclass(slots=True)
class Results:
    """Everything that one run of this benchmark measured.

    Attributes:
        growth: of memory in the second half of the time, MiB a minute.
        deeds: how often each client came.
        wrong: what good clients got that they should not have.
        leaks: what is left; empty is good.
    """

    minutes: float
    warm: Sample
    end: Sample
    growth: float
    deeds: dict[str, int]
    wrong: list[str]
    leaks: list[str]
    samples: list[Sample] = field(default_factory=list)


class Watcher:
    """Asks a server what it holds.

    Args:
        url: of a server with `--enable-dev-routes`.
    """

    def __init__(self, url: str) -> None:
        self._client = httpx.AsyncClient(base_url=url, timeout=60)
        self._start = time.monotonic()

    async def sample(self) -> Sample:
        began = time.monotonic()
        text = (await self._client.get("/metrics")).text
        latency = time.monotonic() - began
        values = {}
        num_pages = 0
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                values[sample.name] = sample.value
                num_pages = int(sample.labels.get("num_gpu_blocks", num_pages))
        state = (await self._client.get("/server_info")).json()["state"]
        return Sample(
            at=began - self._start,
            latency=latency,
            memory=values["process_resident_memory_bytes"] / 2**20,
            files=int(values["process_open_fds"]),
            tasks=state["asyncio_tasks"],
            pages=round(values["jaxllm:kv_cache_usage_perc"] * num_pages),
            requests=state["unfinished_sequences"],
        )

    async def settled(self, like: Sample | None, seconds: float) -> Sample:
        """A sample once the server holds no more than `like` (nothing, where None), or time is up."""
        deadline = time.monotonic() + seconds
        while True:
            now = await self.sample()
            calm = now.pages == now.requests == 0
            if like is not None:
                calm = calm and now.files <= like.files + SLACK and now.tasks <= like.tasks + SLACK
            if calm or time.monotonic() > deadline:
                return now
            await asyncio.sleep(0.25)

    async def close(self) -> None:
        await self._client.aclose()


QUESTIONS: list[dict[str, object]] = [
    {"prompt": prompt, "max_tokens": length, "temperature": temperature, "seed": 7}
    for prompt in ("The capital of France is", "One, two, three,", "x = 2\ny = 3\nprint(x + y) #")
    for length, temperature in ((4, 0.0), (40, 0.0), (24, 1.0))
]


async def answer(client: httpx.AsyncClient, model: str, question: dict[str, object]) -> str:
    """What a good client reads, stream and all."""
    body = {"model": model, **question, "stream": True}
    text = ""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        async for line in response.aiter_lines():
            if response.status_code != 200 or '"error"' in line:
                return f"{response.status_code}: {line[:200]}"
            if line.startswith("data: {"):
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return text


async def forever(deed: Callable[[], Awaitable[None]], pause: float, done: Counter[str], name: str) -> None:
    """Do it again and again; what the server makes of it does not matter."""
    while True:
        done[name] += 1
        try:
            await deed()
        except (OSError, EOFError, httpx.HTTPError, TimeoutError):
            done[f"{name}: cut off"] += 1
        await asyncio.sleep(pause)


async def all_cancelled(tasks: set[asyncio.Task[None]]) -> None:
    """End tasks for good: before Python 3.12, `asyncio.wait_for` may swallow what cancels it."""
    while tasks:
        for task in tasks:
            task.cancel()
        tasks = (await asyncio.wait(tasks, timeout=1.0))[1]


async def attack(target: Target, seconds: float, connections: int, scale: int) -> Results:
    """Good and bad clients for some time, then the reckoning."""
    url, model = target.url, target.model
    watcher = Watcher(url)
    done: Counter[str] = Counter()
    wrong: list[str] = []
    limits = httpx.Limits(max_connections=64, max_keepalive_connections=8)
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=300) as client:
        expected = [await answer(client, model, question) for question in QUESTIONS]

        async def ask() -> None:
            i = target.random.randrange(len(QUESTIONS))
            got = await answer(client, model, QUESTIONS[i])
            if got != expected[i]:
                wrong.append(f"{got!r}, not {expected[i]!r}")

        # Every kind of client once, so that nothing is first loaded or allocated later on.
        each = [asyncio.wait_for(deed(target), 60) for deed in HOSTILE.values()]
        await asyncio.gather(*each, crowd(target, connections, 1.0), return_exceptions=True)
        warm = await watcher.settled(None, 30)
        clients = [asyncio.create_task(forever(ask, 0.1, done, "good")) for _ in range(4 * scale)]
        for name, deed in HOSTILE.items():
            for _ in range(scale):
                again = (lambda d: lambda: d(target))(deed)
                clients.append(asyncio.create_task(forever(again, 0.2, done, name)))
        many = min(30.0, seconds / 3)
        crowding = forever(lambda: crowd(target, connections, many / 2), many / 2, done, "crowd")
        clients.append(asyncio.create_task(crowding))
        samples = []
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            samples.append(await watcher.sample())
            await asyncio.sleep(min(1.0, seconds / 20))
        await all_cancelled(set(clients))
        end = await watcher.settled(warm, 30)
        for question, before in zip(QUESTIONS, expected, strict=True):
            if (now := await answer(client, model, question)) != before:
                wrong.append(f"in the end {now!r}, not {before!r}")
    await watcher.close()
    growth = growth_of(samples[len(samples) // 2 :])
    leaks = leaks_of(warm, end, growth if seconds >= 60 else 0.0)
    return Results(seconds / 60, warm, end, growth, dict(sorted(done.items())), wrong, leaks, samples)


def growth_of(samples: list[Sample]) -> float:
    """MiB a minute, by least squares."""
    if len(samples) < 3:
        return 0.0
    minutes = np.array([sample.at for sample in samples]) / 60
    return float(np.polyfit(minutes, [sample.memory for sample in samples], 1)[0])


def leaks_of(warm: Sample, end: Sample, growth: float) -> list[str]:
    """What a server holds that it should not."""
    leaks = []
    if end.pages or end.requests:
        leaks.append(f"{end.pages} pages and {end.requests} sequences are held by nobody")
    if end.tasks > warm.tasks + SLACK:
        leaks.append(f"{end.tasks} tasks, where there were {warm.tasks}")
    if end.files > warm.files + SLACK:
        leaks.append(f"{end.files} files, where there were {warm.files}")
    if growth > MAX_GROWTH:
        leaks.append(f"memory grows by {growth:.1f} MiB a minute")
    return leaks


def draw(results: Results, path: Path) -> None:
    """What the server held over time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = {"files": "open files", "tasks": "asyncio tasks", "memory": "resident MiB", "pages": "pages held"}
    picture, panels = pyplot.subplots(len(names), 1, figsize=(8, 8), sharex=True, layout="constrained")
    samples = [results.warm, *results.samples, results.end]
    for axes, (name, label) in zip(panels, names.items(), strict=True):
        axes.plot([sample.at for sample in samples], [getattr(sample, name) for sample in samples])
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("seconds; first and last: at rest")
    save(picture, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.hostile_traffic", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--base-url", help="a server that runs already, with --enable-dev-routes")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--connections", type=int, default=2000, help="that the crowd opens at once")
    parser.add_argument("--scale", type=int, default=2, help="clients of each kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, help="file for what the server prints")
    add_output_arguments(parser)
    options = parser.parse_args(arguments)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(max(soft, options.connections + 512), hard), hard))
    with ExitStack() as stack:
        url = options.base_url
        if url is None:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxllm-hostile-")))
            log = options.log or scratch / "server.log"
            url = stack.enter_context(Server("jaxllm", sys.executable, "demo", log, FLAGS)).url
        seconds = options.minutes * 60
        target = Target(url, MODEL, options.seed)
        results = asyncio.run(attack(target, seconds, options.connections, options.scale))
    held = [(name, sample) for name, sample in (("warm", results.warm), ("in the end", results.end))]
    columns = ["", "memory MiB", "files", "tasks", "pages", "sequences"]
    rows: list[list[object]] = [
        [name, f"{s.memory:,.0f}", s.files, s.tasks, s.pages, s.requests] for name, s in held
    ]
    busiest = {key: max(asdict(s)[key] for s in results.samples) for key in asdict(results.warm)}
    most = [busiest["files"], busiest["tasks"], busiest["pages"], busiest["requests"]]
    rows.insert(1, ["at most", f"{busiest['memory']:,.0f}", *most])
    note = (
        f"{sum(results.deeds.values()):,} clients in {results.minutes:g} minutes; memory of the second half"
    )
    print_table("hostile traffic", columns, rows, note=f"{note}: {results.growth:+.2f} MiB a minute")
    for line in [*results.leaks, *results.wrong[:5]]:
        print(f"WRONG: {line}")
    write_json(options.json, results)
    if options.plot:
        draw(results, options.plot)
    if results.leaks or results.wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()

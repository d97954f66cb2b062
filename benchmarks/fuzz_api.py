"""Requests that nobody would write, made from the server's own OpenAPI document: none may be a 500.

    pip install ".[fuzz]" && python -m benchmarks.fuzz_api
    python -m benchmarks.fuzz_api --requests 5000 --json fuzz.json
    python -m benchmarks.fuzz_api --base-url http://localhost:8000

Schemathesis draws them, half as the document allows and half as it does not. The demo model is served by
processes of their own, once generating and once embedding, with every route that a flag can open. An answer
is wrong if its status is 500 or above, if an error is no error object, or if none comes. Exits with 1 then.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import requests
from hypothesis import HealthCheck, Phase, given, seed, settings

from benchmarks.report import add_output_arguments, print_table, write_json
from benchmarks.servers import Server

if TYPE_CHECKING:
    from schemathesis import Case

FLAGS = ["--enable-dev-routes", "--enable-tokenizer-info-endpoint", "--disable-uvicorn-access-log"]
FLAGS += ["--max-model-len", "512", "--max-num-seqs", "16"]

# Values above these would be served, and take their time.
_CAPS = {"max_tokens": 8, "max_completion_tokens": 8, "max_output_tokens": 8, "n": 2, "min_tokens": 2}
# What a request cannot do without.
_ASKED = {
    "max_tokens",
    "prompt",
    "messages",
    "input",
    "tokens",
    "query",
    "documents",
    "text_1",
    "text_2",
    "data_1",
    "data_2",
}
_EXAMPLES = 20  # of an operation and a mode in a round
_TIMEOUT = 120.0


@dataclass(slots=True)
class Results:
    """What the server made of all that.

    Attributes:
        statuses: of each operation, how often which status.
        wrong: requests whose answer was wrong, and that answer.
    """

    num_requests: int = 0
    statuses: dict[str, dict[int, int]] = field(default_factory=dict)
    wrong: list[dict[str, Any]] = field(default_factory=list)

    def add(self, label: str, request: str, status: int, text: str, why: str | None) -> None:
        self.num_requests += 1
        counts = self.statuses.setdefault(label, {})
        counts[status] = counts.get(status, 0) + 1
        if why is not None:
            self.wrong.append({"why": why, "request": request, "status": status, "answer": text[:1000]})


def fuzz(url: str, num_requests: int, *, start: int = 0, examples: int = _EXAMPLES) -> Results:
    """So many requests, or a few more, to a running server.

    Args:
        start: of the random numbers; the same one draws the same requests.
    """
    import schemathesis
    from schemathesis import GenerationMode

    document = httpx.get(f"{url}/openapi.json", timeout=_TIMEOUT).json()
    schema = schemathesis.openapi.from_dict(document)
    operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
    modes = [
        (operation, mode)
        for operation in operations
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
        # What takes no body cannot be asked wrongly: any name is one that may be there.
        if mode is GenerationMode.POSITIVE
        or "requestBody" in document["paths"][operation.path][operation.method]
    ]
    random.Random(start).shuffle(modes)
    results = Results()
    rounds = 0
    with requests.Session() as session:
        while results.num_requests < num_requests:
            for operation, mode in modes:
                if results.num_requests < num_requests:
                    strategy = operation.as_strategy(generation_mode=mode)
                    _draw(strategy, url, session, results, start + rounds, examples)
            rounds += 1
    return results


def _draw(
    strategy: Any, url: str, session: requests.Session, results: Results, number: int, examples: int
) -> None:
    """A few requests of one operation."""
    dice = random.Random(number)

    @seed(number)
    @settings(
        max_examples=examples,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=strategy)
    def run(case: Case) -> None:
        if isinstance(case.body, dict):
            case.body = _tame(case.body, dice)
        _send(case, url, session, results)

    run()


def _tame(body: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    """The same body, most often for the model that is there, and for little of it."""
    if dice.random() < 0.7:  # Of many fields at once, one is nearly always refused.
        body = {name: value for name, value in body.items() if name in _ASKED or dice.random() < 0.03}
    else:
        body = dict(body)
    if dice.random() < 0.9:
        body.pop("model", None)
    if "messages" in body and dice.random() < 0.7:  # The document says little of what a message is.
        body["messages"] = [{"role": "user", "content": str(body["messages"])}]
    for name, cap in _CAPS.items():
        if type(body.get(name)) is int and body[name] > cap:
            body[name] = cap
    return body


def _send(case: Case, url: str, session: requests.Session, results: Results) -> None:
    label = case.operation.label
    try:
        response = case.call(base_url=url, session=session, timeout=_TIMEOUT)
    except requests.RequestException as error:
        results.add(label, repr(case.body), 0, repr(error), "no answer")
        return
    if label.endswith("/sleep"):
        httpx.post(f"{url}/wake_up", timeout=_TIMEOUT)
    why = None
    if response.status_code >= 500:
        why = "a server error"
    elif response.status_code >= 400 and not _is_error_object(response):
        why = "no error object"
    results.add(label, f"{case.as_curl_command()[:2000]}", response.status_code, response.text, why)


def _is_error_object(response: Any) -> bool:
    try:
        error = response.json()["error"]
        return bool(error["message"]) and isinstance(error["type"], str)
    except (ValueError, KeyError, TypeError):
        return False


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz_api", description=__doc__.split("\n")[0])
    parser.add_argument("--base-url", help="a server that runs already")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="directory for what the servers print")
    add_output_arguments(parser, plot=False)
    options = parser.parse_args(arguments)
    by_server: dict[str, Results] = {}
    if options.base_url:
        by_server["server"] = fuzz(options.base_url, options.requests, start=options.seed)
    else:
        with ExitStack() as stack:
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxllm-fuzz-")))
            logs = options.log or scratch
            logs.mkdir(parents=True, exist_ok=True)
            # Most routes are those of models that generate.
            for runner, share in (("generate", 0.8), ("pooling", 0.2)):
                flags = [*FLAGS, "--runner", runner, "--profile-dir", str(scratch / runner)]
                with Server("jaxllm", sys.executable, "demo", logs / f"{runner}.log", flags) as server:
                    count = round(options.requests * share)
                    by_server[runner] = fuzz(server.url, count, start=options.seed)
    for name, results in by_server.items():
        rows: list[list[object]] = [
            [label, sum(counts.values()), ", ".join(f"{n} x {s}" for s, n in sorted(counts.items()))]
            for label, counts in sorted(results.statuses.items())
        ]
        title = f"{name}: {results.num_requests:,} requests, {len(results.wrong)} wrong answers"
        print_table(title, ["operation", "requests", "statuses"], rows)
        for wrong in results.wrong[:10]:
            print(f"WRONG ({wrong['why']}): {wrong['request'][:300]}\n    {wrong['answer'][:300]}")
    write_json(options.json, by_server)
    if any(results.wrong for results in by_server.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()

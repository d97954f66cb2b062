"""`python -m jaxllm.run_batch`: a file of requests in OpenAI's batch format, answered without a server.

Each line of the input is `{"custom_id", "method": "POST", "url": "/v1/chat/completions", "body": {...}}`; the
output has a line for each, in the same order, with the status and the body that the server would answer.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import sys
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import orjson

from jaxllm.errors import ConfigError, JaxLLMError
from jaxllm.serve.arguments import ServeArguments, parse_arguments
from jaxllm.serve.config import ServerConfig
from jaxllm.serve.flags import GROUPS

if TYPE_CHECKING:
    import httpx

    from jaxllm.async_engine import AsyncEngine
    from jaxllm.config import EngineConfig

# Flags of the server under its heading that mean something here; a key may be set for other commands.
_FOR_A_BATCH_TOO = {"api_key", "log_format", "enable_log_requests", "max_log_len"}

Load = Callable[["EngineConfig"], "AsyncEngine"]


@dataclass(frozen=True, slots=True)
class Files:
    """Where requests come from and answers go."""

    input: str
    output: str


def main(argv: Sequence[str] | None = None, program: str = "python -m jaxllm.run_batch") -> int:
    """Answer every request of a file; returns the exit status."""
    files, arguments = parse(list(sys.argv[1:] if argv is None else argv), program)
    # Imported late, so that --help and a mistyped flag answer at once.
    from jaxllm.serve.launcher import load_engine
    from jaxllm.serve.logs import configure_logging

    configure_logging(arguments.server.log_format)
    try:
        count, failed = run(files, arguments, load_engine)
    except JaxLLMError as error:
        print(f"jaxllm: {error}", file=sys.stderr)
        return 1
    print(f"{count} requests, {failed} of them refused or failed; the answers are in {files.output}.")
    return 0


def parse(argv: list[str], program: str) -> tuple[Files, ServeArguments]:
    """Read a command line; exits with a message where it is wrong, and for --help."""
    parser = argparse.ArgumentParser(
        prog=program,
        usage=f"{program} -i FILE -o FILE [MODEL] [flags]",
        description="Answer a file of requests in OpenAI's batch format. Other flags are those of the server"
        " that are not about HTTP.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument("-i", "--input-file", required=True, metavar="FILE", help="JSON lines to answer")
    parser.add_argument("-o", "--output-file", required=True, metavar="FILE", help="where the answers go")
    if {"-h", "--help"} & set(argv):
        print(parser.format_help())
        parse_arguments(["--help"], program)
    own, rest = parser.parse_known_args(argv)
    arguments = parse_arguments(rest, program)
    defaults = ServerConfig()
    for name in (*GROUPS["HTTP server"], *GROUPS["limits"]):
        if getattr(arguments.server, name) != getattr(defaults, name) and name not in (
            "api_key",
            "log_format",
        ):
            parser.error(f"--{name.replace('_', '-')} is about HTTP, which a batch does not go through")
    return Files(own.input_file, own.output_file), arguments


def run(files: Files, arguments: ServeArguments, load: Load) -> tuple[int, int]:
    """Answer the requests of a file.

    Returns:
        How many requests there were, and how many of them had no good answer.

    Raises:
        ConfigError: a file cannot be read or written.
        JaxLLMError: the model cannot be loaded.
    """
    with _opened(files.input, "rb", "-i") as lines, _opened(files.output, "wb", "-o") as output:
        engine = load(arguments.engine)
        try:
            return asyncio.run(_answer_all(engine, arguments, lines, output))
        finally:
            engine.stop(timeout=5)


@contextlib.contextmanager
def _opened(path: str, mode: str, flag: str) -> Iterator[IO[bytes]]:
    try:
        file = open(path, mode)  # noqa: SIM115 - the context manager below closes it
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be opened: {error.strerror}.", param=flag) from error
    with file:
        yield file


async def _answer_all(
    engine: AsyncEngine, arguments: ServeArguments, lines: IO[bytes], output: IO[bytes]
) -> tuple[int, int]:
    import httpx
    from tqdm import tqdm

    from jaxllm.serve.app import build_app

    # Nobody's network is on the other side.
    server = dataclasses.replace(arguments.server, api_key=(), max_request_bytes=2**40)
    transport = httpx.ASGITransport(build_app(engine, server), raise_app_exceptions=False)
    at_once = 2 * (engine.engine.config.max_num_seqs or 1)
    count = failed = 0
    async with httpx.AsyncClient(transport=transport, base_url="http://batch", timeout=None) as client:
        with tqdm(desc="Requests", unit="request") as progress:
            async for answer in _in_order(client, lines, at_once):
                output.write(orjson.dumps(answer) + b"\n")
                count += 1
                failed += answer["response"]["status_code"] != 200
                progress.update()
    return count, failed


async def _in_order(
    client: httpx.AsyncClient, lines: IO[bytes], at_once: int
) -> AsyncIterator[dict[str, Any]]:
    """The answers in the order of the lines, of which some are worked on at once."""
    running: deque[asyncio.Task[dict[str, Any]]] = deque()
    for line in lines:
        if not line.strip():
            continue
        running.append(asyncio.create_task(_answer(client, line)))
        # A slow request holds the order up, but not the work behind it.
        while len(running) > 2 * at_once or (running and running[0].done()):
            yield await running.popleft()
        while sum(not task.done() for task in running) >= at_once:
            await asyncio.wait([t for t in running if not t.done()], return_when=asyncio.FIRST_COMPLETED)
    while running:
        yield await running.popleft()


async def _answer(client: httpx.AsyncClient, line: bytes) -> dict[str, Any]:
    custom_id, wrong, request = None, None, None
    try:
        request = orjson.loads(line)
    except ValueError as error:
        wrong = f"The line is not valid JSON: {error}."
    if isinstance(request, dict):
        custom_id = request.get("custom_id")
        wrong = _problem(request)
    elif wrong is None:
        wrong = "The line must be a JSON object."
    if wrong is not None or request is None:
        body = {"error": {"message": wrong, "type": "BadRequestError", "param": None, "code": 400}}
        return _record(custom_id, 400, body, None)
    response = await client.post(request["url"], json=request["body"])
    return _record(custom_id, response.status_code, response.json(), response.headers.get("x-request-id"))


def _problem(request: dict[str, Any]) -> str | None:
    """What is wrong with a line, if anything."""
    unknown = sorted(request.keys() - {"custom_id", "method", "url", "body"})
    if unknown:
        return f"Unknown field '{unknown[0]}'; a line has custom_id, method, url and body."
    if not isinstance(request.get("custom_id"), str) or not request["custom_id"]:
        return "Field 'custom_id' must be a string, by which the answer is found."
    if request.get("method") != "POST":
        return f"Field 'method' is {request.get('method')!r}; it must be \"POST\"."
    if not isinstance(request.get("url"), str) or not request["url"].startswith("/"):
        return "Field 'url' must be the path of a route, such as /v1/chat/completions."
    if not isinstance(request.get("body"), dict):
        return "Field 'body' must be an object, the body of the request."
    if request["body"].get("stream"):
        return "Field 'body.stream' is true: a batch has whole answers."
    return None


def _record(custom_id: Any, status: int, body: Any, request_id: str | None) -> dict[str, Any]:
    response = {"status_code": status, "request_id": request_id or uuid.uuid4().hex, "body": body}
    return {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": custom_id,
        "response": response,
        "error": None,
    }


if __name__ == "__main__":
    sys.exit(main())

"""Talking to a running server from the terminal: what `chat` and `complete` have in common."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import orjson

API_KEY_VARIABLE = "JAXLLM_API_KEY"


class ServerError(Exception):
    """The server cannot be reached, or refuses."""


class Client:
    """A server with OpenAI's routes.

    Args:
        url: of the API, such as http://localhost:8000/v1.
        transport: instead of a socket.
    """

    def __init__(self, url: str, api_key: str | None, transport: httpx.BaseTransport | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # Answers may take their time, reaching the server may not.
        timeout = httpx.Timeout(None, connect=10)
        self._http = httpx.Client(
            base_url=url.rstrip("/") + "/", headers=headers, timeout=timeout, transport=transport
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error: object) -> None:
        self._http.close()

    def model(self) -> str:
        """The name of the model that the server has first.

        Raises:
            ServerError: there is no such server, or it refuses.
        """
        with _reporting():
            response = self._http.get("models")
            _check(response)
            return str(response.json()["data"][0]["id"])

    def stream(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The first choice of each chunk that answers a request.

        Raises:
            ServerError: the server refuses, or breaks off.
        """
        with _reporting(), self._http.stream("POST", path, json={**body, "stream": True}) as response:
            if response.is_error:
                response.read()
            _check(response)
            for line in response.iter_lines():
                data = line.removeprefix("data: ")
                if data == line or data == "[DONE]":
                    continue
                chunk = orjson.loads(data)
                if "error" in chunk:
                    raise ServerError(chunk["error"]["message"])
                yield from chunk["choices"][:1]


@contextlib.contextmanager
def _reporting() -> Iterator[None]:
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"The server cannot be reached: {error}. Is --url right?") from error
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise ServerError(f"The server's answer is not that of an OpenAI API: {error!r}.") from error


def _check(response: httpx.Response) -> None:
    if response.is_error:
        try:
            message = response.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = response.text
        raise ServerError(f"{response.status_code}: {message}")


def make_parser(program: str, description: str) -> argparse.ArgumentParser:
    """A parser of the flags that every command has that talks to a server."""
    parser = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument(
        "--url", default="http://localhost:8000/v1", help="of the server's API (default: %(default)s)"
    )
    parser.add_argument("--model-name", help="the server's first model, unless given")
    parser.add_argument("--api-key", help=f"key of the server; ${API_KEY_VARIABLE} unless given")
    parser.add_argument("-q", "--quick", metavar="TEXT", help="say this, print the answer, and end")
    return parser


def run(arguments: argparse.Namespace, answer: Callable[[Client, str, str], Iterator[str]]) -> int:
    """Answer what the user says, line by line, until the end of the input; returns the exit status.

    Args:
        answer: gives, for a client, a model and a text, the pieces to print.
    """
    try:
        with Client(arguments.url, arguments.api_key or os.environ.get(API_KEY_VARIABLE)) as client:
            model = arguments.model_name or client.model()
            if arguments.quick is None:
                print(f"{model}; an empty line or Ctrl-D ends.")
                _converse(lambda said: answer(client, model, said))
            else:
                _print(answer(client, model, arguments.quick))
    except ServerError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


def _converse(answer: Callable[[str], Iterator[str]]) -> None:
    while said := _ask():
        try:
            _print(answer(said))
        except ServerError as error:
            print(f"\n{error}", file=sys.stderr)


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return ""


def _print(pieces: Iterator[str]) -> None:
    for piece in pieces:
        print(piece, end="", flush=True)
    print()

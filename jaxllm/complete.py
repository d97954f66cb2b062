"""`python -m jaxllm.complete`: texts that the model of a running server goes on with."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jaxllm.terminal import Client, make_parser, run


def main(argv: Sequence[str] | None = None, program: str = "python -m jaxllm.complete") -> int:
    """Complete until the user ends; returns the exit status."""
    parser = make_parser(program, "Complete texts with the model of a running server.")
    parser.add_argument("--max-tokens", type=int, default=128, help="of a completion (default: %(default)s)")
    parser.add_argument("--temperature", type=float, help="the model's own unless given")
    arguments = parser.parse_args(argv)
    fields: dict[str, Any] = {"max_tokens": arguments.max_tokens}
    if arguments.temperature is not None:
        fields["temperature"] = arguments.temperature

    def answer(client: Client, model: str, said: str) -> Iterator[str]:
        for choice in client.stream("completions", {"model": model, "prompt": said, **fields}):
            yield choice["text"]

    return run(arguments, answer)


if __name__ == "__main__":
    sys.exit(main())

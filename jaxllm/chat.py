"""`python -m jaxllm.chat`: a conversation with the model of a running server."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from jaxllm.terminal import Client, make_parser, run


class Conversation:
    """What has been said, and what the model says to it."""

    def __init__(self, system_prompt: str | None, fields: dict[str, Any]) -> None:
        self.messages: list[dict[str, Any]] = []
        if system_prompt is not None:
            self.messages.append({"role": "system", "content": system_prompt})
        self._fields = fields

    def answer(self, client: Client, model: str, said: str) -> Iterator[str]:
        """The pieces of the answer; the turn is kept once it is complete."""
        turn = [*self.messages, {"role": "user", "content": said}]
        content: list[str] = []
        thought = False
        for choice in client.stream("chat/completions", {"model": model, "messages": turn, **self._fields}):
            delta = choice["delta"]
            if reasoning := delta.get("reasoning"):
                yield reasoning if thought else f"({reasoning}"
                thought = True
            if text := delta.get("content"):
                if thought and not content:
                    yield ")\n"
                content.append(text)
                yield text
        self.messages = [*turn, {"role": "assistant", "content": "".join(content)}]


def main(argv: Sequence[str] | None = None, program: str = "python -m jaxllm.chat") -> int:
    """Talk until the user ends; returns the exit status."""
    parser = make_parser(program, "Chat with the model of a running server.")
    parser.add_argument("--system-prompt", help="what the model is told before the conversation")
    parser.add_argument(
        "--max-tokens", type=int, help="of an answer; as many as there is room for unless given"
    )
    parser.add_argument("--temperature", type=float, help="the model's own unless given")
    arguments = parser.parse_args(argv)
    given = {"max_tokens": arguments.max_tokens, "temperature": arguments.temperature}
    fields = {name: value for name, value in given.items() if value is not None}
    return run(arguments, Conversation(arguments.system_prompt, fields).answer)


if __name__ == "__main__":
    sys.exit(main())

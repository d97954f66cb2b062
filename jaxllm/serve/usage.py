"""The `usage` object: tokens read and written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxllm.serve.protocol import StreamOptions


class UsageCounter:
    """Counts the tokens of one HTTP request, over all its prompts and choices.

    Args:
        prompt_tokens: length of each prompt.
        options: of the stream, or None.
        force: send usage in every stream.
        details: report how many prompt tokens came from the prefix cache.

    Attributes:
        in_stream: whether a stream ends with a chunk of usage.
        continuous: whether every chunk carries the usage of its choice so far.
    """

    def __init__(
        self, prompt_tokens: Sequence[int], options: StreamOptions | None, *, force: bool, details: bool
    ) -> None:
        self._prompt_tokens = prompt_tokens
        self._details = details
        self._completion_tokens: dict[tuple[int, int], int] = {}
        self._cached_tokens: dict[int, int] = {}
        self._reasoning_tokens: int | None = None
        self.in_stream = force or (options is not None and options.include_usage)
        self.continuous = self.in_stream and (
            force or (options is not None and options.continuous_usage_stats)
        )

    def add(self, prompt_index: int, choice_index: int, tokens: int) -> None:
        """Count output tokens of a choice."""
        key = (prompt_index, choice_index)
        self._completion_tokens[key] = self._completion_tokens.get(key, 0) + tokens

    def add_cached(self, prompt_index: int, tokens: int | None) -> None:
        """Note how much of a prompt the prefix cache held."""
        if tokens is not None:
            self._cached_tokens[prompt_index] = tokens

    def add_reasoning(self, tokens: int) -> None:
        """Count those of the output tokens that were reasoning."""
        self._reasoning_tokens = (self._reasoning_tokens or 0) + tokens

    def stamp(self, chunk: dict[str, Any], prompt_index: int, choice_index: int) -> None:
        """Put the usage of one choice so far on a chunk, where the client asked for it."""
        if self.continuous:
            completion = self._completion_tokens.get((prompt_index, choice_index), 0)
            chunk["usage"] = _usage(self._prompt_tokens[prompt_index], completion)

    def total(self) -> dict[str, Any]:
        """The usage of the whole request."""
        usage = _usage(sum(self._prompt_tokens), sum(self._completion_tokens.values()))
        if self._details and self._cached_tokens:
            usage["prompt_tokens_details"] = {"cached_tokens": sum(self._cached_tokens.values())}
        if self._reasoning_tokens is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self._reasoning_tokens}
        return usage


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}

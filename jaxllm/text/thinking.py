"""A bound on how long a model reasons: behind so many tokens, the mark that ends the reasoning is due."""

from __future__ import annotations

from collections.abc import Sequence

from jaxllm.errors import InvalidRequestError
from jaxllm.sampling_params import SamplingParams


class ThinkingBudget:
    """How much reasoning one output may still hold. For one thread at a time.

    Args:
        end: token ids that end the reasoning.
        budget: tokens of reasoning, from 0 on, before them.
        start: token ids that begin it; none where the output begins within it.
    """

    __slots__ = ("_budget", "_end", "_is_over", "_num_used", "_recent", "_start")

    def __init__(self, end: Sequence[int], budget: int, start: Sequence[int] = ()) -> None:
        self._end = list(end)
        self._start = list(start)
        self._budget = budget
        self._num_used = 0
        self._recent: list[int] = []
        self._is_over = False

    @property
    def forced(self) -> int | None:
        """The one token that may come next; None where any may."""
        if self._is_over or self._start or self._num_used < self._budget:
            return None
        # The model may have begun to write the mark by itself.
        written = max(
            n for n in range(len(self._end)) if self._recent[len(self._recent) - n :] == self._end[:n]
        )
        return self._end[written]

    def accept(self, token_id: int) -> None:
        """Takes the next token of the output."""
        if self._is_over:
            return
        awaited = self._start or self._end
        self._recent = [*self._recent, token_id][-max(len(self._start), len(self._end)) :]
        self._num_used += not self._start
        if self._recent[-len(awaited) :] == awaited:
            self._is_over = not self._start
            self._start, self._recent = [], []

    def copy(self) -> ThinkingBudget:
        """An independent budget of the same size, of which nothing is used yet."""
        return ThinkingBudget(self._end, self._budget, self._start)


def refuse_unbounded(params: SamplingParams, thinking: ThinkingBudget | None) -> None:
    """Refuse a budget that nobody can hold, since nobody knows where reasoning begins and ends.

    Raises:
        InvalidRequestError: saying how that is told.
    """
    if params.thinking_token_budget is not None and thinking is None:
        raise InvalidRequestError(
            f"thinking_token_budget={params.thinking_token_budget} needs to know how the model marks its "
            'reasoning: say so with LLM(..., reasoning_parser="qwen3") (an unknown name lists them), or '
            "bound the whole output with max_tokens.",
            param="thinking_token_budget",
        )

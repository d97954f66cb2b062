"""The questions that the scheduler asks a policy, and what it tells it.

A policy answers; the scheduler alone moves requests and pages. It sees requests through
`RequestView`, which cannot be written to. A policy that raises, or answers with something that makes
no sense, is reported by name and replaced by fcfs, and serving goes on (`jaxllm.scheduling.guard`).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from jaxllm.scheduling.views import RequestView, StepView

Rank = float | tuple[float, ...]


class BudgetSplit(NamedTuple):
    """How many tokens of a step may go where; what one side leaves is the other's only up to its limit.

    Attributes:
        running: tokens at most for requests that are running already; they are served first.
        waiting: tokens at most for requests that start, or start again, in this step.
    """

    running: int
    waiting: int


class SchedulingPolicy:
    """The questions that the scheduler asks. Derive from it and answer those that matter.

    Unanswered, they give first come, first served. Of two requests of equal rank, the one that was
    added first comes first. Answers that would leave the device idle are not followed.

    Attributes:
        dynamic_ranks: whether ranks change, so that all of them are asked for before each step,
            which takes time in proportion to the requests that are there. Otherwise a rank is asked
            for when a request is added, and when it is preempted.
        terms: the fields of `SchedulingTerms` that the policy goes by; a request that states others is
            refused, so that nobody relies on what has no effect. None takes all.
    """

    dynamic_ranks: bool = False
    terms: Collection[str] | None = None

    # What it is asked, in the order in which a step asks

    def rank(self, request: RequestView) -> Rank:
        """Place in the order of service: the smallest is admitted and served first, and loses its
        pages last. A number, or a tuple of numbers."""
        return ()

    def preempt(self, step: StepView) -> Sequence[RequestView]:
        """Running requests that give up their seats and pages before the step is planned.

        They wait again, and are computed again, or copied back, when their turn comes.
        """
        return ()

    def split_budget(self, step: StepView) -> BudgetSplit:
        """Shares of the step's tokens."""
        return BudgetSplit(step.num_tokens, step.num_tokens)

    def admit(self, request: RequestView) -> bool:
        """Whether a waiting request may start in this step; those behind it are asked all the same."""
        return True

    def chunk_size(self, request: RequestView, num_tokens: int) -> int:
        """How many tokens to compute of a request that could compute `num_tokens` now, 0 to all of them.

        0 makes it sit out the step, with its pages.
        """
        return num_tokens

    def choose_victim(self, candidates: Sequence[RequestView]) -> RequestView:
        """Who gives up its pages so that `candidates[0]` can go on.

        Args:
            candidates: the running requests of no higher rank than the one in need, which is the
                first, and that this step does not compute yet. Giving back the first itself makes
                it wait.
        """
        return candidates[-1]

    def keep_pages(self, request: RequestView) -> bool:
        """Whether a request that loses its pages has them copied to the host's memory, where there is room.

        Otherwise it is computed again. Asked only where the engine has such room (`swap_space`).
        """
        return True

    # What it is told

    def on_arrival(self, request: RequestView) -> None:
        """A request was added; before its rank is asked for."""

    def on_admission(self, request: RequestView, num_cached_tokens: int) -> None:
        """A request starts, or starts again, with so many tokens found in the prefix cache or on the host."""

    def on_progress(self, request: RequestView, num_tokens: int) -> None:
        """A step that computes so many tokens of a request was planned."""

    def on_finish(self, request: RequestView) -> None:
        """A request ended, in whatever way. It is not mentioned again."""

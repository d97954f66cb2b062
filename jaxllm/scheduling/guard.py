"""Stands between the scheduler and a policy, so that no policy can harm a request."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from jaxllm.scheduling.policies.order import FirstComeFirstServed
from jaxllm.scheduling.policy import BudgetSplit, SchedulingPolicy
from jaxllm.scheduling.views import RequestView, StepView

logger = logging.getLogger(__name__)

_Answer = TypeVar("_Answer")
_OPTIONAL = (
    *("preempt", "admit", "chunk_size", "keep_pages"),
    *("on_arrival", "on_admission", "on_progress", "on_finish"),
)


class PolicyGuard:
    """Asks a policy, checks its answers, and replaces it by fcfs at the first that is no good.

    Args:
        policy: the policy to ask.

    Attributes:
        stale: the policy was replaced and ranks that it gave are still around; whoever renews them
            sets this back.
    """

    __slots__ = ("_answered", "_policy", "stale")

    def __init__(self, policy: SchedulingPolicy) -> None:
        self.stale = False
        self._use(policy)

    def _use(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        # What a policy leaves to its base class is not asked, as some of it would be for every token.
        self._answered = {
            name
            for name in _OPTIONAL
            if getattr(type(policy), name, None) is not getattr(SchedulingPolicy, name)
        }

    @property
    def dynamic_ranks(self) -> bool:
        """Whether ranks have to be asked for before each step."""
        return self._ask(lambda policy: bool(policy.dynamic_ranks))

    def rank(self, request: RequestView) -> tuple[float, ...]:
        """The policy's rank, as a tuple."""

        def ask(policy: SchedulingPolicy) -> tuple[float, ...]:
            answer: Any = policy.rank(request)
            rank = answer if isinstance(answer, tuple) else (answer,)
            if any(not isinstance(part, int | float) or math.isnan(part) for part in rank):
                raise ValueError(f"rank({request!r}) gave {answer!r}, not a number or a tuple of numbers")
            return rank

        return self._ask(ask)

    def preempt(self, step: StepView) -> list[RequestView]:
        """The running requests that the policy wants out, each once."""
        if "preempt" not in self._answered:
            return []

        def ask(policy: SchedulingPolicy) -> list[RequestView]:
            answer = list(policy.preempt(step))
            running = {id(view) for view in step.running} if answer else set()
            if any(id(view) not in running for view in answer) or len(set(map(id, answer))) < len(answer):
                raise ValueError(f"preempt gave {answer!r}, not different running requests")
            return answer

        return self._ask(ask)

    def split_budget(self, step: StepView) -> BudgetSplit:
        """The policy's split; limits beyond the budget mean the whole budget."""

        def ask(policy: SchedulingPolicy) -> BudgetSplit:
            answer: Any = policy.split_budget(step)
            running, waiting = answer
            if not (isinstance(running, int) and isinstance(waiting, int)) or min(running, waiting) < 0:
                raise ValueError(f"split_budget gave {answer!r}, not two token counts of at least 0")
            return BudgetSplit(running, waiting)

        return self._ask(ask)

    def admit(self, request: RequestView) -> bool:
        """Whether a waiting request may start."""
        return self._yes_or_no("admit", request)

    def keep_pages(self, request: RequestView) -> bool:
        """Whether a request that is preempted keeps its pages on the host."""
        return self._yes_or_no("keep_pages", request)

    def _yes_or_no(self, question: str, request: RequestView) -> bool:
        """What the policy says to a question that is yes unless it answers it."""
        if question not in self._answered:
            return True

        def ask(policy: SchedulingPolicy) -> bool:
            answer: Any = getattr(policy, question)(request)
            if not isinstance(answer, bool):
                raise ValueError(f"{question}({request!r}) gave {answer!r}, not True or False")
            return answer

        return self._ask(ask)

    def chunk_size(self, request: RequestView, num_tokens: int) -> int:
        """Tokens to compute of a request, at most `num_tokens`."""
        if "chunk_size" not in self._answered or num_tokens == 0:
            return num_tokens

        def ask(policy: SchedulingPolicy) -> int:
            answer: Any = policy.chunk_size(request, num_tokens)
            if type(answer) is not int or not 0 <= answer <= num_tokens:
                raise ValueError(
                    f"chunk_size({request!r}, {num_tokens}) gave {answer!r}, not a count of 0 to {num_tokens}"
                )
            return answer

        return self._ask(ask)

    def choose_victim(self, candidates: Sequence[RequestView]) -> int:
        """Index among `candidates` of the one to preempt."""

        def ask(policy: SchedulingPolicy) -> int:
            victim = policy.choose_victim(tuple(candidates))
            for index, candidate in enumerate(candidates):
                if candidate is victim:
                    return index
            raise ValueError(f"choose_victim gave {victim!r}, which is none of the candidates")

        return self._ask(ask)

    def on_arrival(self, request: RequestView) -> None:
        """Tells of a request that was added."""
        if "on_arrival" in self._answered:
            self._ask(lambda policy: policy.on_arrival(request))

    def on_admission(self, request: RequestView, num_cached_tokens: int) -> None:
        """Tells of a request that starts."""
        if "on_admission" in self._answered:
            self._ask(lambda policy: policy.on_admission(request, num_cached_tokens))

    def on_progress(self, request: RequestView, num_tokens: int) -> None:
        """Tells of tokens that were planned."""
        if "on_progress" in self._answered:
            self._ask(lambda policy: policy.on_progress(request, num_tokens))

    def on_finish(self, request: RequestView) -> None:
        """Tells of a request that ended."""
        if "on_finish" in self._answered:
            self._ask(lambda policy: policy.on_finish(request))

    def _ask(self, ask: Callable[[SchedulingPolicy], _Answer]) -> _Answer:
        try:
            return ask(self._policy)
        except Exception:
            if type(self._policy) is FirstComeFirstServed:
                raise
            policy = type(self._policy)
            logger.exception(
                "The scheduling policy %s.%s failed; going on with fcfs.",
                policy.__module__,
                policy.__qualname__,
            )
            self._use(FirstComeFirstServed())
            self.stale = True
            return ask(self._policy)

"""What a scheduling policy decides, what it sees, and the policies that are built in.

A policy answers questions; the scheduler alone moves requests and pages. It sees requests through
`RequestView`, which cannot be written to. A policy that raises, or answers with something that makes
no sense, is reported by name and replaced by fcfs, and serving goes on.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar, cast

from jaxllm.errors import ConfigError
from jaxllm.request import Request, RequestStatus

logger = logging.getLogger(__name__)

Rank = float | tuple[float, ...]
_Answer = TypeVar("_Answer")


class RequestView:
    """A request as a policy sees it: read-only, always up to date."""

    __slots__ = ("_request",)
    _request: Request

    def __init__(self, request: Request) -> None:
        object.__setattr__(self, "_request", request)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a policy cannot change a request; it tried to set {name!r}")

    def __repr__(self) -> str:
        return f"RequestView({self.request_id!r})"

    @property
    def request_id(self) -> str:
        """Unique among unfinished requests."""
        return self._request.request_id

    @property
    def status(self) -> RequestStatus:
        """Waiting, running or preempted."""
        return self._request.status

    @property
    def arrival_time(self) -> float:
        """Seconds, on the clock of whoever made the request."""
        return self._request.arrival_time

    @property
    def priority(self) -> int:
        """What the user asked for; lower is more urgent."""
        return self._request.priority

    @property
    def group_id(self) -> str | None:
        """Common to the sequences of one user request; None where it has only one."""
        return self._request.group_id

    @property
    def max_tokens(self) -> int:
        """Output tokens allowed."""
        return self._request.max_tokens

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._request.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        """Output tokens that exist, including those still in flight."""
        return self._request.num_output_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, including those still in flight."""
        return self._request.num_tokens

    @property
    def num_computed_tokens(self) -> int:
        """Positions in the KV cache, or there once the steps in flight have run."""
        return self._request.num_computed_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache at the first admission."""
        return self._request.num_cached_tokens

    @property
    def num_preemptions(self) -> int:
        """How often it has been preempted."""
        return self._request.num_preemptions

    @property
    def num_pages(self) -> int:
        """KV pages that it holds."""
        return len(self._request.pages)


class StepView:
    """What is there to be scheduled, before a step is planned.

    Args:
        num_tokens: the step's token budget.
        running: reads the running requests, in order of rank.
        waiting: reads the waiting requests, in order of rank.
    """

    __slots__ = ("_running", "_waiting", "num_tokens")

    def __init__(
        self,
        num_tokens: int,
        running: Callable[[], Sequence[RequestView]],
        waiting: Callable[[], Sequence[RequestView]],
    ) -> None:
        self.num_tokens = num_tokens
        self._running = running
        self._waiting = waiting

    @property
    def running(self) -> Sequence[RequestView]:
        """Running requests, in order of rank. Collected when asked for."""
        return self._running()

    @property
    def waiting(self) -> Sequence[RequestView]:
        """Waiting requests, in order of rank. Collected, and sorted, when asked for."""
        return self._waiting()


class BudgetSplit(NamedTuple):
    """How many tokens of a step may go where; what one side leaves is the other's only up to its limit.

    Attributes:
        running: tokens at most for requests that are running already; they are served first.
        waiting: tokens at most for requests that start, or start again, in this step.
    """

    running: int
    waiting: int


class SchedulingPolicy(Protocol):
    """The questions that the scheduler asks. Derive from it and answer those that matter.

    Unanswered, they give first come, first served. Of two requests of equal rank, the one that was
    added first comes first.

    Attributes:
        dynamic_ranks: whether ranks change, so that all of them are asked for before each step,
            which takes time in proportion to the requests that are there. Otherwise a rank is asked
            for when a request is added, and when it is preempted.
    """

    dynamic_ranks: bool = False

    def rank(self, request: RequestView) -> Rank:
        """Place in the order of service: the smallest is admitted and served first, and loses its
        pages last. A number, or a tuple of numbers."""
        return ()

    def choose_victim(self, candidates: Sequence[RequestView]) -> RequestView:
        """Who gives up its pages so that `candidates[0]` can go on.

        Args:
            candidates: the running requests of no higher rank than the one in need, which is the
                first, and that this step does not compute yet. Giving back the first itself makes
                it wait.
        """
        return candidates[-1]

    def split_budget(self, step: StepView) -> BudgetSplit:
        """Shares of the step's tokens. A split that would leave the device idle is not followed."""
        return BudgetSplit(step.num_tokens, step.num_tokens)


class FirstComeFirstServed(SchedulingPolicy):
    """Requests in the order in which they were added."""


class Priority(SchedulingPolicy):
    """Lower `priority` first, then earlier arrival. A steady stream of urgent requests delays others."""

    def rank(self, request: RequestView) -> Rank:
        """Priority, then time of arrival."""
        return (request.priority, request.arrival_time)


BUILT_IN: dict[str, Callable[[], SchedulingPolicy]] = {
    "fcfs": FirstComeFirstServed,
    "priority": Priority,
}


def load_policy(name: str) -> SchedulingPolicy:
    """The built-in policy of that name, or an instance of the class that `module:Class` names.

    Raises:
        ConfigError: there is no such policy, or it cannot be made.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]()
    module_name, colon, class_name = name.partition(":")
    if not (colon and module_name and class_name):
        raise ConfigError(
            f"scheduling_policy is {name!r}; it must be one of {', '.join(sorted(BUILT_IN))}, "
            "or `module:Class` for a policy of your own.",
            param="scheduling_policy",
        )
    try:
        policy = getattr(importlib.import_module(module_name), class_name)()
    except Exception as error:
        raise ConfigError(
            f"scheduling_policy {name!r} cannot be loaded: {type(error).__name__}: {error}. "
            "Give an importable module and a class in it that is made without arguments.",
            param="scheduling_policy",
        ) from error
    missing = [
        question
        for question in ("dynamic_ranks", "rank", "choose_victim", "split_budget")
        if not hasattr(policy, question)
    ]
    if missing:
        raise ConfigError(
            f"scheduling_policy {name!r} lacks {', '.join(missing)}; derive it from "
            "jaxllm.scheduling.SchedulingPolicy, which has defaults for everything.",
            param="scheduling_policy",
        )
    return cast(SchedulingPolicy, policy)


class PolicyGuard:
    """Asks a policy, checks its answers, and replaces it by fcfs at the first that is no good.

    Args:
        policy: the policy to ask.

    Attributes:
        stale: the policy was replaced and ranks that it gave are still around; whoever renews them
            sets this back.
    """

    __slots__ = ("_policy", "stale")

    def __init__(self, policy: SchedulingPolicy) -> None:
        self._policy = policy
        self.stale = False

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

    def choose_victim(self, candidates: Sequence[RequestView]) -> int:
        """Index among `candidates` of the one to preempt."""

        def ask(policy: SchedulingPolicy) -> int:
            victim = policy.choose_victim(tuple(candidates))
            for index, candidate in enumerate(candidates):
                if candidate is victim:
                    return index
            raise ValueError(f"choose_victim gave {victim!r}, which is none of the candidates")

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
            self._policy = FirstComeFirstServed()
            self.stale = True
            return ask(self._policy)

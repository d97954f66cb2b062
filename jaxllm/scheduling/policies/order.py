"""Policies that differ in who comes first."""

from __future__ import annotations

import math
from collections.abc import Sequence

from jaxllm.request import RequestStatus
from jaxllm.scheduling.policies.lengths import LengthPredictor, make_predictor
from jaxllm.scheduling.policy import Rank, SchedulingPolicy
from jaxllm.scheduling.views import RequestView, StepView


class FirstComeFirstServed(SchedulingPolicy):
    """Requests in the order in which they were added (Orca, Yu et al., OSDI 2022)."""

    terms = ()


class Priority(SchedulingPolicy):
    """Lower `priority` first, then earlier arrival. A steady stream of urgent requests delays others."""

    terms = ("priority",)

    def rank(self, request: RequestView) -> Rank:
        """Priority, then time of arrival."""
        return (request.priority, request.arrival_time)


class ShortestJobFirst(SchedulingPolicy):
    """The request with the fewest tokens to compute first; long ones may starve.

    The best mean waiting time that an order fixed at arrival can have (Smith 1956), as far as lengths
    are known; for LLMs with predicted lengths: Zheng et al., "Response Length Perception", 2023.

    Args:
        predictor: "max_tokens" takes what the request allows for what it will need, an oracle where
            outputs are cut at their limit; "history" learns from the requests that ended.
    """

    terms = ()

    def __init__(self, predictor: str = "max_tokens") -> None:
        self._lengths: LengthPredictor = make_predictor(predictor)

    def rank(self, request: RequestView) -> Rank:
        """Tokens of the prompt and predicted tokens of the output."""
        return request.num_prompt_tokens + self._lengths.predict(request)

    def on_finish(self, request: RequestView) -> None:
        """Lets the predictor learn."""
        self._lengths.learn(request)


class ShortestRemainingFirst(ShortestJobFirst):
    """The request with the fewest tokens left first, at any time: a short one takes the seat of a long one.

    Shortest remaining processing time (Schrage 1968); with predicted lengths and preemption for LLMs:
    TRAIL (Shahout et al. 2024), after which a request far along keeps its seat.

    Args:
        predictor: see `ShortestJobFirst`.
        protected: share of the predicted output after which a request is not preempted any more,
            since what it has computed would be lost.
    """

    dynamic_ranks = True

    def __init__(self, predictor: str = "max_tokens", protected: float = 0.5) -> None:
        super().__init__(predictor)
        self._protected = protected

    def rank(self, request: RequestView) -> Rank:
        """Tokens that are still to be computed."""
        return self._num_left(request)

    def _num_left(self, request: RequestView) -> float:
        return max(request.num_tokens - request.num_computed_tokens, 0) + self._lengths.predict(request)

    def preempt(self, step: StepView) -> Sequence[RequestView]:
        """The one with most to do, where somebody with less finds no room."""
        if not step.running or not step.waiting or step.has_room_for(step.waiting[0]):
            return ()
        first, last = step.waiting[0], step.running[-1]
        length = last.num_output_tokens + self._lengths.predict(last)
        is_protected = last.num_output_tokens >= self._protected * length
        return () if is_protected or self._num_left(first) >= self._num_left(last) else (last,)


class EarliestDeadlineFirst(SchedulingPolicy):
    """Whose next token is due first (Liu and Layland 1973; for TTFT and TPOT objectives: SCORPIO, 2025).

    The first token is due `ttft_objective` after the arrival, each further one `tpot_objective` later.

    Args:
        ttft, tpot: seconds, for requests that state no objective.
    """

    dynamic_ranks = True
    terms = ("ttft_objective", "tpot_objective")

    def __init__(self, ttft: float = 10.0, tpot: float = 0.2) -> None:
        self._ttft, self._tpot = ttft, tpot

    def rank(self, request: RequestView) -> Rank:
        """When the next token is due, on the clock of the arrival times."""
        ttft = self._ttft if request.ttft_objective is None else request.ttft_objective
        tpot = self._tpot if request.tpot_objective is None else request.tpot_objective
        return request.arrival_time + ttft + request.num_output_tokens * tpot


class LongestPrefixFirst(SchedulingPolicy):
    """The waiting request of which the prefix cache holds most first (SGLang, Zheng et al. 2024, section 3).

    While it runs its pages stay cached, so that requests with a common prefix follow one another.

    Args:
        most_waiting: looking up is left where more requests wait, as its time grows with them; they
            are then served as they came.
    """

    dynamic_ranks = True
    terms = ()

    def __init__(self, most_waiting: int = 128) -> None:
        self._most_waiting = most_waiting
        self._waiting: set[str] = set()

    def rank(self, request: RequestView) -> Rank:
        """Who runs goes on; then by cached tokens."""
        if request.status is RequestStatus.RUNNING:
            return -math.inf
        return -request.num_prefix_tokens if len(self._waiting) <= self._most_waiting else 0

    def on_arrival(self, request: RequestView) -> None:
        """Counts those that wait."""
        self._waiting.add(request.request_id)

    def on_admission(self, request: RequestView, num_cached_tokens: int) -> None:
        """Counts those that wait."""
        self._waiting.discard(request.request_id)

    def on_finish(self, request: RequestView) -> None:
        """Counts those that wait."""
        self._waiting.discard(request.request_id)

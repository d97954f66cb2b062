"""Policies that weigh what each request or tenant has been given so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxllm.scheduling.policy import Rank, SchedulingPolicy
from jaxllm.scheduling.views import RequestView, StepView


def split_progress(request: RequestView, num_tokens: int) -> tuple[int, int]:
    """(prompt tokens, output tokens) among the last `num_tokens` that were computed of a request."""
    first = request.num_computed_tokens - num_tokens
    num_prompt = min(max(request.num_prompt_tokens - first, 0), num_tokens)
    return num_prompt, num_tokens - num_prompt


class VirtualTokenCounter(SchedulingPolicy):
    """Who has been given least comes first: fairness among tenants (VTC, Sheng et al., OSDI 2024).

    Each tenant has a counter of what was computed for it, by weight. A tenant that comes back after
    having had nothing to do is lifted to the lowest counter of the others, so that idling saves
    nothing up (Algorithm 2 of the paper, charged chunk by chunk).

    Args:
        prompt_weight, output_weight: what a token costs; the paper takes the ratio of usual prices.
        tenant_weights: shares by tenant, 1 where it is not named: one of weight 2 is given twice as much.
    """

    dynamic_ranks = True
    terms = ("tenant",)

    def __init__(
        self,
        prompt_weight: float = 1.0,
        output_weight: float = 2.0,
        tenant_weights: Mapping[str, float] | None = None,
    ) -> None:
        self._prompt_weight, self._output_weight = prompt_weight, output_weight
        self._tenant_weights = dict(tenant_weights or {})
        if any(weight <= 0 for weight in self._tenant_weights.values()):
            raise ValueError(f"tenant_weights={self._tenant_weights} must all be above 0")
        self._served: dict[str, float] = {}
        self._num_requests: Counter[str] = Counter()
        self._level_left = 0.0  # counter of the tenant that was last to leave

    def rank(self, request: RequestView) -> Rank:
        """The tenant's counter."""
        return self._served[request.tenant]

    def on_arrival(self, request: RequestView) -> None:
        """Lifts the counter of a tenant that had nothing here."""
        tenant = request.tenant
        if not self._num_requests[tenant]:
            active = [self._served[other] for other, count in self._num_requests.items() if count]
            level = min(active) if active else self._level_left
            self._served[tenant] = max(self._served.get(tenant, 0.0), level)
        self._num_requests[tenant] += 1

    def on_progress(self, request: RequestView, num_tokens: int) -> None:
        """Charges the tenant."""
        num_prompt, num_output = split_progress(request, num_tokens)
        cost = num_prompt * self._prompt_weight + num_output * self._output_weight
        self._served[request.tenant] += cost / self._tenant_weights.get(request.tenant, 1.0)

    def on_finish(self, request: RequestView) -> None:
        """A tenant may have nothing here any more."""
        self._num_requests[request.tenant] -= 1
        if not self._num_requests[request.tenant]:
            self._level_left = self._served[request.tenant]


@dataclass(slots=True)
class _Place:
    """Where a request stands in the queues of `MultiLevelFeedback`."""

    level: int
    num_tokens: int = 0
    served_at: int = 0


class MultiLevelFeedback(SchedulingPolicy):
    """Queues of falling urgency and growing quanta (FastServe, Wu et al. 2023, section 4.1).

    A request starts in the queue whose quantum holds its prompt ("skip-join"), and falls to the next
    when it has used up its quantum. Those in higher queues come first and take the place of those in
    lower ones, which are computed again later. Who has not been served for long goes back to the top.

    Args:
        quantum: tokens computed in the first queue; each further one has twice as many.
        num_levels: queues.
        starvation_tokens: a request for which nothing was computed while this many tokens were
            computed for others is promoted.
    """

    dynamic_ranks = True
    terms = ()

    def __init__(self, quantum: int = 256, num_levels: int = 6, starvation_tokens: int = 1_000_000) -> None:
        if min(quantum, num_levels, starvation_tokens) < 1:
            raise ValueError("quantum, num_levels and starvation_tokens must be at least 1")
        self._quantum, self._lowest, self._starvation = quantum, num_levels - 1, starvation_tokens
        self._places: dict[str, _Place] = {}
        self._clock = 0  # tokens computed for anybody

    def rank(self, request: RequestView) -> Rank:
        """The queue; within one, first come, first served."""
        place = self._places[request.request_id]
        if place.level and self._clock - place.served_at > self._starvation:
            place.level, place.num_tokens, place.served_at = 0, 0, self._clock
        return place.level

    def preempt(self, step: StepView) -> Sequence[RequestView]:
        """The last of the lowest queue, where somebody of a higher one finds no room."""
        if not step.running or not step.waiting or step.has_room_for(step.waiting[0]):
            return ()
        first, last = step.waiting[0], step.running[-1]
        higher = self._places[first.request_id].level < self._places[last.request_id].level
        return (last,) if higher else ()

    def on_arrival(self, request: RequestView) -> None:
        """Joins the queue whose quantum holds the prompt."""
        level = 0
        while level < self._lowest and self._quantum << level < request.num_prompt_tokens:
            level += 1
        self._places[request.request_id] = _Place(level, served_at=self._clock)

    def on_progress(self, request: RequestView, num_tokens: int) -> None:
        """Uses the quantum up."""
        self._clock += num_tokens
        place = self._places[request.request_id]
        place.num_tokens += num_tokens
        place.served_at = self._clock
        while place.level < self._lowest and place.num_tokens >= self._quantum << place.level:
            place.num_tokens -= self._quantum << place.level
            place.level += 1

    def on_finish(self, request: RequestView) -> None:
        """Forgets it."""
        del self._places[request.request_id]

"""The engine's loop on a virtual clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from jaxllm.config import SchedulerConfig
from jaxllm.errors import InvalidRequestError
from jaxllm.request import Request
from jaxllm.sampling_params import SamplingParams
from jaxllm.scheduling.plan import Plan, StepResult
from jaxllm.scheduling.policy import SchedulingPolicy
from jaxllm.scheduling.replicas import ReplicatedScheduler, make_scheduler, place_of
from jaxllm.scheduling.scheduler import Scheduler
from jaxllm.scheduling.simulator.costs import CostModel
from jaxllm.scheduling.simulator.trace import TracedRequest


class RequestRecord(NamedTuple):
    """What became of a request; times in seconds from the start of the trace.

    Attributes:
        first_scheduled_time: when a step first held it.
        token_times: when its first and its last token were known.
        num_cached_tokens: prompt tokens found in the prefix cache.
        replica: that served it.
    """

    traced: TracedRequest
    first_scheduled_time: float
    token_times: tuple[float, float]
    num_cached_tokens: int
    num_preemptions: int
    replica: int = 0

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token."""
        return self.token_times[0] - self.traced.arrival_time

    @property
    def tpot(self) -> float | None:
        """Mean seconds from one token to the next; None where there is only one."""
        steps = self.traced.output_len - 1
        return (self.token_times[1] - self.token_times[0]) / steps if steps else None

    @property
    def latency(self) -> float:
        """Seconds from arrival to the last token."""
        return self.token_times[1] - self.traced.arrival_time


class ReplicaStep(NamedTuple):
    """What a replica had of a step.

    Attributes:
        seconds: that it computed; then it waited for the slowest one.
        num_running, kv_cache_usage: as in `StepRecord`.
    """

    seconds: float
    num_running: int
    kv_cache_usage: float


class StepRecord(NamedTuple):
    """A step that the device ran.

    Attributes:
        num_prompt_tokens, num_output_tokens: tokens computed, by what they are.
        num_running, num_waiting: requests, when it was planned.
        kv_cache_usage: fraction of the pages in use, when it was planned.
        num_preemptions: so far.
        replicas: where there are several; what stands above is then of all of them.
    """

    start: float
    seconds: float
    num_prompt_tokens: int
    num_output_tokens: int
    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_preemptions: int
    replicas: tuple[ReplicaStep, ...] = ()


@dataclass(slots=True)
class Simulation:
    """Everything that a simulated server did.

    Attributes:
        requests: in the order in which they ended.
        refused: requests that the scheduler would not take, with its reason.
        steps: in order.
        seconds: when the last token was there.
        num_preemptions: times that a request lost its pages.
        num_replicas: among which the requests were shared out.
    """

    requests: list[RequestRecord] = field(default_factory=list)
    refused: list[tuple[TracedRequest, str]] = field(default_factory=list)
    steps: list[StepRecord] = field(default_factory=list)
    seconds: float = 0.0
    num_preemptions: int = 0
    num_replicas: int = 1


def simulate(
    trace: Iterable[TracedRequest],
    config: SchedulerConfig,
    cost: CostModel,
    policy: SchedulingPolicy | None = None,
    *,
    max_in_flight: int | None = None,
    host_seconds: float = 0.0,
) -> Simulation:
    """Serves a trace as `jaxllm.engine.Engine` would, on a device whose steps take what `cost` says.

    While the device runs a step the host has planned the next one, as in the engine; where all
    requests are there at the start, the plans are the engine's own, one for one. In a pipeline a step is
    one of all stages, and a plan is complete as many steps later as there are stages after the first.

    Args:
        trace: in order of arrival; read as time goes on, so it may be longer than memory.
        policy: by default the one that `config.policy` names.
        max_in_flight: plans that are outstanding at most. None is one to each stage and one that waits;
            without the latter the device waits for the host.
        host_seconds: time between two steps in which the device waits for the host.
    """
    scheduler = make_scheduler(config, policy)
    simulation = Simulation(num_replicas=config.data_parallel_size)
    arrivals = iter(trace)
    next_arrival = next(arrivals, None)
    traced: dict[str, TracedRequest] = {}
    places: dict[str, int] = {}
    max_in_flight = config.num_stages + 1 if max_in_flight is None else max_in_flight
    in_flight: deque[tuple[Plan, _Steps]] = deque()
    now = device_free = 0.0
    count = 0
    while True:
        while next_arrival is not None and next_arrival.arrival_time <= now:
            request = _as_request(str(count), next_arrival)
            count += 1
            try:
                scheduler.add(request)
                traced[request.request_id] = next_arrival
                places[request.request_id] = place_of(scheduler, request)
            except InvalidRequestError as error:
                simulation.refused.append((next_arrival, str(error)))
            next_arrival = next(arrivals, None)
        while len(in_flight) < max_in_flight and (plan := scheduler.schedule()) is not None:
            start = max(now, device_free)
            # Replicas wait for the one that has most to do.
            computing = [cost.seconds(part) if part else 0.0 for part in plan.of_replicas]
            seconds = max(computing) + host_seconds
            device_free = start + seconds
            in_flight.append((plan, _Steps(seconds)))
            for _, steps in in_flight:
                steps.ends.append(device_free)
            simulation.steps.append(_record_step(plan, now, start, seconds, computing, scheduler))
        if in_flight:
            plan, oldest = in_flight.popleft()
            while len(oldest.ends) < config.num_stages:
                # There is nothing to begin; what has begun goes on.
                device_free += oldest.seconds
                for steps in (oldest, *(steps for _, steps in in_flight)):
                    steps.ends.append(device_free)
            now = max(now, oldest.ends[config.num_stages - 1])
            for update in scheduler.apply(plan, _result(plan, traced)):
                request = update.request
                if request.first_token_time is None:
                    request.first_token_time = now
                if request.status.is_finished:
                    name = request.request_id
                    record = _record_request(traced.pop(name), places.pop(name), request, now)
                    simulation.requests.append(record)
        elif next_arrival is not None:
            now = max(now, next_arrival.arrival_time)
        else:
            break
    simulation.seconds = now
    simulation.num_preemptions = scheduler.num_preemptions
    return simulation


@dataclass(slots=True)
class _Steps:
    """When the steps end that take a plan through the stages; the first takes so many seconds."""

    seconds: float
    ends: list[float] = field(default_factory=list)


def _result(plan: Plan, traced: dict[str, TracedRequest]) -> StepResult:
    """What the device would have sampled."""
    token_ids: list[list[int]] = []
    for request, start, num_tokens, samples in plan.scheduled:
        if not samples:
            token_ids.append([])
            continue
        source = traced.get(request.request_id)  # None: it has ended meanwhile
        index = start + num_tokens - len(request.prompt_token_ids)
        token_ids.append([source.output_token_id(index) if source else 0])
    return StepResult(token_ids, [None] * len(token_ids))


def _as_request(request_id: str, traced: TracedRequest) -> Request:
    return Request(
        request_id=request_id,
        prompt_token_ids=traced.prompt_token_ids(),
        sampling_params=SamplingParams(max_tokens=traced.output_len, ignore_eos=True),
        arrival_time=traced.arrival_time,
        max_tokens=traced.output_len,
        terms=traced.terms,
    )


def _record_request(traced: TracedRequest, replica: int, request: Request, now: float) -> RequestRecord:
    assert request.first_token_time is not None and request.first_scheduled_time is not None
    return RequestRecord(
        traced,
        request.first_scheduled_time,
        (request.first_token_time, now),
        request.num_cached_tokens,
        request.num_preemptions,
        replica,
    )


def _record_step(
    plan: Plan,
    now: float,
    start: float,
    seconds: float,
    computing: list[float],
    scheduler: Scheduler | ReplicatedScheduler,
) -> StepRecord:
    replicas: tuple[ReplicaStep, ...] = ()
    if isinstance(scheduler, ReplicatedScheduler):
        replicas = tuple(
            ReplicaStep(own, replica.num_running, replica.kv_cache_usage)
            for own, replica in zip(computing, scheduler.replicas, strict=True)
        )
    num_prompt_tokens = 0
    for request, first, num_tokens, _ in plan.scheduled:
        if request.first_scheduled_time is None:
            request.first_scheduled_time = now
        # A property would be looked up for every token that is simulated.
        left = len(request.prompt_token_ids) - first
        if left > 0:
            num_prompt_tokens += min(left, num_tokens)
    return StepRecord(
        start,
        seconds,
        num_prompt_tokens,
        plan.num_tokens - num_prompt_tokens,
        scheduler.num_running,
        scheduler.num_waiting,
        scheduler.kv_cache_usage,
        scheduler.num_preemptions,
        replicas,
    )

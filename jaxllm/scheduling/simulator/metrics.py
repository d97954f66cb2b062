"""What a simulation comes to, in a few numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jaxllm.scheduling.simulator.simulate import RequestRecord, Simulation


@dataclass(frozen=True, slots=True)
class Percentiles:
    """A distribution, in seconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Percentiles:
        """Those of some values; NaN where there are none."""
        if not values:
            return cls(*[float("nan")] * 4)
        array = np.asarray(values)
        return cls(float(array.mean()), *(float(x) for x in np.percentile(array, [50, 90, 99])))


@dataclass(frozen=True, slots=True)
class ReplicaSummary:
    """A replica of several in numbers; see `Summary`.

    Attributes:
        device_busy: fraction of the time in which it computed, and waited for no other replica; None where
            that was not recorded.
        kv_cache_usage: fraction of its pages in use, over the time in which steps ran; None likewise.
    """

    num_requests: int
    output_tokens_per_second: float
    ttft: Percentiles
    tpot: Percentiles
    cache_hit_rate: float
    num_preemptions: int
    device_busy: float | None
    kv_cache_usage: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """A simulation in numbers.

    Attributes:
        num_requests, num_refused: how many were served, and how many the scheduler would not take.
        requests_per_second, output_tokens_per_second: over the whole time.
        goodput: requests a second that met their objectives (Zhong et al., DistServe, 2024): the first
            token, and the mean time of the others.
        ttft, tpot, latency: see `RequestRecord`.
        cache_hit_rate: fraction of the prompt tokens that the prefix cache held.
        num_preemptions: times that a request lost its pages.
        device_busy: fraction of the time in which a step ran.
        fairness: Jain's index (Jain et al. 1984) of the tokens per second that tenants got while they
            had requests: 1 is even, 1 / tenants is all for one. 1 where there is one tenant.
        replicas: each of several; none where there is one.
    """

    num_requests: int
    num_refused: int
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    goodput: float
    ttft: Percentiles
    tpot: Percentiles
    latency: Percentiles
    cache_hit_rate: float
    num_preemptions: int
    device_busy: float
    fairness: float
    replicas: tuple[ReplicaSummary, ...] = ()


def summarize(simulation: Simulation, *, ttft: float = 1.0, tpot: float = 0.05) -> Summary:
    """The numbers of a simulation.

    Args:
        ttft, tpot: objectives in seconds, of requests that state none.
    """
    requests = simulation.requests
    seconds = max(simulation.seconds, 1e-9)
    met = sum(_meets_objectives(record, ttft, tpot) for record in requests)
    return Summary(
        num_requests=len(requests),
        num_refused=len(simulation.refused),
        seconds=simulation.seconds,
        requests_per_second=len(requests) / seconds,
        output_tokens_per_second=sum(record.traced.output_len for record in requests) / seconds,
        goodput=met / seconds,
        ttft=Percentiles.of([record.ttft for record in requests]),
        tpot=Percentiles.of([record.tpot for record in requests if record.tpot is not None]),
        latency=Percentiles.of([record.latency for record in requests]),
        cache_hit_rate=_hit_rate(requests),
        num_preemptions=simulation.num_preemptions,
        device_busy=sum(step.seconds for step in simulation.steps) / seconds,
        fairness=_jains_index(requests),
        replicas=tuple(_of_replicas(simulation, seconds)) if simulation.num_replicas > 1 else (),
    )


def _of_replicas(simulation: Simulation, seconds: float) -> Iterator[ReplicaSummary]:
    busy: Sequence[float | None] = [None] * simulation.num_replicas
    usage = busy
    if simulation.steps and simulation.steps[0].replicas:
        computed = np.array([[own.seconds for own in step.replicas] for step in simulation.steps])
        used = np.array([[own.kv_cache_usage for own in step.replicas] for step in simulation.steps])
        busy = (computed.sum(axis=0) / seconds).tolist()
        usage = np.average(used, axis=0, weights=[step.seconds for step in simulation.steps]).tolist()
    for replica in range(simulation.num_replicas):
        own = [record for record in simulation.requests if record.replica == replica]
        yield ReplicaSummary(
            num_requests=len(own),
            output_tokens_per_second=sum(record.traced.output_len for record in own) / seconds,
            ttft=Percentiles.of([record.ttft for record in own]),
            tpot=Percentiles.of([record.tpot for record in own if record.tpot is not None]),
            cache_hit_rate=_hit_rate(own),
            num_preemptions=sum(record.num_preemptions for record in own),
            device_busy=busy[replica],
            kv_cache_usage=usage[replica],
        )


def _hit_rate(requests: Sequence[RequestRecord]) -> float:
    prompt_tokens = sum(record.traced.num_prompt_tokens for record in requests)
    return sum(record.num_cached_tokens for record in requests) / max(prompt_tokens, 1)


def _meets_objectives(record: RequestRecord, ttft: float, tpot: float) -> bool:
    terms = record.traced.terms
    ttft = ttft if terms.ttft_objective is None else terms.ttft_objective
    tpot = tpot if terms.tpot_objective is None else terms.tpot_objective
    return record.ttft <= ttft and (record.tpot is None or record.tpot <= tpot)


def _jains_index(requests: Sequence[RequestRecord]) -> float:
    tokens: defaultdict[str, int] = defaultdict(int)
    spans: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for record in requests:
        tenant = record.traced.terms.tenant
        tokens[tenant] += record.traced.num_prompt_tokens + record.traced.output_len
        spans[tenant].append((record.traced.arrival_time, record.token_times[1]))
    if len(tokens) < 2:
        return 1.0
    rates = np.array([tokens[tenant] / max(_covered(spans[tenant]), 1e-9) for tenant in tokens])
    return float(rates.sum() ** 2 / (len(rates) * (rates**2).sum()))


def _covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, -np.inf
    for start, end in sorted(spans):
        total += max(end - max(start, reached), 0.0)
        reached = max(reached, end)
    return total

"""What the engine counts, and the shape in which `LLM.get_metrics()` and `/metrics` read it.

`EngineStats` is one object per engine. The engine's thread writes it, any other thread reads it:
everything in it only grows (gauges apart), so a reader never drains, and several can read at once.
Recording costs a bisection per observation; nothing is formatted before somebody asks.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from jaxllm.request import Request
from jaxllm.scheduling.plan import Plan, RequestUpdate

PREFIX = "jaxllm:"


class Distribution:
    """A cumulative histogram: how many observations fell into each bucket, and their sum.

    Attributes:
        bounds: upper limits of the buckets, inclusive and ascending; one more bucket is open-ended.
        counts: observations per bucket, `len(bounds) + 1` of them, not accumulated over buckets.
        sum: of all observations.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Iterable[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum: float = 0.0

    def observe(self, value: float) -> None:
        """Count one observation."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def observe_many(self, values: Iterable[float]) -> None:
        """Count several observations; cheaper than `observe` in a loop."""
        bounds, counts, total = self.bounds, self.counts, 0.0
        for value in values:
            counts[bisect_left(bounds, value)] += 1
            total += value
        self.sum += total

    def buckets(self) -> dict[str, int]:
        """Observations at or below each bound, as Prometheus counts them; the last key is "+Inf"."""
        accumulated: dict[str, int] = {}
        total = 0
        for bound, count in zip((*self.bounds, float("inf")), list(self.counts), strict=True):
            total += count
            accumulated["+Inf" if bound == float("inf") else f"{float(bound)}"] = total
        return accumulated


_LATENCY: tuple[float, ...] = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0),
    *(30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
_FIRST_TOKEN: tuple[float, ...] = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_PER_TOKEN: tuple[float, ...] = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
_TOKENS_PER_STEP = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_SEQUENCES = (1, 2, 5, 10, 20)
# Up to the longest contexts that exist: the buckets are made before the model is known.
_TOKENS = tuple(m * 10**e for e in range(7) for m in (1, 2, 5))

FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")


@dataclass(frozen=True, slots=True)
class FinishedRequestStats:
    """One sequence that ended. Times are in seconds; None where the sequence never got so far.

    Attributes:
        finish_reason: one of `FINISH_REASONS`.
        num_generation_tokens: tokens sampled for this sequence.
        max_tokens: output tokens it was allowed.
        n: sequences of its user request; None for all of them but one, so that each request counts once.
        e2e_time: from arrival to the end.
        queue_time: from arrival to the first step that computed something of it.
        prefill_time: from that step to the first token.
        decode_time: from the first token to the last.
        inference_time: prefill and decode together.
    """

    finish_reason: str
    num_prompt_tokens: int
    num_generation_tokens: int
    max_tokens: int
    n: int | None
    e2e_time: float
    queue_time: float | None = None
    prefill_time: float | None = None
    decode_time: float | None = None
    inference_time: float | None = None

    @classmethod
    def from_times(
        cls,
        *,
        finish_reason: str,
        num_prompt_tokens: int,
        num_generation_tokens: int,
        max_tokens: int,
        n: int | None,
        arrival_time: float,
        first_scheduled_time: float | None,
        first_token_time: float | None,
        last_token_time: float | None,
        finished_time: float,
    ) -> FinishedRequestStats:
        """The durations between points of one clock, in seconds; None for what did not happen."""

        def between(start: float | None, end: float | None) -> float | None:
            return None if start is None or end is None else max(0.0, end - start)

        return cls(
            finish_reason=finish_reason,
            num_prompt_tokens=num_prompt_tokens,
            num_generation_tokens=num_generation_tokens,
            max_tokens=max_tokens,
            n=n,
            e2e_time=max(0.0, finished_time - arrival_time),
            queue_time=between(arrival_time, first_scheduled_time),
            prefill_time=between(first_scheduled_time, first_token_time),
            decode_time=between(first_token_time, last_token_time),
            inference_time=between(first_scheduled_time, last_token_time),
        )


@dataclass(frozen=True, slots=True)
class ReplicaStats:
    """What a replica of several says of itself; names are those of `EngineStats`."""

    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int


@dataclass(slots=True)
class EngineStats:
    """Everything an engine counts, since it started.

    Attributes:
        replicas: what each says of itself, where there are several; the same is here of all together.
        num_requests_running: sequences in the running batch (gauge).
        num_requests_waiting: sequences that wait to be scheduled (gauge).
        kv_cache_usage: share of the KV pages that hold a running request's tokens, 0 to 1 (gauge).
        prompt_tokens: prompt tokens computed or found in the prefix cache.
        generation_tokens: tokens sampled.
        prefix_cache_queries: tokens looked up in the prefix cache.
        prefix_cache_hits: of these, tokens found.
        num_preemptions: sequences that lost their pages and were computed again.
        request_success: sequences that ended, by finish reason.
        cache_config: labels of the `cache_config_info` gauge, such as block_size and num_gpu_blocks.
        iteration_tokens: tokens computed per step.
        time_to_first_token: arrival to first token, seconds.
        inter_token_latency: between two tokens of a sequence, seconds.
    """

    replicas: list[ReplicaStats] = field(default_factory=list)
    num_requests_running: int = 0
    num_requests_waiting: int = 0
    kv_cache_usage: float = 0.0

    prompt_tokens: int = 0
    generation_tokens: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
    num_preemptions: int = 0
    request_success: dict[str, int] = field(default_factory=lambda: dict.fromkeys(FINISH_REASONS, 0))
    cache_config: dict[str, str] = field(default_factory=dict)

    iteration_tokens: Distribution = field(default_factory=lambda: Distribution(_TOKENS_PER_STEP))
    time_to_first_token: Distribution = field(default_factory=lambda: Distribution(_FIRST_TOKEN))
    inter_token_latency: Distribution = field(default_factory=lambda: Distribution(_PER_TOKEN))
    time_per_output_token: Distribution = field(default_factory=lambda: Distribution(_PER_TOKEN))
    request_prompt_tokens: Distribution = field(default_factory=lambda: Distribution(_TOKENS))
    request_generation_tokens: Distribution = field(default_factory=lambda: Distribution(_TOKENS))
    request_max_tokens: Distribution = field(default_factory=lambda: Distribution(_TOKENS))
    request_n: Distribution = field(default_factory=lambda: Distribution(_SEQUENCES))
    e2e_time: Distribution = field(default_factory=lambda: Distribution(_LATENCY))
    queue_time: Distribution = field(default_factory=lambda: Distribution(_LATENCY))
    inference_time: Distribution = field(default_factory=lambda: Distribution(_LATENCY))
    prefill_time: Distribution = field(default_factory=lambda: Distribution(_LATENCY))
    decode_time: Distribution = field(default_factory=lambda: Distribution(_LATENCY))

    def record_step(self, *, num_tokens: int, prompt_tokens: int, generation_tokens: int) -> None:
        """Count one step.

        Args:
            num_tokens: positions that the step computed.
            prompt_tokens: prompt tokens of sequences whose prompt this step completed.
            generation_tokens: tokens that it sampled.
        """
        self.iteration_tokens.observe(num_tokens)
        self.prompt_tokens += prompt_tokens
        self.generation_tokens += generation_tokens

    def record_finished(self, finished: FinishedRequestStats) -> None:
        """Count one sequence that ended."""
        reason = finished.finish_reason
        self.request_success[reason] = self.request_success.get(reason, 0) + 1
        self.request_prompt_tokens.observe(finished.num_prompt_tokens)
        self.request_generation_tokens.observe(finished.num_generation_tokens)
        self.request_max_tokens.observe(finished.max_tokens)
        if finished.n is not None:
            self.request_n.observe(finished.n)
        self.e2e_time.observe(finished.e2e_time)
        if finished.queue_time is not None:
            self.queue_time.observe(finished.queue_time)
        if finished.prefill_time is not None:
            self.prefill_time.observe(finished.prefill_time)
        if finished.inference_time is not None:
            self.inference_time.observe(finished.inference_time)
        if finished.decode_time is not None:
            self.decode_time.observe(finished.decode_time)
            if finished.num_generation_tokens > 1:
                self.time_per_output_token.observe(
                    finished.decode_time / (finished.num_generation_tokens - 1)
                )


@dataclass(slots=True)
class Metric:
    """One figure with its name (prefix `jaxllm:`) and labels."""

    name: str
    labels: dict[str, str]


@dataclass(slots=True)
class Counter(Metric):
    """A figure that only grows."""

    value: int


@dataclass(slots=True)
class Gauge(Metric):
    """A figure that goes up and down."""

    value: float


@dataclass(slots=True)
class Histogram(Metric):
    """Observations by size.

    Attributes:
        count: observations in all.
        sum: of all observations.
        buckets: from a bucket's upper limit to the observations at or below it; the last key is "+Inf".
    """

    count: int
    sum: float
    buckets: dict[str, int]


# Name (without prefix) -> what it says. The one list that every reader of the figures goes by.
DESCRIPTIONS: dict[str, str] = {
    "num_requests_running": "Sequences in the running batch.",
    "num_requests_waiting": "Sequences that wait to be scheduled.",
    "kv_cache_usage_perc": "Share of the KV cache in use, 1 is all of it.",
    "cache_config_info": "Figures of the KV cache, as labels.",
    "prefix_cache_queries": "Tokens looked up in the prefix cache.",
    "prefix_cache_hits": "Tokens found in the prefix cache.",
    "num_preemptions": "Sequences preempted.",
    "prompt_tokens": "Prompt tokens processed.",
    "generation_tokens": "Tokens generated.",
    "request_success": "Sequences that ended, by finish reason.",
    "iteration_tokens_total": "Tokens computed per engine step.",
    "request_prompt_tokens": "Prompt tokens per sequence.",
    "request_generation_tokens": "Tokens generated per sequence.",
    "request_params_max_tokens": "The max_tokens that requests asked for.",
    "request_params_n": "The n that requests asked for.",
    "time_to_first_token_seconds": "Seconds from arrival to the first token.",
    "inter_token_latency_seconds": "Seconds between two tokens of a sequence.",
    "request_time_per_output_token_seconds": "Mean seconds per token after the first, per sequence.",
    "e2e_request_latency_seconds": "Seconds from arrival to the end.",
    "request_queue_time_seconds": "Seconds from arrival to the first step.",
    "request_inference_time_seconds": "Seconds from the first step to the last token.",
    "request_prefill_time_seconds": "Seconds from the first step to the first token.",
    "request_decode_time_seconds": "Seconds from the first token to the last.",
}


def snapshot_metrics(stats: EngineStats, labels: dict[str, str] | None = None) -> list[Metric]:
    """The figures of now, in vLLM's names and shape (prefix `jaxllm:`).

    Of several replicas what they count themselves is there for each, with its number as the label "engine".
    The rest is of all of them.

    Args:
        labels: put on every metric, for example `{"model_name": ..., "engine": "0"}`.
    """
    return list(_snapshot(stats, labels or {}))


def _snapshot(stats: EngineStats, labels: dict[str, str]) -> Iterator[Metric]:
    def gauge(name: str, value: float, **extra: str) -> Gauge:
        return Gauge(PREFIX + name, {**labels, **extra}, value)

    def counter(name: str, value: int, **extra: str) -> Counter:
        return Counter(PREFIX + name, {**labels, **extra}, value)

    def histogram(name: str, distribution: Distribution) -> Histogram:
        buckets = distribution.buckets()
        return Histogram(PREFIX + name, dict(labels), buckets["+Inf"], distribution.sum, buckets)

    if stats.cache_config:
        yield gauge("cache_config_info", 1, **stats.cache_config)
    each: Sequence[ReplicaStats | EngineStats] = stats.replicas or [stats]
    for index, of_one in enumerate(each):
        engine = {"engine": str(index)} if stats.replicas else {}
        yield gauge("num_requests_running", of_one.num_requests_running, **engine)
        yield gauge("num_requests_waiting", of_one.num_requests_waiting, **engine)
        yield gauge("kv_cache_usage_perc", of_one.kv_cache_usage, **engine)
        yield counter("prefix_cache_queries", of_one.prefix_cache_queries, **engine)
        yield counter("prefix_cache_hits", of_one.prefix_cache_hits, **engine)
        yield counter("num_preemptions", of_one.num_preemptions, **engine)
    yield counter("prompt_tokens", stats.prompt_tokens)
    yield counter("generation_tokens", stats.generation_tokens)
    for reason, count in list(stats.request_success.items()):
        yield counter("request_success", count, finished_reason=reason)
    yield histogram("iteration_tokens_total", stats.iteration_tokens)
    yield histogram("request_prompt_tokens", stats.request_prompt_tokens)
    yield histogram("request_generation_tokens", stats.request_generation_tokens)
    yield histogram("request_params_max_tokens", stats.request_max_tokens)
    yield histogram("request_params_n", stats.request_n)
    yield histogram("time_to_first_token_seconds", stats.time_to_first_token)
    yield histogram("inter_token_latency_seconds", stats.inter_token_latency)
    yield histogram("request_time_per_output_token_seconds", stats.time_per_output_token)
    yield histogram("e2e_request_latency_seconds", stats.e2e_time)
    yield histogram("request_queue_time_seconds", stats.queue_time)
    yield histogram("request_inference_time_seconds", stats.inference_time)
    yield histogram("request_prefill_time_seconds", stats.prefill_time)
    yield histogram("request_decode_time_seconds", stats.decode_time)


def record_step(stats: EngineStats, plan: Plan, updates: Sequence[RequestUpdate], now: float) -> None:
    """Count what one applied step brought; notes on the requests when their tokens came.

    Args:
        now: when the step's tokens were known, seconds of `time.monotonic()`.
    """
    prompt_tokens = generation_tokens = 0
    gaps = []
    for update in updates:
        request = update.request
        if update.new_token_ids:
            generation_tokens += len(update.new_token_ids)
            if request.last_token_time is None:
                request.first_token_time = now
                prompt_tokens += request.num_prompt_tokens
                stats.time_to_first_token.observe(now - request.arrival_time)
            else:
                gaps.append(now - request.last_token_time)
            request.last_token_time = now
        if request.status.is_finished:
            if request.pooling_params is not None:
                prompt_tokens += request.num_prompt_tokens
            record_end(stats, request, now)
    stats.inter_token_latency.observe_many(gaps)
    stats.record_step(
        num_tokens=plan.num_tokens, prompt_tokens=prompt_tokens, generation_tokens=generation_tokens
    )


def record_end(stats: EngineStats, request: Request, now: float) -> None:
    """Count a sequence that ended."""
    is_first = request.group_id is None or request.request_id == f"0_{request.group_id}"
    stats.record_finished(
        FinishedRequestStats.from_times(
            finish_reason=request.status.finish_reason or "abort",
            num_prompt_tokens=request.num_prompt_tokens,
            num_generation_tokens=len(request.token_ids) - request.num_prompt_tokens,
            max_tokens=request.max_tokens,
            n=request.sampling_params.n if is_first else None,
            arrival_time=request.arrival_time,
            first_scheduled_time=request.first_scheduled_time,
            first_token_time=request.first_token_time,
            last_token_time=request.last_token_time,
            finished_time=now,
        )
    )

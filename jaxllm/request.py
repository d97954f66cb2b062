"""A request as the engine sees it: token ids, parameters, and how far it has come."""

from __future__ import annotations

import enum
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Protocol

from jaxllm.errors import InvalidRequestError
from jaxllm.pooling_params import PoolingParams
from jaxllm.sampling_params import SamplingParams


class RequestStatus(enum.Enum):
    """Where a request stands. Every request ends in one of the `FINISHED_*` states."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED_STOPPED = "stop"
    FINISHED_LENGTH = "length"
    FINISHED_ABORTED = "abort"
    FINISHED_ERROR = "error"
    FINISHED_REPETITION = "repetition"

    @property
    def is_finished(self) -> bool:
        return self in _FINISHED

    @property
    def finish_reason(self) -> str | None:
        """The OpenAI finish reason, or None while the request is alive."""
        return self.value if self in _FINISHED else None


_FINISHED = frozenset(s for s in RequestStatus if s.name.startswith("FINISHED"))


@dataclass(frozen=True, slots=True)
class SchedulingTerms:
    """How a request wants to be served. Which of it counts is up to the scheduling policy.

    Attributes:
        priority: lower is more urgent.
        tenant: who is served.
        ttft_objective: seconds after the arrival by which the first token is wanted.
        tpot_objective: seconds within which each further token is wanted.

    Raises:
        InvalidRequestError: a value of the wrong type or out of range.
    """

    priority: int = 0
    tenant: str = ""
    ttft_objective: float | None = None
    tpot_objective: float | None = None

    def __post_init__(self) -> None:
        if type(self.priority) is not int:
            raise InvalidRequestError(
                f"priority must be an integer; got {self.priority!r}.", param="priority"
            )
        if not isinstance(self.tenant, str):
            raise InvalidRequestError(f"tenant must be a string; got {self.tenant!r}.", param="tenant")
        for name in ("ttft_objective", "tpot_objective"):
            value = getattr(self, name)
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if value is not None and not (is_number and 0 < value < math.inf):
                raise InvalidRequestError(
                    f"{name} must be a number of seconds above 0; got {value!r}.", param=name
                )

    def given(self) -> dict[str, object]:
        """What differs from saying nothing."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}


NO_TERMS = SchedulingTerms()


class OutputGrammar(Protocol):
    """What an output must match, and how far it has come; see `jaxllm.text.grammar`."""

    @property
    def is_complete(self) -> bool:
        """Whether nothing but the end of the sequence can follow."""

    def accept(self, token_id: int) -> str | None:
        """Takes the next token of the output; says what is wrong where it may not follow."""


@dataclass(eq=False, slots=True)
class Request:
    """One sequence to complete. A user's request with `n > 1` becomes n of these.

    The first block of fields is what was asked and never changes. The second is progress:
    it belongs to the `Scheduler`, and everybody else only reads it.

    Attributes:
        request_id: unique among unfinished requests.
        prompt_token_ids: at least one id.
        eos_token_ids: ids that end the sequence unless `sampling_params.ignore_eos`.
        max_tokens: output tokens allowed, already capped by the room left in max_model_len.
        seed: seed of this sequence's random draws; a draw depends on it and on the position alone,
            so that batching and preemption do not change what is sampled.
        terms: how it wants to be scheduled.
        cache_salt: requests share cached pages only with requests of the same salt.
        group_id: common to the n sequences of one user request, which share prompt pages
            even where prefix caching is off; None where n is 1.
        needs_host_tokens: whether the host must know every token before it can say what the next one may be
            (bad words, a grammar); such a request is computed with its newest token still in flight as any
            other, and sampled late.
        pooling_params: of a request to a pooling model, which ends with its prompt; None where text is
            generated.
        token_type_ids: type of each prompt token; None is type 0 throughout.
        trace_headers: headers of W3C Trace Context that came with it, where spans are recorded.
        grammar: what the output must match; it has seen the output tokens that `token_ids` holds, so that
            a preempted request goes on where it was.
        token_ids: prompt and output tokens known to the host, in order.
        num_pending_tokens: tokens sampled by steps still in flight, not yet in `token_ids`.
        num_computed_tokens: positions whose keys and values are in the cache, or will be once
            the steps in flight have run.
        first_scheduled_time: when a plan first held it, in seconds of `time.monotonic()`; set by the engine.
        first_token_time, last_token_time: when its first and its newest token were known; set by the engine.
        num_cached_tokens: prompt tokens found in the prefix cache at the first admission.
        pages: page ids holding positions [0, len(pages) * page_size), in order; while the
            request runs the list only grows.
        error: why the request failed, where it did.
    """

    request_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    arrival_time: float = 0.0
    eos_token_ids: frozenset[int] = frozenset()
    max_tokens: int = 16
    seed: int = 0
    terms: SchedulingTerms = NO_TERMS
    cache_salt: str | None = None
    group_id: str | None = None
    needs_host_tokens: bool = False
    pooling_params: PoolingParams | None = None
    token_type_ids: list[int] | None = None
    grammar: OutputGrammar | None = None
    trace_headers: Mapping[str, str] | None = None

    status: RequestStatus = RequestStatus.WAITING
    token_ids: list[int] = field(default_factory=list)
    num_pending_tokens: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    pages: list[int] = field(default_factory=list)
    stop_reason: int | str | None = None
    error: str | None = None

    def __post_init__(self) -> None:
        if not self.token_ids:
            self.token_ids = list(self.prompt_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, including those still in flight."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        """Output tokens that exist, including those still in flight."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

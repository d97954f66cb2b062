"""What passes between the scheduler and the runner: plain data, a plan down and a result up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxllm.request import Request


class ScheduledRequest(NamedTuple):
    """A run of positions of one request to compute in one step.

    Attributes:
        request: read-only for the runner.
        start: first position to compute.
        num_tokens: positions [start, start + num_tokens) are computed. Where this reaches past
            `len(request.token_ids)`, the last token is still in flight and lives on the device.
        samples: whether the last position's logits yield the next token.
    """

    request: Request
    start: int
    num_tokens: int
    samples: bool


Copies = tuple[tuple[int, int], ...]
"""Pages to copy, each from the first to the second."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One step's work.

    Attributes:
        step_id: counts up from 0.
        scheduled: what to compute, each request at most once.
        released: requests that stopped running since the last plan (finished, aborted or
            preempted). The runner drops what it keeps for them before it looks at `scheduled`,
            where a preempted one may already stand again.
        num_tokens: sum of `num_tokens` over `scheduled`.
        copies_out: pages of the device to copy to pages of the host, before anything else.
        copies_in: pages of the host to copy to pages of the device, after that and before the step.
        parts: with several replicas the plan of each, None for one that has nothing to do. What stands
            above is then of all of them, one after the other, and pages are counted through all replicas.
    """

    step_id: int
    scheduled: tuple[ScheduledRequest, ...]
    released: tuple[Request, ...]
    num_tokens: int
    copies_out: Copies = ()
    copies_in: Copies = ()
    parts: tuple[Plan | None, ...] = ()

    @property
    def of_replicas(self) -> tuple[Plan | None, ...]:
        """The plan of each replica, of which there may be one."""
        return self.parts or (self,)


class TokenLogprobs(NamedTuple):
    """Log-probabilities at one position.

    Attributes:
        logprob: of the token that stands there (sampled, or the prompt's own).
        rank: of that token among the vocabulary, from 1.
        top_ids: int32[k], most probable ids first.
        top_logprobs: float32[k].
    """

    logprob: float
    rank: int
    top_ids: np.ndarray
    top_logprobs: np.ndarray


@dataclass(slots=True)
class StepResult:
    """What the device returned for a plan, row i for `plan.scheduled[i]`.

    Attributes:
        token_ids: newly sampled ids per scheduled request; empty where nothing was sampled.
        logprobs: per scheduled request one entry for each id in `token_ids`, or None where
            the request did not ask.
        prompt_logprobs: for requests that asked, by row: entries for the prompt positions
            `start + 1 ...` that this step's logits predict, in order.
        pooled: for requests of a pooling model, by row: float32[D] where the prompt is complete, or
            float32[num_tokens, D] of the tokens that this step computed.
    """

    token_ids: list[list[int]]
    logprobs: list[list[TokenLogprobs] | None]
    prompt_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    pooled: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass(slots=True)
class RequestUpdate:
    """What one applied step changed for one request; `Scheduler.apply` returns a list of these.

    `request.status` says whether it finished. `new_token_ids` holds what was appended to it, `pooled` what
    a pooling model made of it, or of its tokens from position `pooled_start` on.
    """

    request: Request
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    pooled: np.ndarray | None = None
    pooled_start: int = 0

"""Batches under way on the devices, and what the host is told of them once they are through."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from jaxllm.execution.batch import HostBatch, StepShape
from jaxllm.execution.sampler import Logprobs
from jaxllm.execution.step import StepOutput
from jaxllm.request import Request
from jaxllm.scheduling.plan import Plan, StepResult, TokenLogprobs


@dataclass(slots=True)
class Packed:
    """Where the scheduled requests of a plan stand in its step, by their place in `plan.scheduled`.

    Attributes:
        replicas: how many there are.
        rows: of each among the sequences of all replicas.
        token_rows: the first row of each among the tokens of all replicas.
        prompt_rows: the same, of those that report prompt logprobs.
        reports_prompts, wants_logprobs: whether anybody wants these, or others.
    """

    replicas: int
    reports_prompts: bool
    rows: list[int] = field(default_factory=list)
    token_rows: list[int] = field(default_factory=list)
    prompt_rows: dict[int, int] = field(default_factory=dict)
    wants_logprobs: bool = False

    def shape_of_all(self, shape: StepShape) -> StepShape:
        """A step's shape, of all replicas together."""
        return shape._replace(
            num_tokens=shape.num_tokens * self.replicas, num_seqs=shape.num_seqs * self.replicas
        )

    def move(self, old: StepShape, new: StepShape) -> None:
        """To where everything stands once the batches are resized from a shape to another one."""
        if self.replicas > 1:
            self.rows = [_moved(row, old.num_seqs, new.num_seqs) for row in self.rows]
            self.token_rows = [_moved(row, old.num_tokens, new.num_tokens) for row in self.token_rows]
            tokens = self.prompt_rows.items()
            self.prompt_rows = {i: _moved(row, old.num_tokens, new.num_tokens) for i, row in tokens}


def _moved(row: int, old: int, new: int) -> int:
    """A row of a replica, where each has `new` rows rather than `old`."""
    replica, at = divmod(row, old)
    return replica * new + at


class Pending(ABC):
    """A plan that was launched; `result` waits for the device.

    Args:
        shape: of the step that it was launched in, were it alone.
        advance: launches what comes next, for a plan that waits for its masks, or is on its way through the
            stages of a pipeline.

    Attributes:
        shape: what that step was compiled for, of all replicas together.
        output: waits for that of what completes it; None before that is launched.
    """

    def __init__(self, plan: Plan, shape: StepShape, packed: Packed, advance: Callable[[], None]) -> None:
        self.shape = packed.shape_of_all(shape)
        self.output: Callable[[], Any] | None = None
        self._plan = plan
        self._packed = packed
        self._advance = advance

    def result(self) -> StepResult:
        """What the devices made of the plan. Stages that nobody gives anything to do run empty meanwhile."""
        while self.output is None:
            self._advance()
        return self._read(self.output())

    @abstractmethod
    def _read(self, output: Any) -> StepResult:
        """The output, on the host."""


class PendingResult(Pending):
    """A plan of a model that generates."""

    def _read(self, output: StepOutput) -> StepResult:
        """The sampled tokens, and the log-probabilities that somebody asked for."""
        scheduled, packed = self._plan.scheduled, self._packed
        sampled = np.asarray(output.token_ids).tolist()
        token_ids = [
            [sampled[row]] if entry.samples else [] for entry, row in zip(scheduled, packed.rows, strict=True)
        ]
        logprobs: list[list[TokenLogprobs] | None] = [None] * len(scheduled)
        if packed.wants_logprobs:
            of_sampled = _LogprobRows(output.logprobs)
            for index, (entry, row) in enumerate(zip(scheduled, packed.rows, strict=True)):
                wanted = entry.request.sampling_params.logprobs
                if wanted is not None and entry.samples:
                    logprobs[index] = [of_sampled.at(row, wanted)]
        result = StepResult(token_ids, logprobs)
        if packed.prompt_rows and output.prompt_logprobs is not None:
            of_prompts = _LogprobRows(output.prompt_logprobs)
            for index, first in packed.prompt_rows.items():
                entry = scheduled[index]
                count = min(entry.num_tokens, entry.request.num_prompt_tokens - 1 - entry.start)
                wanted = entry.request.sampling_params.prompt_logprobs or 0
                result.prompt_logprobs[index] = [of_prompts.at(first + i, wanted) for i in range(count)]
        return result


class _LogprobRows:
    """Log-probabilities of a batch on the host."""

    def __init__(self, logprobs: Logprobs) -> None:
        self.chosen, self.rank, self.top_ids, self.top = (np.asarray(x) for x in logprobs)

    def at(self, row: int, wanted: int) -> TokenLogprobs:
        k = self.top.shape[1] if wanted < 0 else wanted
        return TokenLogprobs(
            float(self.chosen[row]), int(self.rank[row]), self.top_ids[row, :k], self.top[row, :k]
        )


class LateRow(NamedTuple):
    """A sequence that a step leaves out and `sample_late` samples for.

    Attributes:
        row: among the sequences of all replicas.
        length: tokens that it has before.
    """

    request: Request
    row: int
    length: int


@dataclass(slots=True)
class Launched:
    """A plan packed, on its way through the stages of a pipeline, or through the one that there is.

    Attributes:
        shape: the cheapest that it fits into.
        batches: of each replica, in that shape.
        num_tokens, num_seqs: of the replica that has most.
        decode_only: see `StepShape`.
        late: whether some of them are sampled late.
        slots: to be freed once it is through, of sequences that were preempted meanwhile.
    """

    plan: Plan
    shape: StepShape
    batches: list[HostBatch]
    num_tokens: int
    num_seqs: int
    decode_only: bool
    late: bool
    packed: Packed
    pending: Pending
    slots: list[int] = field(default_factory=list)


@dataclass(slots=True)
class HalfDone:
    """A plan whose step is launched, and whose late rows are not sampled yet.

    Attributes:
        batches: of each replica, in the shape of that step.
        rows: the late ones.
        masks: that were begun, see `TokenMasks`; None before that.
    """

    pending: Pending
    batches: list[HostBatch]
    rows: list[LateRow]
    masks: Future[np.ndarray | None] | None = None

    @property
    def num_seqs(self) -> int:
        """Rows of each replica."""
        return self.batches[0].shape.num_seqs

    def late_rows(self) -> list[LateRow]:
        """Those that are still to get a token; the host knows what comes before it, of each of them."""
        rows = [late for late in self.rows if not late.request.status.is_finished]
        assert all(len(late.request.token_ids) == late.length for late in rows)
        return rows

"""Reads a recorded schedule: what every step computed, what became of every request, what it cost."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.config import SchedulerConfig
from jaxllm.request import RequestStatus, SchedulingTerms
from jaxllm.scheduling.recording.blocks import HashedRequest, SharedPrefixes
from jaxllm.scheduling.recording.lines import read_lines
from jaxllm.scheduling.recording.schedule_recorder import VERSION
from jaxllm.scheduling.simulator.fitted import FittedCost, RecordedStep
from jaxllm.scheduling.simulator.simulate import RequestRecord, Simulation, StepRecord
from jaxllm.scheduling.simulator.trace import TracedRequest
from jaxllm.scheduling.simulator.work import Shape


@dataclass(slots=True)
class Run:
    """Steps in a row in which a request was computed: one chunk of a prompt, or any number of decodes.

    Attributes:
        first_step: index of the first of them.
        start: first position that it computes.
        num_tokens: of each step.
        samples: whether a token follows.
    """

    first_step: int
    num_steps: int
    start: int
    num_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        """The position after the last one computed."""
        return self.start + self.num_steps * self.num_tokens

    @property
    def decodes(self) -> bool:
        """Whether each step computes a single token, from which the next follows."""
        return self.num_tokens == 1 and self.samples


@dataclass(slots=True)
class RecordedRequest:
    """What became of a request. Times in seconds from the first arrival; NaN for what did not happen.

    Attributes:
        replica: that served it.
        runs: the steps that computed it, in order.
        preempted: indices of the steps for which it lost its pages.
        output_len: tokens that it generated.
        blocks: names of its blocks; see `HashedRequest`.
    """

    number: int
    request_id: str
    arrival_time: float
    num_prompt_tokens: int
    max_tokens: int
    terms: SchedulingTerms
    replica: int = 0
    runs: list[Run] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    first_token_time: float = math.nan
    last_token_time: float = math.nan
    end_time: float = math.nan
    status: RequestStatus = RequestStatus.WAITING
    output_len: int = 0
    num_cached_tokens: int = 0
    blocks: str = ""

    def run_at(self, step: int) -> Run | None:
        """The run that holds a step, by its index."""
        index = bisect_right(self.runs, step, key=attrgetter("first_step")) - 1
        run = self.runs[index] if index >= 0 else None
        return run if run is not None and step < run.first_step + run.num_steps else None


class Row(NamedTuple):
    """A request's part of a step: positions `start` to before `start + num_tokens`."""

    request: RecordedRequest
    start: int
    num_tokens: int
    samples: bool

    @property
    def num_prompt_tokens(self) -> int:
        """How many of the tokens are of the prompt."""
        return min(max(self.request.num_prompt_tokens - self.start, 0), self.num_tokens)


@dataclass(slots=True)
class RecordedPlan:
    """One step. Times in seconds from the first arrival.

    Attributes:
        planned: when it was launched.
        ended: when its result was known; NaN where the recording ends before.
        seconds: from the end of the step before it, or from its own launch where that came later.
        num_pages: in use once it was planned.
        pages_out, pages_in: copied to the host's memory, and back.
        numbers: of the requests that it computes.
        preempted: numbers of the requests that lost their pages since the plan before.
    """

    planned: float
    shape: Shape
    num_running: int
    num_waiting: int
    num_pages: int
    pages_out: int
    pages_in: int
    numbers: tuple[int, ...]
    preempted: tuple[int, ...]
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    ended: float = math.nan
    seconds: float = math.nan


@dataclass(slots=True)
class Schedule:
    """A recorded schedule.

    Attributes:
        header: what the recording says of its engine.
        requests: by number, in order of arrival at the engine.
        steps: in order.
    """

    header: dict[str, Any]
    config: SchedulerConfig
    requests: dict[int, RecordedRequest] = field(default_factory=dict)
    steps: list[RecordedPlan] = field(default_factory=list)

    def rows(self, step: int) -> Iterator[Row]:
        """What the step of that index computes."""
        for number in self.steps[step].numbers:
            request = self.requests[number]
            run = request.run_at(step)
            assert run is not None
            start = run.start + (step - run.first_step) * run.num_tokens
            yield Row(request, start, run.num_tokens, run.samples)

    @property
    def num_replicas(self) -> int:
        """Replicas of the model, each with the limits of `config`."""
        return self.config.data_parallel_size

    @property
    def num_usable_pages(self) -> int:
        """Pages of all replicas that can be handed out."""
        return self.num_replicas * (self.config.num_pages - 1)

    def trace(self) -> dict[int, TracedRequest]:
        """The requests that generated anything, by number, to be simulated; in order of arrival."""
        prefixes = SharedPrefixes()
        traced = {}
        for request in sorted(self.requests.values(), key=attrgetter("arrival_time")):
            if not request.output_len:
                continue
            hashed = HashedRequest(
                request.arrival_time,
                request.num_prompt_tokens,
                request.output_len,
                self.config.page_size,
                request.blocks,
                request.terms,
            )
            traced[request.number] = TracedRequest.from_hashed(hashed, prefixes)
        return traced

    def timed_steps(self) -> list[RecordedStep]:
        """The steps that ran to their end; of several replicas the one that the others waited for."""
        return [
            RecordedStep(step.shape, self._longest_runs(index), step.pages_out + step.pages_in, step.seconds)
            for index, step in enumerate(self.steps)
            if step.seconds > 0
        ]

    def _longest_runs(self, step: int) -> tuple[tuple[int, int], ...]:
        """The runs of the replica with most pairs of a query and a key; all computed as many tokens."""
        runs: list[list[tuple[int, int]]] = [[] for _ in range(self.num_replicas)]
        for row in self.rows(step):
            runs[row.request.replica].append((row.start, row.num_tokens))
        return tuple(max(runs, key=lambda own: sum(n * start + n * (n + 1) // 2 for start, n in own)))

    def cost(self) -> FittedCost:
        """The price of steps as they were here; shapes that never ran are priced by their tokens.

        The fit leaves out steps that something else has slowed down. They are part of what happened, so
        all prices are raised until the steps together take as long as they did.

        Raises:
            ValueError: no step was recorded to its end.
        """
        steps = self.timed_steps()
        shapes = [Shape(tokens, seqs, decodes) for tokens, seqs, decodes in self.header.get("shapes", ())]
        return FittedCost.fit(steps).scaled_to(steps).extended(shapes)

    def as_simulation(self) -> Simulation:
        """What happened, in the form in which the simulator says what would have."""
        traced = self.trace()
        ended = [r for r in self.requests.values() if r.number in traced]
        simulation = Simulation(num_replicas=self.num_replicas)
        for request in sorted(ended, key=attrgetter("end_time")):
            simulation.requests.append(
                RequestRecord(
                    traced[request.number],
                    self.steps[request.runs[0].first_step].planned,
                    (request.first_token_time, request.last_token_time),
                    request.num_cached_tokens,
                    len(request.preempted),
                    request.replica,
                )
            )
        usable = self.num_usable_pages
        for step in self.steps:
            if math.isnan(step.seconds):
                break
            simulation.num_preemptions += len(step.preempted)
            simulation.steps.append(
                StepRecord(
                    step.ended - step.seconds,
                    step.seconds,
                    step.num_prompt_tokens,
                    step.num_tokens - step.num_prompt_tokens,
                    step.num_running,
                    step.num_waiting,
                    step.num_pages / usable,
                    simulation.num_preemptions,
                )
            )
            simulation.seconds = step.ended
        return simulation


def read_schedule(path: Path) -> Schedule:
    """A schedule that `ScheduleRecorder` wrote; one that breaks off is read as far as it goes.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no recorded schedule, or of another version, or a line of it is wrong.
    """
    lines = read_lines(path)
    try:
        header = json.loads(next(lines, b"null"))
        version = header["jaxllm_schedule"]
        config = SchedulerConfig(**header["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no schedule that --record-schedule wrote ({error!r})") from error
    if version != VERSION:
        raise ValueError(f"{path} has version {version} of the format; this program reads {VERSION}")
    reader = _Reader(Schedule(header, config))
    for number, line in enumerate(lines, start=2):
        try:
            kind, *fields = json.loads(line)
            getattr(reader, f"take_{kind}")(*fields)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}") from error
    return reader.finish()


class _Reader:
    """Puts a schedule together, line by line."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._decoding: tuple[int, ...] = ()
        self._index_of: dict[int, int] = {}  # of the steps whose results are still to come
        self._first_tokens: defaultdict[int, list[RecordedRequest]] = defaultdict(list)
        self._last_end = -math.inf

    def take_arrival(
        self,
        number: int,
        request_id: str,
        micros: int,
        prompt: int,
        max_tokens: int,
        terms: dict[str, Any],
        replica: int,
    ) -> None:
        if not 0 <= replica < self._schedule.num_replicas:
            raise ValueError(f"replica {replica} of {self._schedule.num_replicas}")
        self._schedule.requests[number] = RecordedRequest(
            number, request_id, micros / 1e6, prompt, max_tokens, SchedulingTerms(**terms), replica
        )

    def take_plan(
        self,
        step_id: int,
        micros: int,
        shape: list[Any],
        state: list[int],
        decoding: list[int] | None,
        others: list[list[int]],
        preempted: list[int],
    ) -> None:
        if decoding is not None:
            self._decoding = tuple(decoding)
        requests = self._schedule.requests
        numbers = (*self._decoding, *(number for number, *_ in others)) if others else self._decoding
        running, waiting, pages, out, back = state
        step = RecordedPlan(
            micros / 1e6, Shape(*shape), running, waiting, pages, out, back, numbers, tuple(preempted)
        )
        index = self._index_of[step_id] = len(self._schedule.steps)
        self._schedule.steps.append(step)
        for number in preempted:
            requests[number].preempted.append(index)
        for number in self._decoding:
            request = requests[number]
            last = request.runs[-1] if request.runs else None
            start = last.end if last else 0
            if last and last.decodes and last.first_step + last.num_steps == index:
                last.num_steps += 1
            else:
                self._begin(request, Run(index, 1, start, 1, True))
            step.num_prompt_tokens += start < request.num_prompt_tokens
        step.num_tokens = len(self._decoding)
        for number, start, num_tokens, samples in others:
            request = requests[number]
            self._begin(request, Run(index, 1, start, num_tokens, bool(samples)))
            step.num_tokens += num_tokens
            step.num_prompt_tokens += min(max(request.num_prompt_tokens - start, 0), num_tokens)

    def _begin(self, request: RecordedRequest, run: Run) -> None:
        if run.samples and not any(earlier.samples for earlier in request.runs):
            self._first_tokens[run.first_step].append(request)
        request.runs.append(run)

    def take_result(self, step_id: int, micros: int) -> None:
        index = self._index_of.pop(step_id)
        step = self._schedule.steps[index]
        step.ended = micros / 1e6
        step.seconds = step.ended - max(step.planned, self._last_end)
        self._last_end = step.ended
        for request in self._first_tokens.pop(index, ()):
            if math.isnan(request.end_time):
                request.first_token_time = step.ended

    def take_end(
        self,
        number: int,
        micros: int,
        status: str,
        output_len: int,
        cached: int,
        preemptions: int,
        blocks: str,
    ) -> None:
        request, steps = self._schedule.requests[number], self._schedule.steps
        if preemptions > len(request.preempted):
            # It ended by a token in flight before any plan could tell that it had lost its pages.
            request.preempted.append(len(steps) - 1)
            steps[-1].preempted += (number,)
        request.end_time = micros / 1e6
        request.status = RequestStatus(status)
        request.output_len, request.num_cached_tokens, request.blocks = output_len, cached, blocks
        if output_len:
            request.last_token_time = self._last_end

    def finish(self) -> Schedule:
        """The schedule, with its times counted from the first arrival."""
        schedule = self._schedule
        zero = min((r.arrival_time for r in schedule.requests.values()), default=0.0)
        for request in schedule.requests.values():
            request.arrival_time -= zero
            request.first_token_time -= zero
            request.last_token_time -= zero
            request.end_time -= zero
        for step in schedule.steps:
            step.planned -= zero
            step.ended -= zero
        return schedule

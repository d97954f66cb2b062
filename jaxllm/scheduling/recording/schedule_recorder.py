"""Writes down the schedule of a live engine: every arrival, plan, result and end, a line each."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.request import Request, RequestStatus
from jaxllm.scheduling.plan import Plan, RequestUpdate
from jaxllm.scheduling.recording.blocks import BlockHasher
from jaxllm.scheduling.recording.lines import LineWriter, json_line
from jaxllm.scheduling.recording.recorder import Recorder
from jaxllm.scheduling.replicas import ReplicatedScheduler, place_of
from jaxllm.scheduling.scheduler import Scheduler

VERSION = 2
"""Of the format; a reader refuses any other."""


class ScheduleRecorder(Recorder):
    """Writes JSON lines, which `jaxllm.scheduling.recording.schedule` reads. Times are whole microseconds.

    The first line is an object: the limits, the policy, the model. The others are arrays:

        ["arrival", number, id, time, prompt tokens, max tokens, terms, replica]
        ["plan", step, time, shape, [running, waiting, pages in use, pages out, pages in],
            decoding, others, preempted]
        ["result", step, time]
        ["end", number, time, reason, output tokens, cached tokens, preemptions, blocks]

    A request is the number that its arrival gave it. A plan's `decoding` are those for which it computes
    the one token that follows what they had, and samples; it is null where they are those of the plan
    before it, as nearly always. `others` are [number, first position, tokens, whether it samples]. Blocks
    are names of what a request's tokens are, as `BlockHasher` gives them. With several replicas a plan is of
    all of them: who runs, who waits and the pages are added up, and the shape is what each computes.

    Args:
        path: of the file, which is overwritten.
        scheduler: whose plans will be told.
        about: what else the header says of the engine.
        start: the time from which times are counted.
    """

    def __init__(
        self,
        path: str,
        scheduler: Scheduler | ReplicatedScheduler,
        about: Mapping[str, Any],
        start: float,
    ) -> None:
        self._scheduler = scheduler
        self._start = start
        self._hasher = BlockHasher(scheduler.config.page_size)
        # Of each unfinished request its number and the position up to which it is computed.
        self._places: dict[Request, list[int]] = {}
        self._next_number = 0
        self._decoding: list[int] = []
        self._lines = LineWriter(path)
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        header = {"jaxllm_schedule": VERSION, "started": started, **about}
        self._lines.write(json_line(header | {"config": dataclasses.asdict(scheduler.config)}))

    def _micros(self, now: float) -> int:
        return round((now - self._start) * 1e6)

    def arrived(self, request: Request) -> None:
        """See `Recorder`."""
        number = self._next_number
        self._next_number += 1
        self._places[request] = [number, 0]
        line = [
            "arrival",
            number,
            request.request_id,
            self._micros(request.arrival_time),
            request.num_prompt_tokens,
            request.max_tokens,
            request.terms.given(),
            place_of(self._scheduler, request),
        ]
        self._lines.write(json_line(line))

    def planned(self, plan: Plan, shape: Sequence[int], now: float) -> None:
        """See `Recorder`."""
        scheduler, places = self._scheduler, self._places
        decoding: list[int] = []
        others = []
        for request, start, num_tokens, samples in plan.scheduled:
            place = places[request]
            if num_tokens == 1 and samples and place[1] == start:
                decoding.append(place[0])
            else:
                others.append((place[0], start, num_tokens, samples))
            place[1] = start + num_tokens
        preempted = [places[r][0] for r in plan.released if not r.status.is_finished]
        num_pages = scheduler.pool.num_usable_pages - scheduler.num_free_pages
        state = (scheduler.num_running, scheduler.num_waiting, num_pages)
        copies = (len(plan.copies_out), len(plan.copies_in))
        same = decoding == self._decoding
        self._decoding = decoding
        line = [
            "plan",
            plan.step_id,
            self._micros(now),
            (shape[0], shape[1], shape[-1]),
            (*state, *copies),
            None if same else decoding,
            others,
            preempted,
        ]
        self._lines.write(json_line(line))

    def applied(self, plan: Plan, updates: Sequence[RequestUpdate], now: float) -> None:
        """See `Recorder`."""
        self._lines.write(json_line(["result", plan.step_id, self._micros(now)]))
        for update in updates:
            status = update.request.status
            # Nearly all run, which takes no time to see.
            if status is not RequestStatus.RUNNING and status.is_finished:
                self.ended(update.request, now)

    def ended(self, request: Request, now: float) -> None:
        """See `Recorder`."""
        number, _ = self._places.pop(request)
        line = [
            "end",
            number,
            self._micros(now),
            request.status.value,
            len(request.token_ids) - request.num_prompt_tokens,
            request.num_cached_tokens,
            request.num_preemptions,
            self._hasher.names(request),
        ]
        self._lines.write(json_line(line))

    def close(self) -> None:
        """See `Recorder`."""
        self._lines.close()

"""What a live engine does now, for those who watch: the newest events, and the state they start from."""

from __future__ import annotations

import re
import time
from array import array
from collections import deque
from collections.abc import Sequence
from itertools import islice
from threading import Lock
from typing import Any

from jaxllm.request import Request, RequestStatus
from jaxllm.scheduling.plan import Plan, RequestUpdate
from jaxllm.scheduling.recording.recorder import Recorder
from jaxllm.scheduling.replicas import ReplicatedScheduler
from jaxllm.scheduling.scheduler import Scheduler

Event = list[Any]

_SAME = re.compile(rb"(.)\1*", re.DOTALL)


class LiveRecorder(Recorder):
    """Keeps the newest events of an engine in memory, and no text, token or name of a request.

    A request is a number. Times are whole microseconds of the recorder's own clock; an arrival before it
    started is negative. Events are lists:

        ["arrival", time, number, prompt tokens, max tokens]
        ["plan", time, step, [tokens, sequences] of the compiled shape, sequences, tokens, of them prefill,
            running, waiting, started, preempted, pages]
        ["result", time, step, new tokens, decoding, ended, pages]
        ["end", time, [number, reason, output tokens], pages]
        ["forgotten", time, pages]

    `started` are [number, tokens that need not be computed] of requests that begin to run, for the first
    time or again; `decoding` are those whose prompt (and whatever a preemption cost them) is done, and
    `ended` those that are, as in "end". `pages` are the pages that changed since the event before, in runs
    [first, count, `PageState`, first, ...].

    Everything but `since` is called from the engine's thread.

    Args:
        scheduler: whose plans will be told.
        capacity: events that are kept; whoever comes later than that starts anew from a snapshot.
    """

    def __init__(self, scheduler: Scheduler | ReplicatedScheduler, capacity: int = 4096) -> None:
        self._scheduler = scheduler
        self._pool = scheduler.pool
        self._start = time.monotonic()
        self._lock = Lock()
        self._events: deque[tuple[Event, tuple[array[int], bytes]]] = deque(maxlen=capacity)
        self._num_events = 0  # so far; the newest is that many less one
        self._next_number = 1
        self._numbers: dict[Request, int] = {}
        self._idle: set[Request] = set()  # hold no pages: they wait, or were preempted
        self._computing: set[Request] = set()  # not planned up to their newest token yet
        self._awaiting: set[Request] = set()  # no token has come since they started
        self._pool.watch(True)
        for request in sorted((*scheduler.running, *scheduler.waiting), key=lambda r: r.arrival_time):
            self._number(request)
            if request.status is not RequestStatus.RUNNING:
                self._idle.add(request)
            elif request.num_computed_tokens < request.num_tokens - 1:
                self._computing.add(request)
                self._awaiting.add(request)
            elif request.last_token_time is None:
                self._awaiting.add(request)

    def close(self) -> None:
        """See `Recorder`."""
        self._pool.watch(False)

    # What watchers ask

    def snapshot(self) -> tuple[int, dict[str, Any], bytes]:
        """The number of events so far, and the state that they led to: limits, requests, and each page's.

        The `PageState`s are bytes, from which `all_runs` makes what JSON can hold. Requests are [number,
        phase, arrival, started, first token, prompt tokens, max tokens], with the phases "queued",
        "prefill", "decode" and "preempted", and null for times that have not come.
        """
        scheduler = self._scheduler
        config = scheduler.config
        state = {
            "time": self._micros(time.monotonic()),
            "limits": {
                # Of all replicas, as everything here.
                "max_num_seqs": config.max_num_seqs * config.data_parallel_size,
                "max_num_batched_tokens": config.max_num_batched_tokens * config.data_parallel_size,
                "num_pages": self._pool.num_pages,
                "page_size": config.page_size,
                "prefix_caching": config.enable_prefix_caching,
                "policy": config.policy,
            },
            "waiting": scheduler.num_waiting,
            "running": scheduler.num_running,
            "requests": [self._describe(request, number) for request, number in self._numbers.items()],
        }
        return self._num_events, state, self._pool.states()

    def _describe(self, request: Request, number: int) -> list[Any]:
        if request in self._idle:
            phase = "preempted" if request.status is RequestStatus.PREEMPTED else "queued"
        else:
            phase = "prefill" if request in self._awaiting else "decode"
        times = (request.arrival_time, request.first_scheduled_time, request.first_token_time)
        micros = [None if t is None else self._micros(t) for t in times]
        return [number, phase, *micros, request.num_prompt_tokens, request.max_tokens]

    def since(self, count: int) -> list[Event] | None:
        """The events after the first `count`; None where some of them are kept no longer. Any thread."""
        with self._lock:
            missing = self._num_events - count
            if missing > len(self._events):
                return None
            found = list(islice(reversed(self._events), missing))
        return [
            event if event[0] == "arrival" else [*event, runs(*changes)] for event, changes in reversed(found)
        ]

    # What the engine tells

    def arrived(self, request: Request) -> None:
        """See `Recorder`."""
        number = self._number(request)
        self._idle.add(request)
        event = [
            *("arrival", self._micros(request.arrival_time), number),
            *(request.num_prompt_tokens, request.max_tokens),
        ]
        with self._lock:
            self._events.append((event, (array("I"), b"")))
            self._num_events += 1

    def planned(self, plan: Plan, shape: Sequence[int], now: float) -> None:
        """See `Recorder`."""
        idle, computing = self._idle, self._computing
        preempted = []
        for request in plan.released:
            if request in self._numbers and not request.status.is_finished:
                preempted.append(self._numbers[request])
                computing.discard(request)
                self._awaiting.discard(request)
                idle.add(request)
        started = []
        prefill = 0
        # In most steps nobody starts or computes a prompt, and then nobody is looked at one by one.
        if computing or (idle and not idle.isdisjoint([entry.request for entry in plan.scheduled])):
            for request, start, num_tokens, samples in plan.scheduled:
                if request in idle:
                    idle.discard(request)
                    self._awaiting.add(request)
                    started.append((self._numbers[request], start))
                elif request not in computing:
                    continue
                prefill += num_tokens
                if samples:
                    computing.discard(request)
                else:
                    computing.add(request)
        self._append(
            "plan",
            now,
            plan.step_id,
            (shape[0], shape[1]),
            len(plan.scheduled),
            plan.num_tokens,
            prefill,
            self._scheduler.num_running,
            self._scheduler.num_waiting,
            started,
            preempted,
        )

    def applied(self, plan: Plan, updates: Sequence[RequestUpdate], now: float) -> None:
        """See `Recorder`."""
        awaiting, running = self._awaiting, RequestStatus.RUNNING
        decoding = []
        if awaiting:
            for update in updates:
                if update.request in awaiting and update.new_token_ids:
                    awaiting.discard(update.request)
                    decoding.append(self._numbers[update.request])
        num_tokens = sum([len(update.new_token_ids) for update in updates])
        # One comparison for nearly all of them.
        halted = [update.request for update in updates if update.request.status is not running]
        ended = [self._forget(request) for request in halted if request.status.is_finished]
        self._append("result", now, plan.step_id, num_tokens, decoding, ended)

    def ended(self, request: Request, now: float) -> None:
        """See `Recorder`."""
        self._append("end", now, self._forget(request))

    def forgotten(self, now: float) -> None:
        """See `Recorder`."""
        self._append("forgotten", now)

    def _append(self, kind: str, now: float, *rest: Any) -> None:
        entry = [kind, self._micros(now), *rest], self._pool.take_changes()
        with self._lock:
            self._events.append(entry)
            self._num_events += 1

    def _micros(self, now: float) -> int:
        return round((now - self._start) * 1e6)

    def _number(self, request: Request) -> int:
        number = self._numbers[request] = self._next_number
        self._next_number += 1
        return number

    def _forget(self, request: Request) -> tuple[int, str, int]:
        number = self._numbers.pop(request)
        for phase in (self._idle, self._computing, self._awaiting):
            phase.discard(request)
        return number, request.status.value, len(request.token_ids) - request.num_prompt_tokens


def all_runs(states: bytes) -> list[int]:
    """The states of all pages, from the first, as runs; see `runs`."""
    flat: list[int] = []
    for run in _SAME.finditer(states):
        flat += (run.start(), run.end() - run.start(), states[run.start()])
    return flat


def runs(pages: Sequence[int], states: bytes) -> list[int]:
    """Pages and their states as runs of consecutive pages alike: [first, count, state, first, ...]."""
    flat: list[int] = []
    following, last = -1, -1
    for page, state in sorted(zip(pages, states, strict=True)):
        if page == following and state == last:
            flat[-2] += 1
        else:
            flat += (page, 1, state)
        following, last = page + 1, state
    return flat

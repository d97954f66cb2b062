"""Whoever watches an engine sees what is: events lead from a snapshot to the true state, step by step."""

from __future__ import annotations

import json
import random
from collections import Counter
from typing import Any

import pytest

from jaxllm.request import RequestStatus
from jaxllm.scheduling import Scheduler
from jaxllm.scheduling.block_pool import PageState
from jaxllm.scheduling.recording.live_recorder import LiveRecorder, all_runs, runs
from tests.scheduling.simulated_device import (
    make_config,
    make_request,
    random_config,
    random_requests,
)
from tests.scheduling.test_recording import Recorded


class Mirror:
    """What a watcher knows, from JSON alone."""

    def __init__(self, recorder: LiveRecorder) -> None:
        self.recorder = recorder
        self.count, state, pages = recorder.snapshot()
        state = json.loads(json.dumps(state))
        self.pages = [0] * state["limits"]["num_pages"]
        self.change(all_runs(pages))
        self.phases = {row[0]: row[1] for row in state["requests"]}
        self.ends: dict[int, list[Any]] = {}
        self.events: list[Any] = []

    def change(self, flat: list[int]) -> None:
        for first, count, page_state in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
            self.pages[first : first + count] = [page_state] * count

    def update(self) -> None:
        found = self.recorder.since(self.count)
        assert found is not None
        self.count += len(found)
        for event in json.loads(json.dumps(found)):
            self.events.append(event)
            kind, _, *rest = event
            if kind == "arrival":
                self.phases[rest[0]] = "queued"
                continue
            self.change(rest[-1])
            if kind == "plan":
                for number in rest[8]:
                    self.phases[number] = "preempted"
                for number, _ in rest[7]:
                    self.phases[number] = "prefill"
            elif kind == "result":
                for number in rest[2]:
                    self.phases[number] = "decode"
                for end in rest[3]:
                    self.end(end)
            elif kind == "end":
                self.end(rest[0])

    def end(self, end: list[Any]) -> None:
        del self.phases[end[0]]
        self.ends[end[0]] = end


def true_pages(scheduler: Scheduler) -> list[int]:
    """The state of every page, from those who own them and from what can be found."""
    owners = Counter(page for request in scheduler.running for page in request.pages)
    findable = set(scheduler.pool._page_of.values())
    states = []
    for page in range(scheduler.config.num_pages):
        if owners[page]:
            states.append(PageState.SHARED if owners[page] > 1 else PageState.OWNED)
        else:
            states.append(PageState.CACHED if page in findable else PageState.BLANK)
    return states


@pytest.mark.parametrize("seed", range(40))
def test_events_lead_to_the_true_state(seed: int) -> None:
    rng = random.Random(seed)
    config = random_config(rng)
    server = Recorded(config, in_flight=rng.choice([1, 2]))
    requests = random_requests(rng, config, 30)
    joins = rng.randrange(20)
    mirrors: list[Mirror] = []
    numbers: dict[Any, int] = {}
    recorder = None
    step = 0
    while requests or server.scheduler.has_unfinished() or server.outstanding:
        if step in (joins, joins + 7):
            if recorder is None:
                recorder = LiveRecorder(server.scheduler)
                server.recorders.append(recorder)
            mirrors.append(Mirror(recorder))
        for _ in range(min(rng.randrange(4), len(requests))):
            server.add(requests.pop(0))
        server.step()
        alive = server.scheduler.running + server.scheduler.waiting
        if rng.random() < 0.1 and alive:
            gone = rng.choice(alive)
            server.scheduler.finish(gone, RequestStatus.FINISHED_ABORTED)
            if recorder is not None:
                recorder.ended(gone, server.tick())
        if recorder is not None:
            # What a plan that came to nothing has changed is told with the next event.
            recorder.forgotten(server.tick())
            numbers |= recorder._numbers
        for mirror in mirrors:
            mirror.update()
            assert mirror.pages == true_pages(server.scheduler)
            holding = {numbers[request] for request in server.scheduler.running}
            shown = {n for n, phase in mirror.phases.items() if phase in ("prefill", "decode")}
            # Those whom a plan preempted that came to nothing: the next one says so.
            untold = {numbers[r] for r in server.scheduler._released if not r.status.is_finished}
            assert holding <= shown <= holding | untold
            assert mirror.phases.keys() == holding | {numbers[r] for r in server.scheduler.waiting}
            for request in server.scheduler.running:
                if mirror.phases[numbers[request]] == "decode":
                    assert request.num_output_tokens
        step += 1
    for mirror in mirrors:
        assert mirror.phases == {}
        for request, number in numbers.items():
            if number in mirror.ends:
                assert mirror.ends[number] == [number, request.status.value, request.num_output_tokens]
    if mirrors:
        assert mirrors[0].ends.keys() >= set(numbers.values())


def test_plans_are_counted() -> None:
    server = Recorded(make_config(max_num_batched_tokens=16))
    recorder = LiveRecorder(server.scheduler)
    server.recorders.append(recorder)
    for name in "ab":
        server.add(make_request(name, list(range(1, 21)), max_tokens=3))
    while server.scheduler.has_unfinished():
        server.step()
    events = recorder.since(0)
    assert events is not None
    plans = [event for event in events if event[0] == "plan"]
    # 20 tokens in chunks of at most 16; the second finds four pages of the first, and decodes beside it.
    assert [(plan[4], plan[5], plan[6]) for plan in plans][:2] == [(1, 16, 16), (2, 8, 8)]
    assert sum(plan[6] for plan in plans) == 20 + 4
    assert [plan[9] for plan in plans if plan[9]] == [[(1, 0)], [(2, 16)]]
    results = [event for event in events if event[0] == "result"]
    assert sum(result[3] for result in results) == 6
    assert [end for result in results for end in result[5]] == [(1, "length", 3), (2, "length", 3)]
    times = [event[1] for event in events]
    assert times == sorted(times)


def test_who_is_too_slow_starts_anew_and_memory_is_bounded() -> None:
    server = Recorded(make_config())
    recorder = LiveRecorder(server.scheduler, capacity=10)
    server.recorders.append(recorder)
    mirror = Mirror(recorder)
    for i in range(30):
        server.add(make_request(f"r{i}", [1 + i % 5] * (1 + i % 23), max_tokens=2))
        server.step()
        assert len(recorder._events) <= 10
    assert recorder.since(mirror.count) is None
    mirror = Mirror(recorder)
    assert mirror.pages == true_pages(server.scheduler)
    assert recorder.since(mirror.count) == []
    while server.scheduler.has_unfinished():
        server.step()
        mirror.update()
        assert mirror.pages == true_pages(server.scheduler)
    assert recorder._numbers == {} == dict.fromkeys(recorder._idle | recorder._computing | recorder._awaiting)


def test_nothing_is_noted_while_nobody_watches() -> None:
    server = Recorded(make_config())
    pool = server.scheduler.pool
    server.add(make_request("a", [1] * 30))
    server.step()
    assert pool.take_changes()[1] == b""
    recorder = LiveRecorder(server.scheduler)
    server.recorders.append(recorder)
    server.step()
    server.recorders.remove(recorder)
    recorder.close()
    server.run()
    assert pool.take_changes()[1] == b""


def test_no_text_and_no_name_is_told() -> None:
    server = Recorded(make_config())
    secret = 123_456_789
    server.add(make_request("name-of-a", [secret] * 9, cache_salt="salty", tenant="tenant-t"))
    recorder = LiveRecorder(server.scheduler)
    server.recorders.append(recorder)
    told: list[Any] = [recorder.snapshot()[1]]
    server.add(make_request("name-of-b", [secret] * 9, cache_salt="salty", tenant="tenant-t"))
    while server.scheduler.has_unfinished():
        server.step()
    told += recorder.since(0) or []
    assert len(told) > 5
    for word in (str(secret), "name-of", "salty", "tenant"):
        assert word not in json.dumps(told)


@pytest.mark.parametrize("seed", range(20))
def test_runs_say_what_they_are_given(seed: int) -> None:
    rng = random.Random(seed)
    states = {page: rng.randrange(3) for page in range(50) if rng.random() < 0.7}
    pages = rng.sample(sorted(states), len(states))
    flat = runs(pages, bytes(states[page] for page in pages))
    found = {}
    for first, count, state in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
        assert count > 0
        found |= dict.fromkeys(range(first, first + count), state)
    assert found == states
    every = bytes(rng.randrange(3) for _ in range(60))
    assert all_runs(every) == runs(range(60), every)

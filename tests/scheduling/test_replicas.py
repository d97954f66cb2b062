"""Schedulers of several replicas: each keeps its accounts, nothing is lost, and load is shared."""

from __future__ import annotations

import itertools
import random
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest

from jaxllm.config import SchedulerConfig
from jaxllm.errors import ConfigError, InvalidRequestError
from jaxllm.replay.__main__ import main as replay
from jaxllm.request import Request, RequestStatus
from jaxllm.scheduling import Plan, ReplicatedScheduler, Scheduler, StepResult, load_policy, make_scheduler
from jaxllm.scheduling.recording.live_recorder import LiveRecorder
from jaxllm.scheduling.recording.schedule import read_schedule
from jaxllm.scheduling.simulator import TracedRequest, simulate, summarize
from tests.scheduling.recorded_server import Recorded, rows_of, serve
from tests.scheduling.simulated_device import (
    Device,
    Server,
    make_config,
    make_request,
    random_config,
    random_requests,
)


class Devices:
    """A device for each replica."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self.of_replicas = [Device(config) for _ in range(config.data_parallel_size)]
        self.queue: deque[Plan] = deque()
        self.num_plans = 0

    def execute(self, plan: Plan) -> None:
        config = self.config
        assert plan.step_id == self.num_plans
        self.num_plans += 1
        assert len(plan.parts) == len(self.of_replicas)
        parts = [part for part in plan.parts if part is not None]
        assert plan.scheduled == sum((part.scheduled for part in parts), ())
        assert plan.released == sum((part.released for part in parts), ())
        assert plan.num_tokens == sum(part.num_tokens for part in parts)
        copies_out, copies_in = [], []
        for replica, (device, part) in enumerate(zip(self.of_replicas, plan.parts, strict=True)):
            if part is None:
                device.skip_step()
            else:
                device.execute(part)
                first, first_host = replica * config.num_pages, replica * config.num_host_pages
                copies_out += [(first + page, first_host + host) for page, host in part.copies_out]
                copies_in += [(first_host + host, first + page) for host, page in part.copies_in]
        assert (list(plan.copies_out), list(plan.copies_in)) == (copies_out, copies_in)
        self.queue.append(plan)

    def result(self) -> StepResult:
        whole = StepResult([], [])
        self.queue.popleft()
        for device in self.of_replicas:
            result, first = device.result(), len(whole.token_ids)
            whole.token_ids += result.token_ids
            whole.logprobs += result.logprobs
            whole.prompt_logprobs |= {first + row: entry for row, entry in result.prompt_logprobs.items()}
        return whole


class Replicas(Server):
    """A `Server` of several replicas, that also checks what is counted of them."""

    scheduler: ReplicatedScheduler  # type: ignore[assignment]

    def __init__(self, config: SchedulerConfig, *, in_flight: int = 1) -> None:
        super().__init__(replace(config, data_parallel_size=1), in_flight=in_flight)
        self.config = config
        self.scheduler = ReplicatedScheduler(config)
        self.device = Devices(config)  # type: ignore[assignment]
        self.places: dict[str, int] = {}

    def add(self, request: Request) -> None:
        super().add(request)
        place = self.scheduler.replica_of(request)
        assert place is not None
        self.places[request.request_id] = place
        self.check()

    def step(self) -> Plan | None:
        plan = super().step()
        self.check()
        return plan

    def check(self) -> None:
        """Each request where it was put, and the sums of what the replicas say."""
        scheduler = self.scheduler
        unfinished = [r for r in self.requests if not r.status.is_finished]
        num_tokens = [0] * len(scheduler.replicas)
        for request in unfinished:
            place = self.places[request.request_id]
            assert scheduler.replica_of(request) == place
            assert request.request_id in scheduler.replicas[place]._sequences
            num_tokens[place] += len(request.token_ids)
        assert scheduler.num_tokens == num_tokens
        assert scheduler.num_running + scheduler.num_waiting == len(unfinished)
        assert len(scheduler._replica_of) == len(unfinished)

    def check_end(self) -> None:
        scheduler = self.scheduler
        assert scheduler.num_tokens == [0] * len(scheduler.replicas)
        assert scheduler.kv_cache_usage == 0
        for replica in scheduler.replicas:
            assert replica.num_free_pages == self.config.num_pages - 1
            assert len(replica._swap._free) == self.config.num_host_pages
        for request in self.requests:
            self.check_ended(request)


class RecordedReplicas(Recorded, Replicas):
    """Replicas that are recorded."""


@pytest.mark.parametrize("seed", range(25))
def test_whatever_comes_and_goes(seed: int) -> None:
    """Random limits, requests, aborts, resets: every output is what a request gives when served alone.

    Every second time each replica is a pipeline, whose stages move on together with those of the others.
    """
    rng = random.Random(seed)
    stages = rng.choice([2, 3, 4]) if seed % 2 else 1
    config = replace(random_config(rng), data_parallel_size=rng.choice([2, 3]), num_stages=stages)
    if stages > 1:
        in_flight = stages + config.reschedule_in_flight
    else:
        in_flight = rng.choice([1, 2, 3]) if config.reschedule_in_flight else 2
    server = Replicas(config, in_flight=in_flight)
    arriving = deque(random_requests(rng, config, 24))
    resets = 0
    while arriving or server.scheduler.has_unfinished() or server.outstanding:
        for _ in range(rng.choice([0, 0, 1, 4])):
            if arriving:
                request = arriving.popleft()
                try:
                    server.add(request)
                except InvalidRequestError:
                    assert server.scheduler.replica_of(request) is None
        server.step()
        unfinished = [r for r in server.requests if not r.status.is_finished]
        if unfinished and rng.random() < 0.05:
            server.scheduler.finish(rng.choice(unfinished), RequestStatus.FINISHED_ABORTED)
            server.check()
        resets += server.scheduler.reset_prefix_cache()
    assert len(server.requests) >= 5
    server.check_end()


def test_with_a_request_for_each_stage_of_each_replica_all_of_them_always_work() -> None:
    """Also of the replica that has fewest of them; one with a single request does not hold up the others."""
    config = make_config(num_stages=3, data_parallel_size=2, max_num_seqs=16, num_pages=400)
    server = Replicas(config, in_flight=4)
    for index in range(9):
        server.add(make_request(f"r{index}", [index, 1, 2], max_tokens=40))
    for _ in range(30):
        plan = server.schedule()
        assert plan is not None
        # Five requests in the one, four in the other.
        assert [len(part.scheduled) if part else 0 for part in plan.parts] in ([2, 2], [2, 1], [1, 1], [1, 2])
        if len(server.outstanding) == server.in_flight:
            server.apply()
    for first in range(len(server.plans) - 3):
        window = server.plans[first : first + 3]
        rows = [entry.request.request_id for plan in window for entry in plan.scheduled]
        assert sorted(rows) == [f"r{index}" for index in range(9)]
    server.run()


def test_a_replica_with_one_request_goes_on_while_others_fill_the_steps() -> None:
    """Its token is there after as many steps of the devices as stages, whoever had work in them."""
    server = Replicas(make_config(num_stages=3, data_parallel_size=2, num_pages=400), in_flight=4)
    places = places_of(server, prompt(30, 0), max_tokens=9)
    places += places_of(server, *(prompt(5, seed) for seed in range(1, 5)), max_tokens=20)
    assert places == [0, 1, 1, 1, 1]
    for _ in range(24):
        assert server.schedule() is not None
        if len(server.outstanding) == server.in_flight:
            server.apply()
    turns = [index for index, plan in enumerate(server.plans) if plan.parts[0] is not None]
    assert turns == list(range(0, 24, 3))
    server.run()


def test_a_request_that_ends_by_a_token_in_flight_is_forgotten_once() -> None:
    server = Replicas(make_config(data_parallel_size=2), in_flight=2)
    server.add(make_request("a", [1, 2, 3], max_tokens=5))
    server.schedule()
    server.schedule()
    server.scheduler.finish(server.requests[0], RequestStatus.FINISHED_ABORTED)
    server.scheduler.finish(server.requests[0], RequestStatus.FINISHED_ABORTED)
    server.run()
    with pytest.raises(ValueError, match="never added"):
        server.scheduler.finish(make_request("b", [1]), RequestStatus.FINISHED_ABORTED)


def places_of(server: Replicas, *prompts: list[int], **fields: object) -> list[int]:
    places = []
    for prompt in prompts:
        name = f"request-{len(server.requests)}"
        server.add(make_request(name, prompt, **fields))  # type: ignore[arg-type]
        places.append(server.places[name])
    return places


def prompt(length: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(7) for _ in range(length)]


def test_equal_requests_are_dealt_out_evenly() -> None:
    server = Replicas(make_config(data_parallel_size=4))
    places = places_of(server, *(prompt(9, seed) for seed in range(20)))
    assert sorted(places) == sorted(list(range(4)) * 5)
    server.run()
    # One at a time they take turns, too: every cache is used.
    turns = []
    for seed in range(8):
        turns += places_of(server, prompt(9, 100 + seed))
        server.run()
    assert sorted(turns) == sorted(list(range(4)) * 2)


def test_long_requests_weigh_as_much_as_several_short_ones() -> None:
    server = Replicas(make_config(data_parallel_size=2))
    assert places_of(server, prompt(40, 0), *(prompt(10, seed) for seed in range(1, 5))) == [0, 1, 1, 1, 1]
    # Outputs count as they come, and what has ended counts no longer.
    server.run()
    assert places_of(server, prompt(12, 7), prompt(10, 8), max_tokens=10) == [0, 1]
    while server.scheduler.replica_of(server.requests[-1]) is not None:
        server.step()


def test_a_cached_prefix_draws_requests_for_as_long_as_it_saves_more_than_it_costs() -> None:
    server = Replicas(make_config(data_parallel_size=2))
    shared = prompt(32, 1)
    [home] = places_of(server, [*shared, 1])
    server.run()
    # Turns would take the other one.
    assert places_of(server, [*shared, 2]) == [home]
    server.run()
    hits = server.scheduler.prefix_cache_hits
    assert hits == 32
    # 35 tokens, of which the home has 32: it may be 32 tokens ahead, and is 35 after the first.
    assert places_of(server, *([*shared, 3, 4, token] for token in range(2))) == [home, 1 - home]
    server.run()
    assert server.scheduler.prefix_cache_hits > hits


@pytest.mark.parametrize("fields", [{"prompt_logprobs": 1}, {"skip_reading_prefix_cache": True}])
def test_who_may_not_read_the_cache_goes_by_load_alone(fields: dict[str, object]) -> None:
    server = Replicas(make_config(data_parallel_size=2))
    shared = prompt(32, 1)
    [home] = places_of(server, [*shared, 1])
    server.run()
    assert places_of(server, [*shared, 2], **fields) == [1 - home]


def test_the_sequences_of_one_request_stay_together() -> None:
    for caching in (True, False):
        server = Replicas(make_config(data_parallel_size=2, enable_prefix_caching=caching))
        for group in range(3):
            places = places_of(server, *[prompt(20, group)] * 3, group_id=f"group-{group}")
            assert len(set(places)) == 1
        server.run()
        computed = sum(device.num_computed_tokens for device in server.device.of_replicas)  # type: ignore[attr-defined]
        # Each group's prompt once (its last page is of each), and the outputs but the last of each.
        assert computed == 3 * (20 + 2 * 4) + 9 * 3


def test_an_id_is_taken_in_all_replicas() -> None:
    scheduler = ReplicatedScheduler(make_config(data_parallel_size=2))
    scheduler.add(make_request("a", [1, 2]))
    with pytest.raises(InvalidRequestError, match="'a' is taken"):
        scheduler.add(make_request("a", [1, 2]))
    assert scheduler.num_waiting == 1 and scheduler.num_tokens == [2, 0]
    with pytest.raises(InvalidRequestError):
        scheduler.add(make_request("long", [1] * 1000))
    assert scheduler.replica_of(make_request("long", [1])) is None


def test_plans_are_applied_in_order() -> None:
    scheduler = ReplicatedScheduler(make_config(data_parallel_size=2))
    scheduler.add(make_request("a", [1, 2]))
    first, second = scheduler.schedule(), scheduler.schedule()
    assert first is not None and second is not None
    assert first.parts[1] is None
    with pytest.raises(ValueError, match="plan 1 is not the oldest"):
        scheduler.apply(second, StepResult([[1]], [None]))


def test_one_replica_is_a_scheduler_and_none_is_refused() -> None:
    assert isinstance(make_scheduler(make_config()), Scheduler)
    assert isinstance(make_scheduler(make_config(data_parallel_size=2)), ReplicatedScheduler)
    with pytest.raises(ConfigError, match="data_parallel_size is 0"):
        ReplicatedScheduler(make_config(data_parallel_size=0))


def test_each_replica_has_its_own_policy() -> None:
    policy = load_policy("fcfs")
    scheduler = cast(ReplicatedScheduler, make_scheduler(make_config(data_parallel_size=2), policy))
    first, second = (replica._policy for replica in scheduler.replicas)
    assert first._policy is not second._policy


def test_the_live_view_shows_the_pages_of_all_replicas() -> None:
    config = make_config(data_parallel_size=2)
    server = Replicas(config)
    recorder = LiveRecorder(server.scheduler)
    for request in (make_request("a", prompt(9, 1)), make_request("b", prompt(6, 2))):
        server.add(request)
        recorder.arrived(request)
    plan = server.schedule()
    assert plan is not None
    recorder.planned(plan, (64, 8), 0.0)
    _, state, pages = recorder.snapshot()
    assert state["limits"]["num_pages"] == len(pages) == 2 * config.num_pages
    assert state["limits"]["max_num_seqs"] == 2 * config.max_num_seqs
    owned = [index for index, page in enumerate(pages) if page]
    assert len([page for page in owned if page < config.num_pages]) == 3
    assert len([page for page in owned if page > config.num_pages]) == 2
    events = recorder.since(0)
    assert events is not None
    [event] = [event for event in events if event[0] == "plan"]
    changed = [
        first + i for first, count, _ in zip(*[iter(event[-1])] * 3, strict=True) for i in range(count)
    ]
    assert changed == owned


def test_a_simulated_step_takes_as_long_as_its_fullest_replica() -> None:
    class PerToken:
        def seconds(self, plan: Plan) -> float:
            return 1.0 + plan.num_tokens / 10

    trace = [TracedRequest(0.0, ((name, 10 + 10 * name),), 3) for name in range(2)]
    simulation = simulate(trace, make_config(data_parallel_size=2), PerToken())
    assert sorted(record.replica for record in simulation.requests) == [0, 1]
    assert [step.seconds for step in simulation.steps] == pytest.approx([1 + 2.0, 1.1, 1.1])
    first, second = summarize(simulation).replicas
    assert (first.device_busy, second.device_busy) == pytest.approx(((2 + 2.2) / 5.2, 1.0))
    # Of 64 pages of 4: 10 tokens and 20 take 3 and 5, for 3.0 s; and with what comes then 3 and 6.
    assert first.kv_cache_usage == pytest.approx(3 / 64)
    assert second.kv_cache_usage == pytest.approx((3.0 * 5 + 2.2 * 6) / 5.2 / 64)


@pytest.mark.parametrize("seed", range(6))
def test_a_simulation_of_replicas_is_what_each_would_plan_alone(seed: int) -> None:
    """Where requests are there at the start: a scheduler for each replica, given what it was given."""
    rng = random.Random(seed)
    config = make_config(data_parallel_size=3, max_num_seqs=3, max_num_batched_tokens=24, num_pages=20)
    stems = [rng.randrange(100) for _ in range(2)]
    trace = [
        TracedRequest(0.0, ((rng.choice(stems), 9), (1000 + i, rng.randrange(1, 30))), rng.randrange(1, 20))
        for i in range(40)
    ]

    class Rows:
        def __init__(self) -> None:
            self.of_steps: list[list[tuple[str, int, int, bool]]] = []

        def seconds(self, plan: Plan) -> float:
            self.of_steps.append([(e.request.request_id, *e[1:]) for e in plan.scheduled])
            return 1.0

    together = Rows()
    # With more plans in flight a replica may have none for a step in which others have one.
    simulation = simulate(trace, config, together, max_in_flight=1)
    assert simulation.num_preemptions and sum(r.num_cached_tokens for r in simulation.requests)
    number = {id(traced): index for index, traced in enumerate(trace)}
    steps_alone = []
    for replica in range(3):
        own = sorted(number[id(r.traced)] for r in simulation.requests if r.replica == replica)
        alone = Rows()
        simulate(
            [trace[index] for index in own], replace(config, data_parallel_size=1), alone, max_in_flight=1
        )
        steps_alone.append([[(str(own[int(name)]), *row) for name, *row in step] for step in alone.of_steps])
    merged = [step for steps in itertools.zip_longest(*steps_alone) for step in steps if step is not None]
    assert together.of_steps == merged
    # They took turns by the tokens they had: nobody has more than a prompt above the mean.
    tokens = [
        sum(len(r.traced.prompt_token_ids()) for r in simulation.requests if r.replica == k) for k in range(3)
    ]
    assert max(tokens) - min(tokens) <= 39 + 9


def test_a_recorded_schedule_of_replicas_is_read_as_it_happened(tmp_path: Path) -> None:
    rng = random.Random(1)
    config = make_config(data_parallel_size=2, num_pages=20, max_num_seqs=4)
    server = RecordedReplicas(config, in_flight=2)
    server.record(tmp_path / "schedule.jsonl")
    serve(server, random_requests(rng, config, 30), rng)
    read = read_schedule(tmp_path / "schedule.jsonl")
    by_id = {request.request_id: request for request in read.requests.values()}
    assert {name: request.replica for name, request in by_id.items()} == server.places
    assert sum(len(step.preempted) for step in read.steps) == server.scheduler.num_preemptions > 0
    for index, plan in enumerate(server.plans):
        assert sorted(rows_of(read, index)) == sorted((e.request.request_id, *e[1:]) for e in plan.scheduled)
    # A step costs what the replica with most to do costs.
    for (_, runs, _, _), plan in zip(read.timed_steps(), server.plans, strict=True):
        pairs = [
            sum(e.num_tokens * e.start + e.num_tokens * (e.num_tokens + 1) // 2 for e in part.scheduled)
            for part in plan.parts
            if part is not None
        ]
        assert sum(n * start + n * (n + 1) // 2 for start, n in runs) == max(pairs)
    assert summarize(read.as_simulation()).replicas[1].num_requests == list(server.places.values()).count(1)
    for arguments in ((), ("--step", "3"), ("--policy", "sarathi")):
        assert replay([str(tmp_path / "schedule.jsonl"), *arguments]) == 0
    assert replay([str(tmp_path / "schedule.jsonl"), "--html", str(tmp_path / "page.html")]) == 0
    assert '"replicas":2' in (tmp_path / "page.html").read_text()

"""Random workloads, run on a simulated device and compared with serving each request alone."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxllm.request import Request, RequestStatus
from jaxllm.scheduling import BudgetSplit, RequestView, SchedulingPolicy, StepView
from jaxllm.scheduling.policies import BUILT_IN
from tests.scheduling.simulated_device import (
    Server,
    make_config,
    make_request,
    random_config,
    random_requests,
)

REQUESTS_PER_WORKLOAD = 25
WORKLOADS_PER_TEST = 100


class Capricious(SchedulingPolicy):
    """Changes its mind at every step, but now and then is fair enough for everything to end."""

    dynamic_ranks = True

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def rank(self, request: RequestView) -> float:
        return self.rng.random()

    def choose_victim(self, candidates: Sequence[RequestView]) -> RequestView:
        return self.rng.choice(candidates)

    def split_budget(self, step: StepView) -> BudgetSplit:
        assert len(step.waiting) + len(step.running) > 0
        return BudgetSplit(self.rng.randrange(step.num_tokens + 1), self.rng.randrange(step.num_tokens + 1))

    def preempt(self, step: StepView) -> Sequence[RequestView]:
        return [view for view in step.running if self.rng.random() < 0.02]

    def admit(self, request: RequestView) -> bool:
        return self.rng.random() < 0.7

    def chunk_size(self, request: RequestView, num_tokens: int) -> int:
        return self.rng.choice([0, 1, num_tokens, num_tokens]) if num_tokens else 0


def serve_random_workload(seed: int, policy: SchedulingPolicy | None = None) -> Server:
    rng = random.Random(seed)
    config = random_config(rng)
    server = Server(config, in_flight=rng.choice([1, 2, 3]), policy=policy)
    arrivals = random_requests(rng, config, REQUESTS_PER_WORKLOAD)
    at_once = rng.random() < 0.3
    aborting = rng.random() < 0.3
    while arrivals:
        for _ in range(len(arrivals) if at_once else rng.choice([0, 1, 1, 2, 5])):
            if arrivals:
                server.add(arrivals.pop())
        if server.scheduler.has_unfinished():
            # Results come late or early, in every rhythm.
            for _ in range(rng.randrange(3)):
                server.schedule()
            for _ in range(rng.randrange(3)):
                server.apply()
        if aborting and rng.random() < 0.1:
            unfinished = [r for r in server.requests if not r.status.is_finished]
            if unfinished:
                server.scheduler.finish(rng.choice(unfinished), RequestStatus.FINISHED_ABORTED)
                server.scheduler.check_integrity()
    server.run()
    return server


@pytest.mark.parametrize("block", range(8))
def test_ten_thousand_requests_give_what_each_gives_alone(block: int) -> None:
    seeds = range(block * WORKLOADS_PER_TEST, (block + 1) * WORKLOADS_PER_TEST)
    servers = [serve_random_workload(seed) for seed in seeds]
    # The workloads are hard enough to mean something.
    assert sum(server.scheduler.num_preemptions for server in servers) > 100
    assert sum(server.scheduler.prefix_cache_hits for server in servers) > 1000
    assert sum(len(server.requests) for server in servers) == REQUESTS_PER_WORKLOAD * WORKLOADS_PER_TEST


def test_no_policy_can_lose_a_page_or_a_request() -> None:
    for seed in range(1000, 1030):
        serve_random_workload(seed, Capricious(seed))


@pytest.mark.parametrize("name", sorted(BUILT_IN))
def test_every_built_in_policy_serves_all(name: str, caplog: pytest.LogCaptureFixture) -> None:
    for seed in range(2000, 2040):
        serve_random_workload(seed, BUILT_IN[name]())
    assert not caplog.records, "the policy failed and was replaced"


def test_preemption_storm() -> None:
    """The pool holds one long request; sixteen of them fight for it, and all end."""
    for in_flight in (1, 2, 3):
        config = make_config(num_pages=17, max_num_seqs=16, max_num_batched_tokens=24)
        server = Server(config, in_flight=in_flight)
        for index in range(16):
            server.add(make_request(f"r{index}", [index % 7, 1, 2, 3, index % 5], max_tokens=59))
        server.run()
        assert server.scheduler.num_preemptions > 16


class SchedulerMachine(RuleBasedStateMachine):
    """Every order of adding, scheduling, applying, ending and resetting that hypothesis thinks of."""

    @initialize(seed=st.integers(0, 2**32), in_flight=st.integers(1, 3))
    def start(self, seed: int, in_flight: int) -> None:
        self.rng = random.Random(seed)
        config = random_config(self.rng)
        self.server = Server(config, in_flight=in_flight)
        self.arrivals: list[Request] = random_requests(self.rng, config, 30)
        self.stopped: set[str] = set()

    @precondition(lambda self: self.arrivals)
    @rule(count=st.integers(1, 4))
    def add(self, count: int) -> None:
        for _ in range(min(count, len(self.arrivals))):
            self.server.add(self.arrivals.pop())

    @precondition(lambda self: self.server.scheduler.has_unfinished())
    @rule()
    def schedule(self) -> None:
        self.server.schedule()

    @rule()
    def apply(self) -> None:
        self.server.apply()

    @precondition(lambda self: self.server.requests)
    @rule(index=st.integers(0, 29))
    def abort(self, index: int) -> None:
        request = self.server.requests[index % len(self.server.requests)]
        before = request.status
        self.server.scheduler.finish(request, RequestStatus.FINISHED_ABORTED)
        assert request.status is (before if before.is_finished else RequestStatus.FINISHED_ABORTED)

    @rule()
    def reset_prefix_cache(self) -> None:
        idle = self.server.scheduler.num_running == 0
        assert self.server.scheduler.reset_prefix_cache() is idle

    @invariant()
    def accounts_hold(self) -> None:
        if hasattr(self, "server"):
            self.server.scheduler.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "server"):
            self.server.run()


SchedulerMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSchedulerMachine = SchedulerMachine.TestCase

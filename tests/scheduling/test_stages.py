"""Plans for a pipeline: nobody is in it twice, everybody gets a turn, and no stage is left without work."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from jaxllm.errors import ConfigError
from jaxllm.scheduling import Scheduler
from tests.scheduling.simulated_device import (
    Server,
    make_config,
    make_request,
    random_config,
    random_requests,
)


@pytest.mark.parametrize("seed", range(24))
def test_nobody_is_in_the_pipeline_twice_and_everybody_gets_the_right_tokens(seed: int) -> None:
    """The device checks each plan as it is launched, and at the end all tokens are those of an oracle."""
    rng = random.Random(seed)
    config = random_config(rng)
    config = replace(config, num_stages=rng.choice([2, 3, 4]))
    server = Server(config, in_flight=config.num_stages + int(config.reschedule_in_flight))
    waiting = random_requests(rng, config, 25)
    while waiting:
        for _ in range(rng.choice([0, 1, 1, 4])):
            if waiting:
                server.add(waiting.pop())
        # Results come late or early, in every rhythm.
        for _ in range(rng.randrange(4)):
            server.schedule()
        for _ in range(rng.randrange(4)):
            server.apply()
    server.run()


@pytest.mark.parametrize(("num_stages", "num_requests"), [(2, 2), (2, 7), (3, 4), (4, 4), (4, 5), (4, 16)])
def test_with_a_request_for_each_stage_there_is_always_a_plan(num_stages: int, num_requests: int) -> None:
    config = make_config(num_stages=num_stages, max_num_seqs=16, num_pages=400)
    server = Server(config, in_flight=num_stages + 1)
    for index in range(num_requests):
        server.add(make_request(f"r{index}", [index, 1, 2], max_tokens=12))
    largest = -(-num_requests // num_stages)
    for _ in range(10 * num_stages):
        plan = server.schedule()
        assert plan is not None
        assert 1 <= len(plan.scheduled) <= largest
        if len(server.outstanding) == server.in_flight:
            server.apply()
    # Each takes part in one plan of so many, neither more nor less.
    for first in range(len(server.plans) - num_stages):
        window = server.plans[first : first + num_stages]
        rows = [entry.request.request_id for plan in window for entry in plan.scheduled]
        assert len(set(rows)) == len(rows) == num_requests
    server.run()


def test_a_part_that_has_become_small_is_filled_up_from_the_others() -> None:
    server = Server(make_config(num_stages=2, max_num_seqs=16, num_pages=400), in_flight=3)
    for index in range(8):
        # The first four share the first plan, and end early.
        server.add(make_request(f"r{index}", [index, 1], max_tokens=3 if index < 4 else 30))
    for _ in range(8):
        server.step()
    sizes = [len(plan.scheduled) for plan in server.plans]
    assert sizes[:4] == [4, 4, 4, 4]
    assert sizes[-2:] == [2, 2]
    server.run()


def test_chunks_of_a_prompt_follow_one_another_and_others_go_on() -> None:
    server = Server(make_config(num_stages=2, max_num_batched_tokens=8), in_flight=3)
    server.add(make_request("short", [1, 2], max_tokens=30))
    server.step()
    server.add(make_request("long", list(range(40)), max_tokens=2))
    for _ in range(5):
        server.step()
    chunks = [[e for e in plan.scheduled if e.request.request_id == "long"] for plan in server.plans[1:6]]
    assert all(len(chunk) == 1 for chunk in chunks)
    assert [chunk[0].start for chunk in chunks] == sorted(chunk[0].start for chunk in chunks)
    turns = [any(e.request.request_id == "short" for e in plan.scheduled) for plan in server.plans]
    assert all(first or second for first, second in itertools.pairwise(turns))
    server.run()


def test_those_who_lack_pages_do_not_keep_others_together() -> None:
    """Waiting requests that cannot be admitted do not count where the running ones are shared out."""
    server = Server(make_config(num_stages=2, max_num_seqs=16, num_pages=9, page_size=8), in_flight=3)
    for index in range(4):
        server.add(make_request(f"r{index}", [index] * 9, max_tokens=7))
    for index in range(4, 12):
        server.add(make_request(f"r{index}", [index] * 20, max_tokens=7))
    server.step()
    server.step()
    assert server.scheduler.num_running == 4
    for _ in range(3):
        server.step()
    assert [len(plan.scheduled) for plan in server.plans[-2:]] == [2, 2]
    server.run()


def test_a_pipeline_has_a_stage() -> None:
    with pytest.raises(ConfigError, match="num_stages is 0; it must be at least 1"):
        Scheduler(make_config(num_stages=0))

"""Preempted requests whose pages wait on the host: nothing is lost, nothing is computed twice."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from jaxllm.errors import ConfigError
from jaxllm.request import Request, RequestStatus
from jaxllm.sampling_params import SamplingParams
from jaxllm.scheduling import IntegrityError, Plan, RequestView, ScheduledRequest, Scheduler, SchedulingPolicy
from jaxllm.scheduling.simulator import DEVICES, ModelFigures, RooflineCost, make_workload, simulate
from jaxllm.scheduling.simulator.work import Shape, Work
from tests.scheduling.simulated_device import (
    Server,
    make_config,
    make_request,
    random_config,
    random_requests,
)


def needed(requests: list[Request]) -> int:
    """Tokens that have to be computed at least; the last of each is only sampled."""
    return sum(r.num_prompt_tokens + r.max_tokens - 1 for r in requests)


def tight(**fields: object) -> Server:
    """Pages for about two of the six requests that it will have, and a host with room for all."""
    config = {"num_pages": 17, "num_host_pages": 96, "enable_prefix_caching": False}
    server = Server(make_config(**(config | fields)), in_flight=2)
    for index in range(6):
        server.add(make_request(f"r{index}", [index % 7] * 9, max_tokens=40))
    return server


def test_nothing_is_computed_twice_where_the_host_has_room() -> None:
    server = tight()
    server.run()
    assert server.scheduler.num_preemptions == server.scheduler.num_swaps > 3
    assert server.device.num_computed_tokens == needed(server.requests)
    again = tight(num_host_pages=0)
    again.run()
    assert again.scheduler.num_preemptions and not again.scheduler.num_swaps
    assert again.device.num_computed_tokens > needed(again.requests)


def test_where_the_host_is_full_the_rest_is_computed_again() -> None:
    server = tight(num_host_pages=9)
    server.run()
    assert 0 < server.scheduler.num_swaps < server.scheduler.num_preemptions
    assert server.device.num_computed_tokens > needed(server.requests)


class KeepsOdd(SchedulingPolicy):
    """Keeps every other request, by its name."""

    def keep_pages(self, request: RequestView) -> bool:
        return int(request.request_id[1:]) % 2 == 1


def test_the_policy_chooses_who_is_kept() -> None:
    server = tight()
    server.scheduler = Scheduler(server.config, KeepsOdd())
    for request in (make_request(f"r{i}", [i] * 9, max_tokens=40) for i in range(6, 12)):
        server.add(request)
    server.requests = server.requests[6:]
    outs = 0
    while server.scheduler.has_unfinished() or server.outstanding:
        plan = server.step()
        if plan is not None and plan.copies_out:
            outs += 1
            # Whoever is copied out is among those who stopped running, and has an odd name.
            assert any(int(r.request_id[1:]) % 2 for r in plan.released)
    server.check_end()
    assert 0 < server.scheduler.num_swaps < server.scheduler.num_preemptions
    assert outs


@pytest.mark.parametrize("seed", range(150))
def test_any_traffic_under_tight_memory_gives_what_it_gives_alone(seed: int) -> None:
    """The device checks each page that is read, the server every account; then the oracle every token."""
    rng = random.Random(f"swap {seed}")
    config = random_config(rng)
    longest = -(-(config.max_model_len - 1) // config.page_size)
    config = replace(
        config,
        num_pages=longest + 1 + rng.randrange(longest),
        num_host_pages=rng.choice([1, longest, 2 * longest, 20 * longest]),
    )
    server = Server(config, in_flight=rng.choice([1, 2, 3]))
    waiting = random_requests(rng, config, 25)
    while waiting or server.scheduler.has_unfinished():
        for _ in range(min(rng.randrange(5), len(waiting))):
            server.add(waiting.pop())
        server.step()
        alive = [r for r in server.requests if not r.status.is_finished]
        if alive and rng.random() < 0.05:
            server.scheduler.finish(rng.choice(alive), RequestStatus.FINISHED_ABORTED)
            server.scheduler.check_integrity()
    while server.outstanding:
        server.apply()
    server.check_end()


def test_the_random_traffic_does_swap() -> None:
    """The test above would be empty if memory were never tight enough."""
    swaps = restored = 0
    for seed in range(10):
        rng = random.Random(f"swap {seed}")
        config = make_config(num_pages=20, num_host_pages=60, enable_prefix_caching=bool(seed % 2))
        server = Server(config, in_flight=2)
        for request in random_requests(rng, config, 25):
            server.add(request)
        server.run()
        swaps += server.scheduler.num_swaps
        restored += sum(len(plan.copies_in) for plan in server.plans)
    assert swaps > 20
    assert restored > 50


def test_pages_that_the_prefix_cache_still_has_are_not_copied_back() -> None:
    server = Server(make_config(num_pages=17, num_host_pages=40), in_flight=1)
    first, second = make_request("r0", [1] * 9, max_tokens=40), make_request("r1", [2] * 30, max_tokens=30)
    server.add(first)
    server.add(second)
    server.run()
    out = sum(len(plan.copies_out) for plan in server.plans)
    back = sum(len(plan.copies_in) for plan in server.plans)
    assert server.scheduler.num_swaps
    assert back < out


def test_a_request_that_ends_while_it_is_kept_leaves_nothing_behind() -> None:
    server = tight()
    while not server.scheduler.num_swaps:
        server.step()
    [kept] = [r for r in server.scheduler.waiting if r.status is RequestStatus.PREEMPTED]
    view = server.scheduler._sequences[kept.request_id].view
    assert kept.num_computed_tokens == kept.num_tokens - kept.num_tokens == 0
    assert view.num_prefix_tokens > 9
    server.scheduler.finish(kept, RequestStatus.FINISHED_ABORTED)
    server.scheduler.check_integrity()
    server.run()


def test_a_page_that_is_lost_or_twice_there_is_noticed() -> None:
    for spoil in (
        lambda free: free.pop(),
        lambda free: free.append(free[0]),
        lambda free: free.append(10**6),
    ):
        server = tight()
        while not server.scheduler.num_swaps:
            server.step()
        spoil(server.scheduler._swap._free)
        with pytest.raises(IntegrityError, match="host"):
            server.scheduler.check_integrity()


def test_limits() -> None:
    with pytest.raises(ConfigError, match="num_host_pages is -1"):
        Scheduler(make_config(num_host_pages=-1))


def test_copies_have_their_price() -> None:
    model = ModelFigures(
        32, 32, 8, 128, layer_parameters=7 * 10**9, head_parameters=5 * 10**8, hidden_size=4096
    )
    cost = RooflineCost(model, DEVICES["h200"], bandwidth_share=0.5, page_size=32)
    rows = (ScheduledRequest(Request("r", [1], SamplingParams()), 99, 1, True),)
    without = Plan(0, rows, (), 1)
    copied = Plan(0, rows, (), 1, copies_out=((1, 0), (2, 1)), copies_in=((5, 3),))
    seconds = 3 * 32 * model.kv_bytes_per_token / (64e9 * 0.5)
    assert cost.seconds(copied) - cost.seconds(without) == pytest.approx(seconds)
    shape = Shape(1, 1, True)
    assert Work.of(copied, shape) == Work.of(without, shape)._replace(copied_pages=3)


def test_a_simulated_server_swaps_as_a_real_one() -> None:
    model = ModelFigures(
        32, 32, 8, 128, layer_parameters=7 * 10**9, head_parameters=5 * 10**8, hidden_size=4096
    )
    cost = RooflineCost(model, DEVICES["h200"])
    config = make_config(
        max_num_seqs=64, max_num_batched_tokens=4096, max_model_len=16384, page_size=16, num_pages=2000
    )
    trace = list(make_workload("poisson", rate=30, num_requests=150))
    again = simulate(trace, config, cost)
    swapped = simulate(trace, replace(config, num_host_pages=20_000), cost)
    assert again.num_preemptions > 10
    computed = [sum(s.num_prompt_tokens + s.num_output_tokens for s in r.steps) for r in (again, swapped)]
    assert computed[1] < computed[0]
    # Every token once, but for the last of each request, which is only sampled.
    assert computed[1] == sum(r.num_prompt_tokens + r.output_len - 1 for r in trace)

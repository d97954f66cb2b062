"""What each built-in policy is for, seen in the plans that come of it."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from typing import Any

import pytest

from jaxllm.errors import ConfigError
from jaxllm.scheduling import Plan, SchedulingPolicy, load_policy
from jaxllm.scheduling.policies import BUILT_IN, lengths
from tests.scheduling.simulated_device import Server, make_config, make_request


def serve(name: str, config: dict[str, Any] | None = None, **limits: object) -> Server:
    return Server(make_config(enable_prefix_caching=False, **limits), policy=load_policy(name, config))


def rows(plan: Plan | None) -> dict[str, int]:
    """Tokens by request."""
    assert plan is not None
    return {entry.request.request_id: entry.num_tokens for entry in plan.scheduled}


def order_of_ends(server: Server) -> list[str]:
    ended: list[str] = []
    while server.scheduler.has_unfinished():
        server.step()
        ended += [r.request_id for r in server.requests if r.status.is_finished and r.request_id not in ended]
    server.run()
    return ended


def prompt(length: int, first: int = 1) -> list[int]:
    return [first % 7] + [3] * (length - 1)


class TestPrefillFirst:
    def test_decodes_stand_still_while_a_prompt_is_computed(self) -> None:
        server = serve("prefill-first")
        server.add(make_request("old", prompt(4), max_tokens=9))
        server.step()
        server.add(make_request("new", prompt(8), max_tokens=9))
        assert rows(server.step()) == {"new": 8}
        assert rows(server.step()) == {"old": 1, "new": 1}
        server.run()

    def test_a_prompt_longer_than_a_step_is_not_left_half_done(self) -> None:
        server = serve("prefill-first", max_num_batched_tokens=8)
        server.add(make_request("long", prompt(20), max_tokens=2))
        assert rows(server.step()) == {"long": 8}
        server.add(make_request("new", prompt(8), max_tokens=2))
        assert rows(server.step()) == {"long": 8}
        assert rows(server.step()) == {"long": 4, "new": 4}
        server.run()


class TestSarathi:
    def test_a_step_holds_the_decodes_and_prompt_tokens_up_to_the_budget(self) -> None:
        server = serve("sarathi", {"token_budget": 10})
        for name in "abc":
            server.add(make_request(name, prompt(3), max_tokens=30))
        server.step()
        server.add(make_request("long", prompt(20), max_tokens=3))
        assert rows(server.step()) == {"a": 1, "b": 1, "c": 1, "long": 7}
        assert rows(server.step()) == {"a": 1, "b": 1, "c": 1, "long": 7}
        assert rows(server.step()) == {"a": 1, "b": 1, "c": 1, "long": 6}
        assert rows(server.step()) == {"a": 1, "b": 1, "c": 1, "long": 1}
        server.run()

    def test_nobody_joins_while_decodes_fill_the_budget(self) -> None:
        server = serve("sarathi", {"token_budget": 2})
        for name in "abcd":
            server.add(make_request(name, prompt(1), max_tokens=9))
        plans = [rows(server.step()) for _ in range(18)]
        assert plans == [{"a": 1, "b": 1}] * 9 + [{"c": 1, "d": 1}] * 9
        server.run()


class TestShortestFirst:
    def test_in_order_of_length(self) -> None:
        server = serve("sjf", max_num_seqs=1)
        for name, size, outputs in [("a", 9, 9), ("b", 2, 3), ("c", 2, 30), ("d", 6, 2)]:
            server.add(make_request(name, prompt(size), max_tokens=outputs))
        assert order_of_ends(server) == ["b", "d", "a", "c"]

    def test_who_runs_is_not_interrupted(self) -> None:
        server = serve("sjf", max_num_seqs=1)
        server.add(make_request("long", prompt(9), max_tokens=30))
        server.step()
        server.add(make_request("short", prompt(2), max_tokens=2))
        assert order_of_ends(server) == ["long", "short"]

    def test_shortest_remaining_takes_the_seat(self) -> None:
        server = serve("srtf", max_num_seqs=1)
        server.add(make_request("long", prompt(9), max_tokens=30))
        server.step()
        server.add(make_request("short", prompt(2), max_tokens=2))
        assert order_of_ends(server) == ["short", "long"]
        assert server.scheduler.num_preemptions == 1

    def test_who_is_far_along_keeps_its_seat(self) -> None:
        server = serve("srtf", {"protected": 0.5}, max_num_seqs=1)
        long = make_request("long", prompt(9), max_tokens=30)
        server.add(long)
        while long.num_output_tokens < 15:
            server.step()
        server.add(make_request("short", prompt(2), max_tokens=2))
        assert order_of_ends(server) == ["long", "short"]

    def test_pages_are_room_too(self) -> None:
        server = serve("srtf", num_pages=17)  # one request of full length
        server.add(make_request("long", prompt(4), max_tokens=50))
        server.add(make_request("wide", prompt(40), max_tokens=20))
        server.step()
        server.add(make_request("short", prompt(20), max_tokens=1))
        assert order_of_ends(server)[0] == "short"
        assert server.requests[0].num_preemptions > server.requests[1].num_preemptions == 0

    def test_lengths_are_learnt(self) -> None:
        history = lengths.History(rate=0.5, first_guess=100)
        server = Server(make_config(policy="fcfs"))
        for index in range(20):
            request = make_request(f"r{index}", prompt(8), max_tokens=6)
            server.add(request)
            view = server.scheduler._sequences[request.request_id].view
            server.run()
            history.learn(view)
        new = make_request("new", prompt(9), max_tokens=50)
        server.add(new)
        view = server.scheduler._sequences["new"].view
        assert history.predict(view) == 6
        while new.num_output_tokens < 7:
            server.step()
        assert history.predict(view) == 6, "one that is past its guess is as far from its end again"
        server.run()


class TestDeadlines:
    def test_whose_token_is_due_first(self) -> None:
        server = serve("edf", {"ttft": 5.0, "tpot": 1.0}, max_num_seqs=1)
        server.add(make_request("patient", prompt(2), arrival_time=0.0, ttft_objective=60.0))
        server.add(make_request("usual", prompt(2), arrival_time=1.0))
        server.add(make_request("urgent", prompt(2), arrival_time=2.0, ttft_objective=0.5))
        assert order_of_ends(server) == ["urgent", "usual", "patient"]

    def test_who_is_ahead_loses_its_pages_first(self) -> None:
        server = serve("edf", num_pages=17)
        for name, pace in [("slow", 9.0), ("fast", 0.01)]:
            server.add(make_request(name, prompt(4), max_tokens=50, tpot_objective=pace))
        server.run()
        preempted = {r.request_id: r.num_preemptions for r in server.requests}
        assert preempted["slow"] > 0
        assert preempted["fast"] == 0


class TestFairness:
    def test_a_flood_of_one_tenant_does_not_hold_up_another(self) -> None:
        server = serve("vtc", max_num_seqs=2)
        for index in range(10):
            server.add(make_request(f"flood{index}", prompt(5), max_tokens=5, tenant="flood"))
        server.step()
        server.add(make_request("single", prompt(5), max_tokens=5, tenant="other"))
        assert order_of_ends(server).index("single") <= 3

    def test_backlogged_tenants_are_served_by_weight(self) -> None:
        server = serve("vtc", {"tenant_weights": {"a": 3.0}}, max_num_seqs=1)
        for index in range(60):
            for tenant in "ab":
                server.add(make_request(f"{tenant}{index}", prompt(4), max_tokens=4, tenant=tenant))
        ends = order_of_ends(server)[:40]
        assert sum(name.startswith("a") for name in ends) == 30

    def test_idling_saves_nothing_up(self) -> None:
        server = serve("vtc", max_num_seqs=1)
        for index in range(20):
            server.add(make_request(f"busy{index}", prompt(4), max_tokens=4, tenant="busy"))
        for _ in range(40):  # about ten of them
            server.step()
        for index in range(20):
            server.add(make_request(f"late{index}", prompt(4), max_tokens=4, tenant="late"))
        server.step()
        ends = [name for name in order_of_ends(server) if name.startswith("late") or int(name[4:]) >= 10]
        first_ten = sum(name.startswith("late") for name in ends[:10])
        assert 4 <= first_ten <= 6, "a tenant that was away shares evenly from now on"


class TestMultiLevelFeedback:
    def test_a_newcomer_passes_one_that_used_up_its_quantum(self) -> None:
        server = serve("mlfq", {"quantum": 8}, max_num_seqs=1)
        server.add(make_request("long", prompt(4), max_tokens=50))
        for _ in range(12):
            server.step()
        server.add(make_request("short", prompt(4), max_tokens=2))
        assert order_of_ends(server) == ["short", "long"]

    def test_a_long_prompt_joins_a_lower_queue(self) -> None:
        server = serve("mlfq", {"quantum": 8}, max_num_seqs=1)
        server.add(make_request("running", prompt(4), max_tokens=3))
        server.step()
        server.add(make_request("long prompt", prompt(30), max_tokens=2))
        server.add(make_request("short prompt", prompt(3), max_tokens=2))
        assert order_of_ends(server) == ["running", "short prompt", "long prompt"]

    def test_nobody_starves(self) -> None:
        def steps_until_end(starvation_tokens: int) -> int:
            server = serve("mlfq", {"quantum": 8, "starvation_tokens": starvation_tokens}, max_num_seqs=1)
            starving = make_request("starving", prompt(40), max_tokens=2)
            server.add(make_request("first", prompt(2), max_tokens=2))
            server.step()
            server.add(starving)
            for step in range(400):
                server.add(make_request(f"r{step}", prompt(3), max_tokens=1))
                server.step()
                if starving.status.is_finished:
                    return step
            return 400

        assert steps_until_end(100) < 100
        assert steps_until_end(10**9) == 400


class TestLongestPrefix:
    def test_what_is_cached_goes_first(self) -> None:
        config = make_config(max_num_seqs=1, max_model_len=64, num_pages=200)
        server = Server(config, policy=load_policy("lpm"))
        server.add(make_request("warm", prompt(20, 1), max_tokens=2))
        server.run()
        server.add(make_request("running", prompt(3, 5), max_tokens=3))
        server.step()
        server.add(make_request("cold", prompt(24, 2), max_tokens=2))
        server.add(make_request("some", prompt(9, 1) + [2] * 8, max_tokens=2))
        server.add(make_request("most", prompt(17, 1) + [2] * 8, max_tokens=2))
        assert order_of_ends(server)[-3:] == ["most", "some", "cold"]

    def test_a_long_queue_is_served_as_it_came(self) -> None:
        server = Server(make_config(max_num_seqs=1), policy=load_policy("lpm", {"most_waiting": 1}))
        server.add(make_request("warm", prompt(20, 1), max_tokens=2))
        server.run()
        for name, first in [("a", 2), ("b", 3), ("c", 1)]:
            server.add(make_request(name, prompt(20, first), max_tokens=2))
        assert order_of_ends(server) == ["warm", "a", "b", "c"]


class Shy(SchedulingPolicy):
    """Admits nobody and computes nothing, unless it must."""

    def admit(self, request: Any) -> bool:
        return False

    def chunk_size(self, request: Any, num_tokens: int) -> int:
        return 0


def test_answers_that_leave_the_device_idle_are_not_followed() -> None:
    server = Server(make_config(), policy=Shy())
    for index in range(4):
        server.add(make_request(f"r{index}", prompt(5), max_tokens=4))
    server.run(limit=100)


class TakesTurns(SchedulingPolicy):
    """Computes every other step, with its pages kept meanwhile."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str, int]] = []
        self.sits_out = "b"

    def chunk_size(self, request: Any, num_tokens: int) -> int:
        return 0 if request.request_id == self.sits_out else min(num_tokens, 3)

    def on_arrival(self, request: Any) -> None:
        self.told.append(("arrival", request.request_id, 0))

    def on_admission(self, request: Any, num_cached_tokens: int) -> None:
        self.told.append(("admission", request.request_id, num_cached_tokens))

    def on_progress(self, request: Any, num_tokens: int) -> None:
        self.told.append(("progress", request.request_id, num_tokens))

    def on_finish(self, request: Any) -> None:
        self.told.append(("finish", request.request_id, request.num_output_tokens))


def test_chunks_and_everything_that_a_policy_is_told() -> None:
    policy = TakesTurns()
    server = Server(make_config(), policy=policy)
    server.add(make_request("a", prompt(5), max_tokens=2))
    server.add(make_request("b", prompt(5), max_tokens=1))
    assert rows(server.step()) == {"a": 3}
    assert rows(server.step()) == {"a": 2}
    policy.sits_out = ""
    assert rows(server.step()) == {"a": 1, "b": 1}, "the first page of b is in the cache"
    server.run()
    assert policy.told == [
        ("arrival", "a", 0),
        ("arrival", "b", 0),
        ("admission", "a", 0),
        ("progress", "a", 3),
        ("progress", "a", 2),
        ("progress", "a", 1),
        ("admission", "b", 4),
        ("progress", "b", 1),
        ("finish", "a", 2),
        ("finish", "b", 1),
    ]


def test_arguments_reach_a_policy_and_wrong_ones_are_told() -> None:
    with pytest.raises(ConfigError, match="quantums"):
        load_policy("mlfq", {"quantums": 3})
    with pytest.raises(ConfigError, match="token_budget=0"):
        load_policy("sarathi", {"token_budget": 0})
    with pytest.raises(ConfigError, match="predictor='crystal ball'"):
        load_policy("sjf", {"predictor": "crystal ball"})


def test_packages_may_offer_policies(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("taking-turns", f"{__name__}:TakesTurns", "jaxllm.scheduling_policies")
    monkeypatch.setattr(
        "jaxllm.scheduling.policies.entry_points", lambda group: [point] if group == point.group else []
    )
    monkeypatch.setitem(
        __import__("sys").modules, __name__, __import__("types").SimpleNamespace(TakesTurns=TakesTurns)
    )
    assert isinstance(load_policy("taking-turns"), TakesTurns)
    with pytest.raises(ConfigError, match=r"fcfs, .*taking-turns"):
        load_policy("other")


def test_each_says_where_it_comes_from() -> None:
    for name, policy in BUILT_IN.items():
        assert policy.__doc__, name
        assert name == "priority" or any(digit in policy.__doc__ for digit in ("19", "20")), (
            f"{name}: no source"
        )

"""Policies: what they may see and do, and what happens to one that fails."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import pytest

from jaxllm.errors import ConfigError
from jaxllm.scheduling import (
    BudgetSplit,
    FirstComeFirstServed,
    Priority,
    RequestView,
    SchedulingPolicy,
    StepView,
    load_policy,
)
from tests.scheduling.simulated_device import Server, make_config, make_request


class ShortestPromptFirst(SchedulingPolicy):
    def rank(self, request: RequestView) -> float:
        return request.num_prompt_tokens


def load(server: Server, count: int = 6) -> Server:
    for index in range(count):
        prompt = [(index + i) % 7 for i in range(20 - 2 * index)]
        server.add(make_request(f"r{index}", prompt, max_tokens=30))
    return server


def test_names() -> None:
    assert isinstance(load_policy("fcfs"), FirstComeFirstServed)
    assert isinstance(load_policy("priority"), Priority)


def test_a_policy_of_ones_own_is_found_by_module_and_class(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("some_policies")
    module.Shortest = ShortestPromptFirst  # type: ignore[attr-defined]
    module.NotOne = dict  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "some_policies", module)
    assert isinstance(load_policy("some_policies:Shortest"), ShortestPromptFirst)
    server = load(Server(make_config(policy="some_policies:Shortest", max_num_seqs=1)), 3)
    assert [r.request_id for r in server.scheduler.waiting] == ["r2", "r1", "r0"]
    server.run()
    with pytest.raises(ConfigError, match="gives a dict, not a policy; derive it from"):
        load_policy("some_policies:NotOne")


@pytest.mark.parametrize("name", ["", "FCFS", ":", "a:", ":b", "no_such_module:Policy", "sys:NoSuchClass"])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_policy(name)
    assert caught.value.param == "scheduling_policy"
    assert repr(name) in str(caught.value)


def test_views_are_up_to_date_and_read_only() -> None:
    request = make_request("a", [1, 2, 3], max_tokens=5, priority=4, arrival_time=2.5, group_id="g")
    view = RequestView(request)
    for name in dir(RequestView):
        if name.startswith("_"):
            continue
        computed = {"num_pages": len(request.pages), "num_prefix_tokens": 0}
        owner = request.terms if hasattr(request.terms, name) else request
        expected: Any = computed[name] if name in computed else getattr(owner, name)
        assert getattr(view, name) == expected
        with pytest.raises(AttributeError, match="cannot change"):
            setattr(view, name, 1)
    request.token_ids.append(1)
    assert view.num_output_tokens == 1


def test_priority_breaks_ties_by_arrival_and_then_by_order() -> None:
    server = Server(make_config(policy="priority"))
    for name, priority, arrival in [("a", 1, 0.0), ("b", 0, 2.0), ("c", 0, 1.0), ("d", 0, 1.0), ("e", -3, 9)]:
        server.add(make_request(name, [1], priority=priority, arrival_time=arrival))
    assert [r.request_id for r in server.scheduler.waiting] == ["e", "c", "d", "b", "a"]
    server.run()


class PrefillFirst(SchedulingPolicy):
    def split_budget(self, step: StepView) -> BudgetSplit:
        return BudgetSplit(0 if step.waiting else step.num_tokens, step.num_tokens)


def test_a_split_that_puts_new_requests_first() -> None:
    server = Server(make_config(max_num_seqs=2), policy=PrefillFirst())
    server.add(make_request("a", [1, 2], max_tokens=9))
    server.step()
    server.add(make_request("b", [3, 4], max_tokens=9))
    server.add(make_request("c", [5, 6], max_tokens=9))
    first = server.step()
    assert first is not None and [e.request.request_id for e in first.scheduled] == ["b"]
    # c cannot start, so the split would leave the device idle: the running ones go on.
    second = server.step()
    assert second is not None and [e.request.request_id for e in second.scheduled] == ["a", "b"]
    server.run()


class LastInFirstOut(SchedulingPolicy):
    dynamic_ranks = True

    def rank(self, request: RequestView) -> tuple[float, ...]:
        return (-request.arrival_time, request.num_output_tokens)


def test_dynamic_ranks_are_asked_again() -> None:
    server = Server(make_config(num_pages=17), policy=LastInFirstOut())
    for index in range(6):
        server.add(make_request(f"r{index}", [index, 1, 2], max_tokens=50, arrival_time=float(index)))
    server.run()
    assert server.scheduler.num_preemptions > 0


class Raises(SchedulingPolicy):
    """Answers like fcfs, and fails at one question from some call on."""

    def __init__(self, question: str, answer: Any, after: int = 0, dynamic: bool = False) -> None:
        self.question, self.answer, self.left, self.dynamic_ranks = question, answer, after, dynamic

    def fail(self, question: str, good: Any) -> Any:
        if question != self.question:
            return good
        self.left -= 1
        if self.left >= 0:
            return good
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def rank(self, request: RequestView) -> Any:
        return self.fail("rank", (request.priority, request.num_prompt_tokens))

    def choose_victim(self, candidates: Sequence[RequestView]) -> Any:
        return self.fail("choose_victim", candidates[-1])

    def split_budget(self, step: StepView) -> Any:
        return self.fail("split_budget", BudgetSplit(step.num_tokens, step.num_tokens))

    def preempt(self, step: StepView) -> Any:
        return self.fail("preempt", ())

    def admit(self, request: RequestView) -> Any:
        return self.fail("admit", True)

    def chunk_size(self, request: RequestView, num_tokens: int) -> Any:
        return self.fail("chunk_size", num_tokens)

    def keep_pages(self, request: RequestView) -> Any:
        return self.fail("keep_pages", True)

    def on_arrival(self, request: RequestView) -> None:
        self.fail("on_arrival", None)

    def on_admission(self, request: RequestView, num_cached_tokens: int) -> None:
        self.fail("on_admission", None)

    def on_progress(self, request: RequestView, num_tokens: int) -> None:
        self.fail("on_progress", None)

    def on_finish(self, request: RequestView) -> None:
        self.fail("on_finish", None)


@pytest.mark.parametrize("after", [0, 2, 7])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(
    ("question", "answer"),
    [
        *[
            (question, RuntimeError("no"))
            for question in vars(SchedulingPolicy)
            if not question.startswith("_") and callable(getattr(SchedulingPolicy, question))
        ],
        ("rank", None),
        ("rank", float("nan")),
        ("rank", (1, "x")),
        ("choose_victim", None),
        ("choose_victim", RequestView(make_request("stranger", [1]))),
        ("split_budget", None),
        ("split_budget", (1, 2, 3)),
        ("split_budget", (-1, 5)),
        ("split_budget", (0.5, 5)),
        ("preempt", None),
        ("preempt", (RequestView(make_request("stranger", [1])),)),
        ("admit", None),
        ("keep_pages", None),
        ("chunk_size", -1),
        ("chunk_size", 10**9),
        ("chunk_size", 1.5),
    ],
)
def test_a_policy_that_fails_is_named_and_serving_goes_on(
    question: str, answer: Any, dynamic: bool, after: int, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(num_pages=17, num_host_pages=40)
    server = Server(config, in_flight=2, policy=Raises(question, answer, after, dynamic))
    with caplog.at_level(logging.ERROR):
        load(server, 9).run()
    assert len(caplog.records) <= 1
    if after == 0:
        assert "test_policy.Raises failed; going on with fcfs" in caplog.text


def test_a_policy_without_attributes_is_replaced(caplog: pytest.LogCaptureFixture) -> None:
    load(Server(make_config(), policy=object())).run()  # type: ignore[arg-type]
    assert "builtins.object failed" in caplog.text

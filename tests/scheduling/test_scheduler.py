"""One test for each rule of the scheduler."""

from __future__ import annotations

import pytest

from jaxllm.errors import ConfigError, InvalidRequestError
from jaxllm.request import Request, RequestStatus
from jaxllm.sampling_params import RepetitionDetectionParams
from jaxllm.scheduling import IntegrityError, Plan, Scheduler, StepResult
from tests.scheduling.simulated_device import EOS, Server, make_config, make_request


def rows(plan: Plan | None) -> list[tuple[str, int, int, bool]]:
    assert plan is not None
    return [(e.request.request_id, e.start, e.num_tokens, e.samples) for e in plan.scheduled]


def tokens(count: int, first: int = 0) -> list[int]:
    return [(first + 3 * i) % 7 for i in range(count)]


def apply(scheduler: Scheduler, plan: Plan | None, *sampled: list[int]) -> list[tuple[str, list[int]]]:
    assert plan is not None
    result = StepResult(list(sampled), [None] * len(sampled))
    return [(u.request.request_id, u.new_token_ids) for u in scheduler.apply(plan, result)]


# The token budget


def test_running_requests_come_first_and_prompts_take_what_is_left() -> None:
    server = Server(make_config(max_num_batched_tokens=10))
    server.add(make_request("a", tokens(3), max_tokens=3))
    assert rows(server.step()) == [("a", 0, 3, True)]
    server.add(make_request("b", tokens(20, 1), max_tokens=2))
    assert rows(server.step()) == [("a", 3, 1, True), ("b", 0, 9, False)]
    assert rows(server.step()) == [("a", 4, 1, True), ("b", 9, 9, False)]
    assert rows(server.step()) == [("b", 18, 2, True)]
    assert rows(server.step()) == [("b", 20, 1, True)]
    server.run()


def test_a_long_prompt_is_cut_at_the_threshold() -> None:
    server = Server(make_config(long_prefill_token_threshold=6))
    server.add(make_request("a", tokens(14), max_tokens=1))
    server.add(make_request("b", tokens(5, 2), max_tokens=1))
    assert rows(server.step()) == [("a", 0, 6, False), ("b", 0, 5, True)]
    assert rows(server.step()) == [("a", 6, 6, False)]
    assert rows(server.step()) == [("a", 12, 2, True)]


def test_a_resumed_long_prompt_leaves_a_token_for_everybody_behind_it() -> None:
    server = Server(make_config(max_num_batched_tokens=8, policy="priority"))
    server.add(make_request("young", tokens(2), max_tokens=20, priority=1))
    server.step()
    server.add(make_request("old", tokens(30, 1), max_tokens=2, priority=0))
    assert rows(server.step()) == [("young", 2, 1, True), ("old", 0, 7, False)]
    assert rows(server.step()) == [("old", 7, 7, False), ("young", 3, 1, True)]
    server.run()


def test_without_chunks_a_prompt_waits_until_it_fits_whole_and_nobody_overtakes() -> None:
    config = make_config(enable_chunked_prefill=False, max_num_batched_tokens=64)
    server = Server(config)
    server.add(make_request("a", tokens(40), max_tokens=2))
    server.add(make_request("b", tokens(30, 1), max_tokens=1))
    server.add(make_request("c", tokens(3, 2), max_tokens=1))
    assert rows(server.step()) == [("a", 0, 40, True)]
    assert rows(server.step()) == [("a", 40, 1, True), ("b", 0, 30, True), ("c", 0, 3, True)]
    server.run()


def test_max_num_seqs() -> None:
    server = Server(make_config(max_num_seqs=2))
    for index in range(3):
        server.add(make_request(f"r{index}", tokens(3, index), max_tokens=2))
    assert [row[0] for row in rows(server.step())] == ["r0", "r1"]
    assert (server.scheduler.num_running, server.scheduler.num_waiting) == (2, 1)
    assert [r.request_id for r in server.scheduler.waiting] == ["r2"]
    server.run()


def test_nothing_to_do_gives_no_plan() -> None:
    scheduler = Scheduler(make_config())
    assert scheduler.schedule() is None
    assert not scheduler.has_unfinished()


# Steps in flight


@pytest.mark.parametrize("reschedule", [False, True])
def test_a_token_in_flight(reschedule: bool) -> None:
    scheduler = Scheduler(make_config(reschedule_in_flight=reschedule))
    request = make_request("a", tokens(3), max_tokens=3)
    scheduler.add(request)
    first = scheduler.schedule()
    assert rows(first) == [("a", 0, 3, True)]
    assert (request.num_tokens, request.num_pending_tokens) == (4, 1)
    second = scheduler.schedule()
    if not reschedule:
        assert second is None
        assert apply(scheduler, first, [5]) == [("a", [5])]
        second = scheduler.schedule()
        assert rows(second) == [("a", 3, 1, True)]
        assert apply(scheduler, second, [6]) == [("a", [6])]
        third = scheduler.schedule()
    else:
        assert rows(second) == [("a", 3, 1, True)]
        third = scheduler.schedule()
        # Three tokens are on their way, and three are allowed.
        assert scheduler.schedule() is None
        assert apply(scheduler, first, [5]) == [("a", [5])]
        assert apply(scheduler, second, [6]) == [("a", [6])]
    assert rows(third) == [("a", 4, 1, True)]
    assert apply(scheduler, third, [5]) == [("a", [5])]
    assert request.status is RequestStatus.FINISHED_LENGTH
    assert not scheduler.has_unfinished()


def test_results_for_a_request_that_stopped_are_ignored() -> None:
    scheduler = Scheduler(make_config())
    request = make_request("a", tokens(3), max_tokens=9, ignore_eos=False)
    scheduler.add(request)
    first, second = scheduler.schedule(), scheduler.schedule()
    assert apply(scheduler, first, [EOS]) == [("a", [EOS])]
    assert request.status is RequestStatus.FINISHED_STOPPED
    assert (request.num_tokens, request.num_output_tokens) == (4, 1)
    assert scheduler.num_free_pages == 64
    assert apply(scheduler, second, [4]) == []
    assert request.output_token_ids == [EOS]


def test_plans_are_applied_in_order_and_results_fit_them() -> None:
    scheduler = Scheduler(make_config())
    scheduler.add(make_request("a", tokens(3), max_tokens=9))
    first, second = scheduler.schedule(), scheduler.schedule()
    with pytest.raises(ValueError, match="oldest"):
        apply(scheduler, second, [1])
    with pytest.raises(ValueError, match="1 rows"):
        apply(scheduler, first, [1], [2])
    with pytest.raises(ValueError, match="samples 'a'"):
        apply(scheduler, first, [])
    assert apply(scheduler, first, [1]) == [("a", [1])]
    scheduler.check_integrity()


def test_released_requests_go_with_the_next_plan() -> None:
    scheduler = Scheduler(make_config())
    a, b = make_request("a", tokens(3), max_tokens=1), make_request("b", tokens(5), max_tokens=2)
    waiting = make_request("w", tokens(4))
    scheduler.add(a)
    plan = scheduler.schedule()
    assert plan is not None and plan.released == ()
    apply(scheduler, plan, [1])
    assert scheduler.schedule() is None
    scheduler.add(waiting)
    scheduler.finish(waiting, RequestStatus.FINISHED_ABORTED)  # never ran, so there is nothing to release
    scheduler.add(b)
    plan = scheduler.schedule()
    assert plan is not None and plan.released == (a,)
    assert plan.step_id == 1


def test_a_finished_id_can_be_used_again_while_its_last_plan_is_in_flight() -> None:
    scheduler = Scheduler(make_config())
    old, new = make_request("a", tokens(3)), make_request("a", tokens(5, 1))
    scheduler.add(old)
    first = scheduler.schedule()
    scheduler.finish(old, RequestStatus.FINISHED_ABORTED)
    scheduler.add(new)
    second = scheduler.schedule()
    assert apply(scheduler, first, [4]) == []
    assert apply(scheduler, second, [2]) == [("a", [2])]
    assert (old.output_token_ids, new.output_token_ids) == ([], [2])


# The prefix cache


def test_a_later_request_finds_the_whole_pages_but_computes_its_last_token() -> None:
    server = Server(make_config())
    server.add(make_request("a", tokens(12), max_tokens=1))
    server.run()
    same, longer = make_request("b", tokens(12), max_tokens=1), make_request("c", tokens(14), max_tokens=1)
    server.add(same)
    server.add(longer)
    assert rows(server.step()) == [("b", 8, 4, True), ("c", 12, 2, True)]
    assert (same.num_cached_tokens, longer.num_cached_tokens) == (8, 12)
    assert (server.scheduler.prefix_cache_queries, server.scheduler.prefix_cache_hits) == (38, 20)


def test_output_tokens_are_found_too() -> None:
    server = Server(make_config())
    first = make_request("a", tokens(5), max_tokens=8)
    server.add(first)
    server.run()
    second = make_request("b", first.token_ids, max_tokens=1)
    server.add(second)
    # 13 tokens, of which the last was never computed: three pages.
    assert rows(server.step()) == [("b", 12, 1, True)]


def test_equal_prompts_that_arrive_together_compute_their_prefix_once() -> None:
    server = Server(make_config(max_num_seqs=16, max_num_batched_tokens=64))
    for index in range(16):
        server.add(make_request(f"r{index}", [*tokens(33), index % 7, index % 5], max_tokens=1))
    assert rows(server.step()) == [("r0", 0, 35, True)]
    assert rows(server.step()) == [(f"r{index}", 32, 3, True) for index in range(1, 16)]
    server.run()
    assert server.device.num_computed_tokens == 35 + 15 * 3


def test_a_request_is_held_back_while_its_prefix_is_computed_in_chunks() -> None:
    server = Server(make_config(max_num_batched_tokens=10, long_prefill_token_threshold=6))
    server.add(make_request("a", tokens(20), max_tokens=1))
    server.add(make_request("b", tokens(20), max_tokens=1))
    server.add(make_request("c", tokens(4, 1), max_tokens=1))
    # Somebody who shares nothing passes the one who is held back.
    assert rows(server.step()) == [("a", 0, 6, False), ("c", 0, 4, True)]
    assert rows(server.step()) == [("a", 6, 6, False)]
    assert rows(server.step()) == [("a", 12, 6, False)]
    # The page that `a` completes now is one that `b` has to compute in any case.
    assert rows(server.step()) == [("a", 18, 2, True), ("b", 16, 4, True)]
    server.run()


def test_nobody_waits_for_a_page_that_nobody_computes() -> None:
    server = Server(make_config(max_num_batched_tokens=8))
    a = make_request("a", tokens(20), max_tokens=1)
    b = make_request("b", tokens(20), max_tokens=1)
    server.add(a)
    server.add(b)
    assert rows(server.step()) == [("a", 0, 8, False)]
    server.scheduler.finish(a, RequestStatus.FINISHED_ABORTED)
    assert rows(server.step()) == [("b", 8, 8, False)]
    server.run()


def test_nobody_is_held_back_for_longer_than_a_page_can_take() -> None:
    server = Server(make_config(policy="priority", long_prefill_token_threshold=1))
    first = make_request("first", tokens(12), max_tokens=1, priority=0)
    second = make_request("second", tokens(12), max_tokens=1, priority=0, prompt_logprobs=1)
    server.add(first)
    server.add(make_request("patient", tokens(12), max_tokens=1, priority=1))
    for position in range(3):
        assert rows(server.step()) == [("first", position, 1, False)]
    server.scheduler.finish(first, RequestStatus.FINISHED_ABORTED)
    server.add(second)
    assert rows(server.step()) == [("second", 0, 1, False)]
    assert rows(server.step()) == [("second", 1, 1, False), ("patient", 0, 1, False)]
    server.run()


@pytest.mark.parametrize("caching", [False, True])
def test_sequences_of_one_request_share_its_prompt(caching: bool) -> None:
    server = Server(make_config(enable_prefix_caching=caching))
    for index in range(4):
        server.add(make_request(f"r{index}", tokens(18), max_tokens=4, group_id="g"))
    other = make_request("other", tokens(18), max_tokens=1, group_id="h")
    server.add(other)
    assert [row[:3] for row in rows(server.step())] == [("r0", 0, 18)] + (
        [] if caching else [("other", 0, 18)]
    )
    assert [row[:3] for row in rows(server.step()) if row[0] in ("r1", "r2", "r3")] == [
        ("r1", 16, 2),
        ("r2", 16, 2),
        ("r3", 16, 2),
    ]
    assert other.num_cached_tokens == (16 if caching else 0)
    server.run()
    again = make_request("again", tokens(18), max_tokens=1, group_id="g")
    server.add(again)
    server.run()
    assert again.num_cached_tokens == (16 if caching else 0)


def test_without_caching_single_requests_share_nothing() -> None:
    server = Server(make_config(enable_prefix_caching=False))
    for index in range(3):
        server.add(make_request(f"r{index}", tokens(18), max_tokens=2))
    assert [row[1:3] for row in rows(server.step())] == [(0, 18)] * 3
    server.run()
    assert server.scheduler.prefix_cache_queries == 0


@pytest.mark.parametrize("fields", [{"prompt_logprobs": 1}, {"skip_reading_prefix_cache": True}])
def test_requests_that_compute_every_position_read_nothing_and_still_write(fields: dict[str, int]) -> None:
    server = Server(make_config())
    server.add(make_request("a", tokens(12), max_tokens=1, **fields))
    server.add(make_request("b", tokens(12), max_tokens=1, **fields))
    assert rows(server.step()) == [("a", 0, 12, True), ("b", 0, 12, True)]
    server.run()
    server.add(make_request("c", tokens(12), max_tokens=1))
    assert rows(server.step()) == [("c", 8, 4, True)]
    assert server.scheduler.prefix_cache_queries == 12


def test_salts_keep_requests_apart() -> None:
    server = Server(make_config())
    for salt in (None, "x", "y", "x"):
        request = make_request(f"r{len(server.requests)}", tokens(12), max_tokens=1, cache_salt=salt)
        server.add(request)
        server.run()
    assert [request.num_cached_tokens for request in server.requests] == [0, 0, 0, 8]


def test_reset_prefix_cache_forgets_everything_unless_somebody_runs() -> None:
    server = Server(make_config())
    server.add(make_request("a", tokens(12), max_tokens=2))
    server.step()
    assert not server.scheduler.reset_prefix_cache()
    server.run()
    assert server.scheduler.reset_prefix_cache()
    server.add(make_request("b", tokens(12), max_tokens=2))
    assert rows(server.step()) == [("b", 0, 12, True)]


def test_the_tail_of_a_prefix_is_evicted_before_its_head() -> None:
    server = Server(make_config(num_pages=17))
    server.add(make_request("a", tokens(40), max_tokens=1))
    server.run()
    server.add(make_request("b", tokens(40, 1), max_tokens=1))  # 10 pages: 6 blank ones, 4 of a's
    server.run()
    again = make_request("again", tokens(40), max_tokens=1)
    server.add(again)
    server.run()
    assert again.num_cached_tokens == 24


# Preemption


def test_the_last_of_the_running_is_preempted_and_comes_back_first() -> None:
    server = Server(make_config(num_pages=17, max_num_seqs=3, enable_prefix_caching=False))
    a, b, c = (make_request(name, tokens(20, i), max_tokens=40) for i, name in enumerate("abc"))
    for request in (a, b, c):
        server.add(request)
    while not server.scheduler.num_preemptions:
        server.step()
    assert (a.num_preemptions, b.num_preemptions, c.num_preemptions) == (0, 0, 1)
    assert c.status is RequestStatus.PREEMPTED
    assert (c.num_computed_tokens, c.pages) == (0, [])
    late = make_request("late", tokens(2), max_tokens=1)
    server.add(late)
    assert [r.request_id for r in server.scheduler.waiting] == ["c", "late"]
    server.run()
    assert a.num_preemptions == 0


def test_priority_decides_who_is_admitted_and_who_is_preempted() -> None:
    server = Server(make_config(num_pages=17, policy="priority", max_num_seqs=2))
    server.add(make_request("low", tokens(24), max_tokens=30, priority=5))
    server.step()
    server.add(make_request("medium", tokens(24, 1), max_tokens=30, priority=3))
    server.add(make_request("high", tokens(24, 2), max_tokens=30, priority=-1))
    server.step()
    assert [r.request_id for r in server.scheduler.running] == ["high", "low"]
    server.run()
    low, _, high = server.requests
    assert low.num_preemptions > 0
    assert high.num_preemptions == 0


def test_a_resumed_request_finds_its_own_pages_again() -> None:
    server = Server(make_config(num_pages=17))
    a, b = make_request("a", tokens(21), max_tokens=20), make_request("b", tokens(21, 1), max_tokens=20)
    server.add(a)
    server.add(b)
    server.run()
    assert (a.num_preemptions, b.num_preemptions) == (0, 1)
    assert b.num_cached_tokens == 0  # of the first admission
    # 80 positions are needed at least; computing all of b again would take over 30 more.
    assert server.device.num_computed_tokens < 95


def test_a_resumed_request_makes_its_new_pages_findable() -> None:
    server = Server(make_config(num_pages=17))
    a, b = make_request("a", tokens(21), max_tokens=38), make_request("b", tokens(21, 1), max_tokens=38)
    server.add(a)
    server.add(b)
    server.run()
    assert b.num_preemptions == 1
    again = make_request("again", b.token_ids[:53], max_tokens=1)
    server.add(again)
    server.run()
    assert again.num_cached_tokens == 52


def test_a_preempted_request_waits_for_its_token_in_flight() -> None:
    scheduler = Scheduler(make_config(num_pages=6, max_model_len=20, page_size=4))
    a, b = make_request("a", tokens(8), max_tokens=9), make_request("b", tokens(8, 1), max_tokens=9)
    scheduler.add(a)
    scheduler.add(b)
    first = scheduler.schedule()  # four of the five pages
    second = scheduler.schedule()  # a takes the fifth; b needs one and has to give way
    assert rows(second) == [("a", 8, 1, True)]
    assert second is not None and second.released == (b,)
    assert (b.status, b.num_pending_tokens) == (RequestStatus.PREEMPTED, 1)
    third = scheduler.schedule()
    assert rows(third) == [("a", 9, 1, True)]
    assert apply(scheduler, first, [1], [2]) == [("a", [1]), ("b", [2])]
    assert b.output_token_ids == [2]
    scheduler.finish(a, RequestStatus.FINISHED_ABORTED)
    assert apply(scheduler, second, [1]) == []
    fourth = scheduler.schedule()
    # Its two full pages were not needed by anybody and are found again.
    assert rows(fourth) == [("b", 8, 1, True)]


def test_a_preempted_request_can_stop_by_its_token_in_flight() -> None:
    scheduler = Scheduler(make_config(num_pages=6, max_model_len=20))
    a = make_request("a", tokens(8), max_tokens=9)
    b = make_request("b", tokens(8, 1), max_tokens=9, stop_token_ids=[2])
    scheduler.add(a)
    scheduler.add(b)
    first, _ = scheduler.schedule(), scheduler.schedule()
    assert b.status is RequestStatus.PREEMPTED
    apply(scheduler, first, [1], [2])
    assert (b.status, b.stop_reason) == (RequestStatus.FINISHED_STOPPED, 2)
    assert scheduler.num_waiting == 0
    scheduler.check_integrity()


def test_a_prompt_is_not_started_on_pages_that_a_running_prompt_will_need() -> None:
    server = Server(make_config(num_pages=17, max_num_batched_tokens=8, long_prefill_token_threshold=4))
    server.add(make_request("a", tokens(50), max_tokens=1))
    server.add(make_request("b", tokens(20, 1), max_tokens=30))
    assert rows(server.step()) == [("a", 0, 4, False)]  # 13 of the 16 pages will be its own
    server.run()
    assert server.scheduler.num_preemptions == 0


def test_prompt_logprobs_are_delivered_once_in_spite_of_preemption() -> None:
    server = Server(make_config(num_pages=17, max_num_batched_tokens=16), in_flight=2)
    server.add(make_request("a", tokens(20), max_tokens=40))
    b = make_request("b", tokens(30, 1), max_tokens=10, prompt_logprobs=1)
    server.add(b)
    server.run()  # which compares with what is expected
    assert b.num_preemptions > 0


# Endings


@pytest.mark.parametrize(
    ("fields", "sampled", "status", "reason"),
    [
        ({"ignore_eos": False}, [4, EOS, 4], RequestStatus.FINISHED_STOPPED, None),
        ({"stop_token_ids": [3]}, [4, 3, 4], RequestStatus.FINISHED_STOPPED, 3),
        ({"stop_token_ids": [EOS], "ignore_eos": False}, [4, EOS], RequestStatus.FINISHED_STOPPED, None),
        ({"stop_token_ids": [EOS]}, [4, EOS], RequestStatus.FINISHED_STOPPED, EOS),
        ({}, [EOS, EOS, EOS, EOS], RequestStatus.FINISHED_LENGTH, None),
        ({"stop_token_ids": [3]}, [4, 4, 4, 3], RequestStatus.FINISHED_STOPPED, 3),
        ({"stop_token_ids": [3], "min_tokens": 3}, [3, 3, 3], RequestStatus.FINISHED_STOPPED, 3),
        (
            {"repetition_detection": RepetitionDetectionParams(2, 2, 2)},
            [5, 6, 5, 6],
            RequestStatus.FINISHED_LENGTH,
            None,
        ),
        (
            {"repetition_detection": RepetitionDetectionParams(2, 1, 3)},
            [5, 5, 5],
            RequestStatus.FINISHED_REPETITION,
            None,
        ),
    ],
)
def test_stop_rules(
    fields: dict[str, object], sampled: list[int], status: RequestStatus, reason: int | None
) -> None:
    scheduler = Scheduler(make_config())
    request = make_request("a", [5, 6, 5], max_tokens=4, **fields)
    scheduler.add(request)
    for count, token in enumerate(sampled, start=1):
        assert not request.status.is_finished
        apply(scheduler, scheduler.schedule(), [token])
        assert request.output_token_ids == sampled[:count]
        if request.status.is_finished:
            break
    assert request.num_output_tokens == min(len(sampled), count)
    assert (request.status, request.stop_reason) == (status, reason)


def test_several_tokens_at_once_end_at_the_first_that_stops() -> None:
    scheduler = Scheduler(make_config())
    request = make_request("a", [5], max_tokens=9, stop_token_ids=[3])
    scheduler.add(request)
    assert apply(scheduler, scheduler.schedule(), [1, 3, 2]) == [("a", [1, 3])]
    assert request.output_token_ids == [1, 3]


def test_max_model_len_ends_a_request_whatever_min_tokens_says() -> None:
    server = Server(make_config(max_model_len=8))
    request = make_request("a", tokens(5), max_tokens=30, min_tokens=20)
    server.add(request)
    server.run()
    assert (request.status, request.num_output_tokens) == (RequestStatus.FINISHED_LENGTH, 3)


def test_finish_is_idempotent_and_wants_an_end() -> None:
    scheduler = Scheduler(make_config())
    request = make_request("a", tokens(3))
    scheduler.add(request)
    scheduler.schedule()
    with pytest.raises(ValueError, match="FINISHED"):
        scheduler.finish(request, RequestStatus.RUNNING)
    scheduler.finish(request, RequestStatus.FINISHED_STOPPED, "stop string")
    scheduler.finish(request, RequestStatus.FINISHED_ABORTED)
    assert (request.status, request.stop_reason) == (RequestStatus.FINISHED_STOPPED, "stop string")
    with pytest.raises(ValueError, match="never added"):
        scheduler.finish(make_request("b", [1]), RequestStatus.FINISHED_ABORTED)
    scheduler.check_integrity()


# Refusals


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (make_request("a", []), "prompt"),
        (make_request("a", [1] * 64), "prompt"),
        (make_request("taken", [1]), "request_id"),
        (make_request("a", [1] * 30, max_tokens=20), "max_tokens"),
        (Request("a", [1], make_request("x", [1]).sampling_params, max_tokens=0), "max_tokens"),
    ],
)
def test_requests_that_can_never_be_served_are_refused(request_: Request, param: str) -> None:
    scheduler = Scheduler(make_config(num_pages=12))
    scheduler.add(make_request("taken", [2]))
    with pytest.raises(InvalidRequestError) as caught:
        scheduler.add(request_)
    assert caught.value.param == param
    assert scheduler.num_waiting == 1
    scheduler.check_integrity()


def test_the_largest_request_that_fits_is_served_alone() -> None:
    server = Server(make_config(num_pages=12))
    server.add(make_request("a", [1] * 30, max_tokens=15))  # 44 computed positions in 11 pages
    server.run()
    with pytest.raises(InvalidRequestError, match="12 KV pages"):
        server.add(make_request("b", [1] * 30, max_tokens=16))


def test_a_served_request_is_not_served_again() -> None:
    server = Server(make_config())
    request = make_request("a", [1])
    server.add(request)
    server.run()
    with pytest.raises(InvalidRequestError, match="FINISHED_LENGTH"):
        server.scheduler.add(request)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens"),
        ({"page_size": 0}, "page_size"),
        ({"num_pages": 1}, "num_pages"),
        ({"max_model_len": 1}, "max_model_len"),
        ({"long_prefill_token_threshold": -1}, "long_prefill_token_threshold"),
        (
            {"long_prefill_token_threshold": 4, "enable_chunked_prefill": False},
            "long_prefill_token_threshold",
        ),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 63}, "max_num_batched_tokens"),
        ({"policy": "lottery"}, "scheduling_policy"),
    ],
)
def test_limits_that_contradict_each_other_are_refused(fields: dict[str, object], param: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Scheduler(make_config(**fields))
    assert caught.value.param == param


# The integrity check itself


def test_the_integrity_check_finds_what_is_wrong() -> None:
    def broken(damage: str) -> Scheduler:
        scheduler = Scheduler(make_config(max_num_seqs=2))
        for index in range(3):
            scheduler.add(make_request(f"r{index}", tokens(9, index)))
        scheduler.schedule()
        scheduler.check_integrity()
        first = scheduler.running[0]
        if damage == "page":
            first.pages.pop()
        elif damage == "foreign page":
            first.pages[0] = scheduler.running[1].pages[0]
        elif damage == "progress":
            first.num_computed_tokens = 99
        elif damage == "pending":
            first.num_pending_tokens = 0
            first.num_computed_tokens -= 1
        elif damage == "status":
            first.status = RequestStatus.WAITING
        elif damage == "waiting":
            scheduler.waiting[0].num_computed_tokens = 1
        return scheduler

    for damage in ("page", "foreign page", "progress", "pending", "status", "waiting"):
        scheduler = broken(damage)
        with pytest.raises(IntegrityError):
            scheduler.check_integrity()

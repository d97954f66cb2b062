"""What is recorded is what happened, and says nothing of the text; what is replayed is what was recorded."""

from __future__ import annotations

import gzip
import json
import logging
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from jaxllm.errors import ConfigError
from jaxllm.scheduling import Plan
from jaxllm.scheduling.recording.blocks import BlockHasher, HashedRequest, SharedPrefixes
from jaxllm.scheduling.recording.lines import LineWriter, check_writable, read_lines
from jaxllm.scheduling.recording.recorder import TraceRecorder
from jaxllm.scheduling.recording.schedule import read_schedule
from jaxllm.scheduling.recording.schedule_recorder import ScheduleRecorder
from jaxllm.scheduling.simulator import FittedCost, TracedRequest, read_trace
from jaxllm.scheduling.simulator.work import Shape, Work
from tests.scheduling.recorded_server import Entry, Recorded, rows_of, serve
from tests.scheduling.simulated_device import (
    make_config,
    make_request,
    random_config,
    random_requests,
)


@pytest.mark.parametrize("seed", range(25))
def test_a_schedule_is_read_as_it_happened(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    server = Recorded(random_config(rng), in_flight=rng.choice([1, 2]))
    path = tmp_path / ("schedule.jsonl" if seed % 2 else "schedule.jsonl.gz")
    server.record(path)
    expected: list[list[Entry]] = []
    usage: list[int] = []
    schedule = server.schedule

    def noted() -> Plan | None:
        plan = schedule()
        if plan is not None:
            expected.append([(e.request.request_id, *e[1:]) for e in plan.scheduled])
            usage.append(server.config.num_pages - 1 - server.scheduler.num_free_pages)
        return plan

    server.schedule = noted  # type: ignore[method-assign]
    requests = random_requests(rng, server.config, 30)
    serve(server, requests, rng)

    read = read_schedule(path)
    assert read.config == server.config
    assert [sorted(rows_of(read, i)) for i in range(len(read.steps))] == [sorted(rows) for rows in expected]
    assert [step.num_pages for step in read.steps] == usage
    assert [step.num_tokens for step in read.steps] == [sum(row[2] for row in rows) for rows in expected]
    assert sum(len(step.preempted) for step in read.steps) == server.scheduler.num_preemptions
    assert all(step.seconds > 0 for step in read.steps)
    by_id = {r.request_id: r for r in read.requests.values()}
    for request in requests:
        found = by_id[request.request_id]
        assert found.arrival_time == pytest.approx(request.arrival_time - requests[0].arrival_time, abs=2e-6)
        assert found.status is request.status
        assert found.output_len == request.num_output_tokens
        assert found.num_cached_tokens == request.num_cached_tokens
        assert len(found.preempted) == request.num_preemptions
        assert found.terms == request.terms
        assert found.arrival_time < found.first_token_time <= found.last_token_time == found.end_time
    # What was in flight when the last request ended has a result, too.
    done = read.as_simulation()
    assert len(done.steps) == len(expected)
    assert len(done.requests) == len(requests)


def test_steps_cost_together_what_they_took(tmp_path: Path) -> None:
    """Also where a few of them took far longer than the others, which the fit leaves out."""
    server = Recorded(make_config(num_pages=30), in_flight=1)
    server.record(tmp_path / "s.jsonl")
    tick, rng = server.tick, random.Random(0)

    def uneven() -> float:
        server.now += rng.choice([0, 0, 0, 0, 0.1])
        return tick()

    server.tick = uneven  # type: ignore[method-assign]
    serve(server, random_requests(rng, server.config, 40), rng)
    schedule = read_schedule(tmp_path / "s.jsonl")
    cost = schedule.cost()
    predicted = sum(map(cost.price, schedule.timed_steps()))
    assert predicted == pytest.approx(sum(step.seconds for step in schedule.steps))


def test_who_is_aborted_leaves_the_record(tmp_path: Path) -> None:
    from jaxllm.request import RequestStatus

    server = Recorded(make_config(), in_flight=2)
    server.record(tmp_path / "s.jsonl")
    runs, waits = make_request("runs", [1, 2, 3], max_tokens=30), make_request("waits", [4], max_tokens=3)
    server.add(runs)
    server.step()
    server.add(waits)
    for request in (runs, waits):
        server.scheduler.finish(request, RequestStatus.FINISHED_ABORTED)
        server.recorders[0].ended(request, server.tick())
    server.add(make_request("after", [1, 2, 3, 4]))
    server.run()
    server.close()
    read = read_schedule(tmp_path / "s.jsonl")
    first, second, third = read.requests.values()
    assert first.status is second.status is RequestStatus.FINISHED_ABORTED
    assert (first.output_len, second.output_len, third.output_len) == (1, 0, 4)
    assert list(read.trace()) == [0, 2]


def test_what_a_killed_program_wrote_is_read_up_to_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("s.jsonl", "s.jsonl.gz"):
        server = Recorded(make_config())
        server.record(tmp_path / name)
        for index in range(20):
            server.add(make_request(f"r{index}", [1, index % 7, 3], max_tokens=20))
        # In portions, as a second brings them.
        for _ in range(10):
            server.step()
            time.sleep(0.001)
        [recorder] = server.recorders
        assert isinstance(recorder, ScheduleRecorder)
        recorder._lines._wake.set()
        time.sleep(0.05)
        server.run()
        server.close()
        whole = read_schedule(tmp_path / name)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-25])
        with caplog.at_level(logging.WARNING):
            part = read_schedule(tmp_path / name)
        assert "breaks off" in caplog.text
        assert 10 <= len(part.steps) <= len(whole.steps)
        for index in range(len(part.steps)):
            assert rows_of(part, index) == rows_of(whole, index)
        caplog.clear()


def test_a_disk_that_is_full_ends_the_file_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    server = Recorded(make_config())
    server.record(Path("/dev/full"))
    with caplog.at_level(logging.ERROR):
        server.add(make_request("r", [1, 2, 3]))
        server.run()
        server.close()
    assert "/dev/full ends here" in caplog.text


def test_lines_wait_for_nobody_and_all_arrive(tmp_path: Path) -> None:
    writer = LineWriter(tmp_path / "lines.gz")
    lines = [json.dumps([i, "x" * 1000]).encode() + b"\n" for i in range(3000)]
    for line in lines:
        writer.write(line)
    writer.close()
    assert list(read_lines(tmp_path / "lines.gz")) == lines
    assert gzip.decompress((tmp_path / "lines.gz").read_bytes()) == b"".join(lines)
    writer.write(b"late\n")  # nobody is there to take it; nothing happens
    writer.close()


def test_a_program_that_ends_without_closing_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    code = (
        "import sys\nfrom jaxllm.scheduling.recording.lines import LineWriter\n"
        f"writer = LineWriter({str(path)!r})\nwriter.write(b'[1]\\n')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
    assert path.read_bytes() == b"[1]\n"


def test_a_path_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"record_trace=.*No such file or directory.*a directory that exists"
    ):
        check_writable(str(tmp_path / "missing" / "trace.jsonl"), "record_trace")


# What prompts have in common


def common_pages(one: list[int], other: list[int], size: int) -> int:
    count = 0
    while len(one) >= (count + 1) * size and one[: (count + 1) * size] == other[: (count + 1) * size]:
        count += 1
    return count


@pytest.mark.parametrize("seed", range(30))
def test_stand_ins_share_the_pages_that_the_texts_shared(seed: int) -> None:
    """Every prompt has as many pages in common with what came before as it had, prompts and outputs."""
    rng = random.Random(seed)
    size = rng.choice([1, 2, 4, 16])
    hasher, prefixes = BlockHasher(size), SharedPrefixes()
    texts: list[list[int]] = []
    stand_ins: list[list[int]] = []
    for index in range(40):
        stem = rng.choice(texts)[: rng.randrange(1, 90)] if texts and rng.random() < 0.8 else []
        prompt = stem + [rng.randrange(3) for _ in range(rng.randrange(1, 30))]
        output = [rng.randrange(3) for _ in range(rng.randrange(1, 40))]
        request = make_request(f"r{index}", prompt)
        request.token_ids = prompt + output
        hashed = HashedRequest(float(index), len(prompt), len(output), size, hasher.names(request))
        assert HashedRequest.from_row(json.loads(json.dumps(hashed.row()))) == hashed
        traced = TracedRequest.from_hashed(hashed, prefixes)
        assert traced.num_prompt_tokens == len(prompt)
        stand_in = traced.prompt_token_ids()
        found = max((common_pages(stand_in, other, size) for other in stand_ins), default=0)
        expected = max((common_pages(prompt, other, size) for other in texts), default=0)
        assert found == expected
        texts.append(prompt + output)
        stand_ins.append(stand_in + [traced.output_token_id(i) for i in range(len(output))])


def test_names_say_nothing_and_salts_keep_apart() -> None:
    secret = list(range(70_000, 70_064))
    one, other = BlockHasher(16), BlockHasher(16)
    request = make_request("r", secret)
    assert one.names(request) == one.names(make_request("other", secret))
    assert one.names(request) != other.names(request)
    assert one.names(request) != one.names(make_request("salted", secret, cache_salt="salt"))


def test_the_trace_of_a_server_is_read_by_the_simulator(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl.gz"
    server = Recorded(make_config(max_num_seqs=2))
    server.recorders.append(TraceRecorder(str(path), server.config.page_size, 100.0))
    first = make_request("first", list(range(17)), max_tokens=8, tenant="a\ud800")
    server.add(first)
    server.run()
    follow_up = make_request("second", [*first.token_ids, 5, 5], max_tokens=2, ttft_objective=0.5)
    server.add(follow_up)
    server.add(make_request("other", list(range(100, 117)), max_tokens=3))
    server.run()
    server.close()
    assert b"117" not in gzip.decompress(path.read_bytes())
    traced = list(read_trace(path))
    assert [t.num_prompt_tokens for t in traced] == [17, 27, 17]
    assert [t.output_len for t in traced] == [8, 2, 3]
    assert [t.terms for t in traced] == [r.terms for r in server.requests]
    assert traced[0].arrival_time == 0
    # Of the 25 tokens six pages of four are whole.
    whole = traced[0].prompt_token_ids() + [traced[0].output_token_id(i) for i in range(8)]
    assert common_pages(traced[1].prompt_token_ids(), whole, 4) == 6
    assert common_pages(traced[2].prompt_token_ids(), whole, 4) == 0


@pytest.mark.parametrize(
    "row", [{"blocks": "??"}, {"prompt_len": 0}, {"block_size": "x"}, {"terms": {"colour": 1}}]
)
def test_a_recorded_request_that_is_wrong_is_named(row: dict[str, Any], tmp_path: Path) -> None:
    good = {"arrival_time": 0, "prompt_len": 3, "output_len": 2, "block_size": 4, "blocks": ""}
    (tmp_path / "t.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(good | row) + "\n")
    with pytest.raises(ValueError, match="request 2"):
        list(read_trace(tmp_path / "t.jsonl"))


def test_shapes_that_never_ran_are_priced_on_the_line_of_the_others() -> None:
    known = {Shape(8, 8, False): 0.010, Shape(16, 8, False): 0.014, Shape(4, 4, True): 0.003}
    cost = FittedCost(known, Work()).extended([Shape(64, 8, False), Shape(8, 8, True), Shape(8, 8, False)])
    assert cost.shapes[Shape(64, 8, False)] == pytest.approx(0.006 + 64 * 0.0005)
    assert cost.shapes[Shape(8, 8, False)] == 0.010
    assert 0.003 <= cost.shapes[Shape(8, 8, True)] <= 0.006

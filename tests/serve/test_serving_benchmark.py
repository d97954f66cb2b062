"""The load generator: what it sends when, and what it makes of answers, right and wrong."""

from __future__ import annotations

import argparse
import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks import foreign_client, serving
from benchmarks.foreign_client import Load, Run, ratios_of
from benchmarks.serving import Answer, load_of, send_all
from benchmarks.workloads import scaled_trace
from tests.serve.test_server import live_server

TRACE: Any = {"rate": 40.0, "num_requests": 12, "scale": 0.02, "longest": 100, "seed": 3}


def run_against_a_fake(
    reply: str, *, fail: Exception | None = None, **config: Any
) -> tuple[list[Answer], float]:
    with live_server(**config) as live:
        live.fake.fail = fail
        live.fake.reply = lambda request: reply
        live.fake.step_time = 0.002
        trace = scaled_trace("poisson", **TRACE)
        return asyncio.run(send_all(live.url, "fake", trace, 500, "key"))


def test_every_request_is_sent_when_it_comes_and_timed_to_its_end() -> None:
    trace = scaled_trace("poisson", **TRACE)
    answers, seconds = run_against_a_fake("la " * 200)
    assert seconds >= trace[-1].arrival_time
    assert [answer.error for answer in answers] == [None] * len(trace)
    for answer, traced in zip(answers, trace, strict=True):
        assert answer.num_tokens == traced.output_len
        assert 0 <= answer.sent < answer.ttft
        assert answer.token_times == sorted(answer.token_times)
        assert 1 <= len(answer.token_times) <= traced.output_len
    load = load_of("fake", "poisson", 40.0, answers, seconds, (60.0, 60.0))
    assert load.num_failed == 0
    assert load.goodput == pytest.approx(len(trace) / seconds)
    assert load.output_tokens_per_second == pytest.approx(sum(t.output_len for t in trace) / seconds)
    assert load_of("fake", "poisson", 40.0, answers, seconds, (0.0, 60.0)).goodput == 0


def test_what_goes_wrong_is_a_failed_request() -> None:
    answers, _ = run_against_a_fake("la " * 200, fail=RuntimeError("out of luck"))
    assert all("out of luck" in str(answer.error) for answer in answers)
    answers, seconds = run_against_a_fake("la " * 200, api_key=("another",))
    assert all("401" in str(answer.error) for answer in answers)
    load = load_of("fake", "poisson", 40.0, answers, seconds, (60.0, 60.0))
    assert (load.num_failed, load.goodput) == (len(answers), 0)


def test_the_time_per_token_leaves_out_the_first() -> None:
    answer = Answer(0.0, [1.0, 2.0, 4.0], num_tokens=4)
    assert (answer.ttft, answer.tpot) == (1.0, 1.0)
    assert answer.meets(1.0, 1.0) and not answer.meets(0.9, 1.0) and not answer.meets(1.0, 0.9)
    assert Answer(0.0, [1.0], num_tokens=1).meets(1.0, 0.0)
    assert not Answer(0.0, [1.0], num_tokens=1, error="broken").meets(9.0, 9.0)


def test_a_running_server_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "load.json", tmp_path / "load.png"
    with live_server() as live:
        live.fake.reply = lambda request: "la " * 200
        where = ["--base-url", live.url, "--model", "fake", "--vocab-size", "500"]
        load = ["--workload", "poisson", "chat", "--rate", "30", "--num-requests", "8", "--scale", "0.02"]
        files = ["--json", str(out), "--plot", str(picture)]
        serving.main([*where, *load, "--max-model-len", "100", *files])
    rows = json.loads(out.read_text())
    assert [(row["workload"], row["num_failed"], len(row["answers"])) for row in rows] == [
        ("poisson", 0, 8),
        ("chat", 0, 8),
    ]
    assert picture.stat().st_size > 1000
    assert "goodput" in capsys.readouterr().out


def test_loads_of_the_foreign_client() -> None:
    assert Load.parse("1.5") == Load(1.5) and str(Load(1.5)) == "1.5/s"
    assert Load.parse("2:0.25") == Load(2.0, 0.25) and "0.25" in str(Load(2.0, 0.25))
    assert Load.parse("inf") == Load(math.inf) and str(Load(math.inf)) == "all at once"
    for wrong in ("fast", "0", "-1", "1:", "1:0", "1:inf", "inf:2", "nan", "1:nan", "1:2:3"):
        with pytest.raises(argparse.ArgumentTypeError):
            Load.parse(wrong)


def test_ratios_are_of_each_turn_by_itself(tmp_path: Path) -> None:
    """Medians over the turns: one in which the machine was busy with something else does not count."""

    def run(server: str, load: str, throughput: float, time: float) -> Run:
        return Run(server, load, 10, 0, throughput, time, 2 * time, 3 * time, 4 * time)

    turns = [((20, 5.0), (10, 10.0)), ((30, 2.0), (20, 8.0)), ((1, 90.0), (10, 9.0))]
    runs = [run(name, "a", *one) for turn in turns for name, one in zip(("us", "they"), turn, strict=True)]
    runs += [run("us", "b", 9.0, 4.0), run("they", "b", 6.0, 2.0)]
    first, second = ratios_of(runs)
    assert (first.load, first.throughput, first.spread) == ("a", 1.5, (0.1, 2.0))
    assert first.ttft_p50 == first.ttft_p99 == first.tpot_p50 == first.tpot_p99 == 2.0
    assert (second.load, second.throughput, second.ttft_p99) == ("b", 1.5, 0.5)
    foreign_client.print_runs(runs)
    foreign_client.print_ratios([first, second])
    with pytest.raises(ValueError, match="no turn"):
        ratios_of(runs[1:-1])

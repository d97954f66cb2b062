"""The benchmarks of the server under load and attack, in miniature: they measure, and see what is wrong."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import fuzz_api, hostile_traffic, http_layer
from benchmarks.hostile_clients import HOSTILE, Target
from benchmarks.hostile_traffic import Sample, growth_of, leaks_of
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_server import live_server


def test_the_http_layer_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "http.json", tmp_path / "http.png"
    what = ["--connections", "8", "--tokens", "400", "--seconds", "1"]
    http_layer.main([*what, "--json", str(out), "--plot", str(picture)])
    [flow] = json.loads(out.read_text())["flows"]
    # Ten steps more or less: the first and the last, and what a busy machine makes late.
    assert 200 < flow["delivered"] < 500
    assert 0 < flow["gap"]["p50"] <= flow["gap"]["p99"] <= flow["worst_gap"] < 5
    assert 0 < flow["cpu_per_token"] < 0.1
    assert picture.stat().st_size > 1000
    assert "delivered" in capsys.readouterr().out


def test_hostile_clients_leave_nothing_behind() -> None:
    fake = FakeEngine()
    fake.step_time = 0.002
    limits = {"request_timeout": 0.5, "write_timeout": 0.5, "max_request_bytes": 1 << 20}
    limits |= {"max_sequences_per_request": 64}
    with live_server(fake, enable_dev_routes=True, **limits) as live:
        results = asyncio.run(hostile_traffic.attack(Target(live.url, "fake", 2, patience=1.0), 2.0, 100, 1))
    assert results.leaks == [] and results.wrong == []
    assert set(HOSTILE) | {"good", "crowd"} <= set(results.deeds)
    assert max(sample.files for sample in results.samples) > results.warm.files + 50
    assert results.end.requests == 0


def sample(at: float, **held: float) -> Sample:
    return Sample(**{**dict.fromkeys(Sample.__slots__, 0), "at": at, **held})  # type: ignore[arg-type]


def test_what_is_left_behind_is_seen() -> None:
    dice = random.Random(0)
    grows = [sample(at, memory=500 + at / 6 + dice.uniform(-5, 5)) for at in range(300)]
    assert growth_of(grows) == pytest.approx(10, abs=1)
    assert growth_of([sample(at, memory=500 + dice.uniform(-5, 5)) for at in range(300)]) < 1
    warm = sample(0, files=30, tasks=5)
    assert leaks_of(warm, sample(9, files=32, tasks=6), 1.0) == []
    for end, growth, what in (
        (sample(9, files=60), 0.0, "60 files"),
        (sample(9, tasks=50), 0.0, "50 tasks"),
        (sample(9, pages=3, requests=1), 0.0, "3 pages and 1 sequences"),
        (sample(9), 9.0, "9.0 MiB a minute"),
    ):
        [leak] = leaks_of(warm, end, growth)
        assert what in leak


def test_fuzzed_requests_are_no_server_errors() -> None:
    config = {"enable_dev_routes": True, "enable_tokenizer_info_endpoint": True}
    with live_server(**config) as live:
        live.fake.sleep = live.fake.wake_up = lambda *_: True  # type: ignore[attr-defined]
        live.fake.is_sleeping = False  # type: ignore[attr-defined]
        results = fuzz_api.fuzz(live.url, 70, examples=2)
        assert results.wrong == []
        assert results.num_requests >= 70
        statuses = Counter[int]()
        for counts in results.statuses.values():
            statuses.update(counts)
        assert statuses[200] >= 5 and statuses[400] >= 5
        # And it would see one: of the same requests, those that meant something break now.
        live.fake.input_processor.process = None  # type: ignore[method-assign, assignment]
        broken = fuzz_api.fuzz(live.url, 70, examples=2)
        assert {wrong["why"] for wrong in broken.wrong} == {"a server error"}

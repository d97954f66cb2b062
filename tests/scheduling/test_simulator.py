"""The simulator: by hand where it is small, against brute force where it is not, and its own input files."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jaxllm
from jaxllm.execution.batch import StepShape
from jaxllm.execution.buckets import choose
from jaxllm.models.config import MLAConfig, MoEConfig
from jaxllm.request import Request, SchedulingTerms
from jaxllm.sampling_params import SamplingParams
from jaxllm.scheduling import Plan, ScheduledRequest, load_policy
from jaxllm.scheduling.policies import BUILT_IN
from jaxllm.scheduling.simulator import (
    DEVICES,
    INTERCONNECTS,
    WORKLOADS,
    FittedCost,
    ModelFigures,
    RecordedStep,
    RooflineCost,
    Shape,
    Tiles,
    TracedRequest,
    Work,
    make_workload,
    read_trace,
    simulate,
    summarize,
    this_cpu,
    write_trace,
)
from jaxllm.scheduling.simulator.costs import StepFeatures
from jaxllm.simulate import main, parse_rates
from tests.scheduling.simulated_device import make_config


class PerToken:
    """A step takes a second, and another for every ten tokens."""

    def seconds(self, plan: Plan) -> float:
        return 1.0 + plan.num_tokens / 10


def traced(arrival: float, prompt: int, output: int, name: int = 1, **terms: Any) -> TracedRequest:
    return TracedRequest(arrival, ((name, prompt),), output, SchedulingTerms(**terms))


def test_one_request_by_hand() -> None:
    simulation = simulate([traced(2.0, 20, 3)], make_config(), PerToken())
    [record] = simulation.requests
    assert record.ttft == pytest.approx(3.0)
    assert record.tpot == pytest.approx(1.1)
    assert simulation.seconds == pytest.approx(2 + 3.0 + 1.1 + 1.1)
    assert [step.start for step in simulation.steps] == pytest.approx([2.0, 5.0, 6.1])
    assert [(s.num_prompt_tokens, s.num_output_tokens) for s in simulation.steps] == [(20, 0), (0, 1), (0, 1)]


def test_who_comes_while_a_step_runs_waits_for_those_that_are_planned() -> None:
    trace = [traced(0.0, 20, 4), traced(0.5, 30, 1, name=2)]
    # Without overlap it is in the step after the one that runs when it comes; with it, one later.
    for in_flight, expected in ((1, 3.0 + 4.1 - 0.5), (2, 3.0 + 1.1 + 4.1 - 0.5)):
        simulation = simulate(trace, make_config(), PerToken(), max_in_flight=in_flight)
        late = next(r for r in simulation.requests if r.traced.arrival_time > 0)
        assert late.ttft == pytest.approx(expected)


def test_a_pipeline_by_hand() -> None:
    """A prompt takes three steps of 2.0 s, and each token after it three of 1.1 s, whoever else is there."""
    config = make_config(num_stages=3)
    alone = simulate([traced(0.0, 10, 3)], config, PerToken())
    assert alone.seconds == pytest.approx(3 * 2.0 + 2 * 3 * 1.1)
    three = simulate([traced(0.0, 10, 3, name=n) for n in range(3)], config, PerToken())
    assert [record.ttft for record in three.requests] == pytest.approx([6.0, 7.1, 8.2])
    assert [record.tpot for record in three.requests] == pytest.approx([3.3] * 3)
    starts = [0, 2, 4, *(6 + 1.1 * step for step in range(6))]
    assert [step.start for step in three.steps] == pytest.approx(starts)
    assert three.seconds == pytest.approx(alone.seconds + 2 * 1.1)


def test_time_of_the_host_is_part_of_a_step() -> None:
    without = simulate([traced(0.0, 10, 5)], make_config(), PerToken())
    with_host = simulate([traced(0.0, 10, 5)], make_config(), PerToken(), host_seconds=0.25)
    assert with_host.seconds == pytest.approx(without.seconds + 5 * 0.25)


def test_prompts_that_begin_alike_hit_the_prefix_cache() -> None:
    first = TracedRequest(0.0, ((7, 16), (1, 4)), 8, output_name=9)
    follow_up = TracedRequest(100.0, ((7, 16), (1, 4), (9, 8), (2, 4)), 2)
    other = TracedRequest(200.0, ((8, 16), (1, 4)), 2)
    simulation = simulate([first, follow_up, other], make_config(), PerToken())
    # Of the first one's answer the last token was never computed: 27 positions, in pages of 4.
    assert [r.num_cached_tokens for r in simulation.requests] == [0, 24, 0]
    assert summarize(simulation).cache_hit_rate == pytest.approx(24 / (20 + 32 + 20))


def test_a_request_that_can_never_be_served_is_refused_and_the_others_go_on() -> None:
    simulation = simulate([traced(0.0, 1000, 5), traced(0.0, 10, 5)], make_config(), PerToken())
    assert len(simulation.requests) == 1
    [(request, reason)] = simulation.refused
    assert request.num_prompt_tokens == 1000
    assert "1000" in reason


@pytest.mark.parametrize("name", sorted(BUILT_IN))
@pytest.mark.parametrize("workload", ["bursty", "chat", "tenants"])
def test_every_policy_serves_every_request(name: str, workload: str) -> None:
    config = make_config(
        max_num_seqs=16, max_num_batched_tokens=2048, max_model_len=16384, page_size=16, num_pages=1200
    )
    requests = list(make_workload(workload, rate=8.0, num_requests=150, seed=3))
    cost = RooflineCost(LLAMA, DEVICES["v5e"], tensor=8)
    simulation = simulate(requests, config, cost, load_policy(name))
    assert not simulation.refused
    assert sorted(r.traced.arrival_time for r in simulation.requests) == [r.arrival_time for r in requests]
    assert sum(s.num_output_tokens for s in simulation.steps) >= sum(r.output_len - 1 for r in requests)
    for one, other in zip(simulation.steps, simulation.steps[1:], strict=False):
        assert other.start >= one.start + one.seconds - 1e-9, "the device runs one step at a time"
    for record in simulation.requests:
        assert record.traced.arrival_time <= record.first_scheduled_time
        assert record.first_scheduled_time < record.token_times[0] <= record.token_times[1]


LLAMA = ModelFigures(
    32, 32, 8, 128, layer_parameters=6_979_321_856, head_parameters=525_336_576, hidden_size=4096
)


def plan_of(*rows: tuple[int, int, bool]) -> Plan:
    scheduled = tuple(
        ScheduledRequest(Request(str(i), [1], SamplingParams()), start, num_tokens, samples)
        for i, (start, num_tokens, samples) in enumerate(rows)
    )
    return Plan(0, scheduled, (), sum(num_tokens for _, num_tokens, _ in rows))


def test_experts_that_are_read_and_held() -> None:
    """Against throwing dice: each token takes 3 of 8 experts, and each expert that any takes is read."""
    moe = MoEConfig(8, 3, 16, (0, 1), True)
    figures = ModelFigures(2, 4, 2, 8, 1000, 100, 32, moe=moe, expert_parameters=60)
    assert figures.weight_bytes == 2 * (1100 + 5 * 60)
    assert figures.weight_bytes_read(1) == 2 * 1100
    rng = random.Random(0)
    for num_tokens in (2, 5, 40):
        rolls = [{e for _ in range(num_tokens) for e in rng.sample(range(8), 3)} for _ in range(2000)]
        read = 2 * (1100 + (sum(map(len, rolls)) / 2000 - 3) * 60)
        assert figures.weight_bytes_read(num_tokens) == pytest.approx(read, rel=0.005)


@pytest.mark.parametrize("window", [None, 1, 5, 40])
def test_features_by_brute_force(window: int | None) -> None:
    rng = random.Random(1)
    for _ in range(50):
        rows = [(rng.randrange(60), rng.choice([1, 1, 7, 50]), rng.random() < 0.5) for _ in range(4)]
        seen = [
            [range(max(0, p - window + 1) if window else 0, p + 1) for p in range(start, start + n)]
            for start, n, _ in rows
        ]
        features = StepFeatures.of(plan_of(*rows), window)
        assert features.attended == sum(len(keys) for row in seen for keys in row)
        assert features.num_tokens == sum(n for _, n, _ in rows)
        assert features.num_samples == sum(samples for *_, samples in rows)
        read = [len({key for keys in row for key in keys}) for row in seen]
        assert features.context == sum(read)


def test_the_roofline_by_hand() -> None:
    cost = RooflineCost(LLAMA, DEVICES["h200"], flops_share=0.5, bandwidth_share=1.0, overhead=0.0)
    weights = (6_979_321_856 + 525_336_576) * 2
    kv = 2 * 32 * 8 * 128 * 2
    assert cost.seconds(plan_of((999, 1, True))) == pytest.approx((weights + 1001 * kv) / 4800e9)
    flops = 2 * (6_979_321_856 * 8192 + 525_336_576) + 4 * 32 * 32 * 128 * (8192 * 8193 // 2)
    assert cost.seconds(plan_of((0, 8192, True))) == pytest.approx(flops / (989e12 * 0.5))


def test_the_roofline_of_chips_that_share_a_model_by_hand() -> None:
    links = INTERCONNECTS["v6e"]
    of_mesh = {"flops_share": 1.0, "bandwidth_share": 1.0, "overhead": 0.0}
    weights = (6_979_321_856 + 525_336_576) * 2
    kv = 1001 * 2 * 32 * 8 * 128 * 2
    sums = 64 * links.all_reduce_seconds(4096 * 2, 16)
    cost = RooflineCost(LLAMA, DEVICES["v6e"], 16, links=links, **of_mesh)  # type: ignore[arg-type]
    # Sixteen chips hold eight heads twice.
    seconds = (weights / 16 + kv / 8) / DEVICES["v6e"].bandwidth + sums
    assert cost.seconds(plan_of((999, 1, True))) == pytest.approx(seconds)
    # The stages with most of the 32 layers have 11.
    piped = replace(cost, stages=3)
    assert piped.seconds(plan_of((999, 1, True))) == pytest.approx(seconds * 11 / 32)
    latent = replace(LLAMA, mla=MLAConfig(0, 512, 128, 64, 128))
    alone, shared = (
        RooflineCost(latent, DEVICES["v6e"], tensor, **of_mesh).seconds(plan_of((10**6, 1, True)))  # type: ignore[arg-type]
        for tensor in (1, 4)
    )
    # Each chip has all of the latents.
    whole = (10**6 + 2) * 32 * 576 * 2 / DEVICES["v6e"].bandwidth
    assert (alone - whole) / 4 == pytest.approx(shared - whole)


SHAPES = [Shape(1, 1, True), Shape(4, 4, True), Shape(8, 8, True), Shape(16, 8, False), Shape(256, 8, False)]


TILES = Tiles(32, 4, 16, (64, 128), (256, 256), 128)


def test_work_is_what_the_kernel_goes_through() -> None:
    """Block by block and tile by tile, as the portable attention kernel runs."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        shape = Shape(512, int(rng.choice([1, 3, 8])), False)
        runs = [(int(rng.integers(0, 900)), int(rng.choice([1, 1, 2, 70, 300]))) for _ in range(3)]
        work = Work.of_runs(runs, shape, TILES)
        blocks = sum(1 for start, n in runs if n == 1 for _ in range(0, start + 1, 32))
        lanes = {1: 4, 3: 12, 8: 16}[shape.num_seqs]
        keys = 0
        while blocks > 0:
            blocks, keys = blocks - lanes, keys + lanes * 32
        tile, block = (256, 256) if max(n for _, n in runs) > 128 else (64, 128)
        tiles = visits = 0
        for start, n in runs:
            for first in range(0, n if n > 1 else 0, tile):
                tiles, key = tiles + 1, 0
                while key < min(start + n, start + first + tile):
                    key, visits = key + block, visits + 1
        prompts = sum(n > 1 for _, n in runs)
        decode, mixed = (0, keys) if prompts else (keys, 0)
        assert work == Work(decode, mixed, prompts, tiles, visits, visits * tile * block)
    # A tile is never longer than the step.
    assert Work.of_runs([(0, 9)], Shape(16, 8, False), TILES).num_pairs == 16 * 128


@pytest.mark.parametrize("tiles", [None, TILES])
def test_a_fit_finds_the_prices_that_the_steps_were_made_with(tiles: Tiles | None) -> None:
    rng = np.random.default_rng(0)
    prices = Work(4e-7, 9e-7, 3e-4, num_pairs=5e-9)
    true = FittedCost({s: 0.002 + 1e-4 * s.num_tokens for s in SHAPES}, prices, tiles)
    plans, steps = [], []
    for _ in range(400):
        count = int(rng.integers(1, 9))
        long = int(rng.choice([1, 5, 200])) if rng.random() < 0.5 else 1
        rows = [(int(rng.integers(0, 4000)), long if i == 0 else 1, True) for i in range(count)]
        plan = plan_of(*rows)
        plans.append(plan)
        seconds = true.seconds(plan) * float(rng.normal(1, 0.01))
        disturbed = 10 if rng.random() < 0.02 else 1
        steps.append(RecordedStep.of(plan, true.shape_of(plan), seconds * disturbed))
    cost = FittedCost.fit(steps, tiles)
    assert cost.shapes.keys() == set(SHAPES)
    for plan in plans:
        assert cost.seconds(plan) == pytest.approx(true.seconds(plan), rel=0.02)  # twice the noise
    with pytest.raises(ValueError, match="no recorded steps"):
        FittedCost.fit([])
    with pytest.raises(ValueError, match="a step of 300 tokens of 1 requests is larger"):
        cost.seconds(plan_of((0, 300, True)))


def test_a_plan_runs_in_the_shape_that_the_engine_would_choose() -> None:
    cost = FittedCost(dict.fromkeys(SHAPES, 0.0), Work())
    rng = random.Random(0)
    for _ in range(300):
        rows = [(0, rng.choice([1, 1, 1, 6, 40]), True) for _ in range(rng.randrange(1, 7))]
        plan = plan_of(*rows)
        decode_only = plan.num_tokens == len(rows)
        compiled = [StepShape(s.num_tokens, s.num_seqs, 9, s.decode_only) for s in SHAPES]
        chosen = choose(compiled, plan.num_tokens, len(rows), decode_only)
        assert chosen is not None
        assert cost.shape_of(plan) == Shape(chosen.num_tokens, chosen.num_seqs, chosen.decode_only)


def test_a_fit_survives_being_saved(tmp_path: Path) -> None:
    for tiles in (None, TILES):
        shapes = {shape: 0.5 * shape.num_tokens for shape in SHAPES}
        cost = FittedCost(shapes, Work(1e-7, 3e-7, num_pairs=2e-9), tiles)
        cost.save(tmp_path / "cost.json")
        assert FittedCost.load(tmp_path / "cost.json") == cost
    for text in ("{", '{"shapes": []}', '{"shapes": [], "prices": {"decode": 1}}', "[]"):
        (tmp_path / "wrong.json").write_text(text)
        with pytest.raises(ValueError, match=r"wrong\.json"):
            FittedCost.load(tmp_path / "wrong.json")


def test_numbers_of_a_simulation() -> None:
    trace = [
        traced(0.0, 20, 3, tenant="a"),
        traced(100.0, 20, 1, tenant="b", ttft_objective=1.0),
        traced(200.0, 20, 3, tenant="b", ttft_objective=5.0, tpot_objective=2.0),
    ]
    simulation = simulate(trace, make_config(enable_prefix_caching=False), PerToken())
    summary = summarize(simulation, ttft=10.0, tpot=1.0)
    assert summary.seconds == pytest.approx(205.2)
    assert summary.output_tokens_per_second == pytest.approx(7 / 205.2)
    assert summary.goodput == pytest.approx(1 / 205.2), "too slow a token, too late a first one, and one good"
    assert summary.ttft.mean == pytest.approx(3.0)
    assert summary.device_busy == pytest.approx((5.2 + 3.0 + 5.2) / 205.2)
    rates = np.array([23 / 5.2, (21 + 23) / (3.0 + 5.2)])
    assert summary.fairness == pytest.approx(rates.sum() ** 2 / (2 * (rates**2).sum()))
    assert math.isnan(summarize(simulate([], make_config(), PerToken())).ttft.mean)


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_workloads(name: str) -> None:
    requests = list(make_workload(name, rate=4.0, num_requests=6000, seed=1))
    times = [r.arrival_time for r in requests]
    assert times == sorted(times)
    # 6000 arrivals of a Poisson process are within 4 % of their rate; sessions and bursts spread more.
    spread = {"bursty": 0.2, "chat": 0.1, "diurnal": 0.1}.get(name, 0.06)
    assert len(requests) / times[-1] == pytest.approx(4.0, rel=spread)
    assert requests == list(make_workload(name, rate=4.0, num_requests=6000, seed=1))
    assert requests[:50] != list(make_workload(name, rate=4.0, num_requests=50, seed=2))
    assert all(r.output_len >= 1 and r.num_prompt_tokens >= 1 for r in requests)


def test_bursts_are_bursts_and_shares_are_shares() -> None:
    def variation(name: str) -> float:
        gaps = np.diff([r.arrival_time for r in make_workload(name, rate=4.0, num_requests=5000)])
        return float(gaps.std() / gaps.mean())

    assert variation("poisson") == pytest.approx(1, rel=0.1)
    assert variation("bursty") == pytest.approx(3, rel=0.2)
    tenants = [r.terms.tenant for r in make_workload("tenants", rate=1.0, num_requests=6000)]
    assert tenants.count("a") / tenants.count("d") == pytest.approx(8, rel=0.25)


def test_a_chat_repeats_what_was_said() -> None:
    requests = list(make_workload("chat", rate=5.0, num_requests=400))
    outputs = {r.output_name: r.output_len for r in requests}
    prompts = {r.segments for r in requests}
    goes_on = 0
    for request in requests:
        *said, _ = request.segments
        if tuple(said[:-1]) in prompts:  # the turn before is in the trace, and its answer is what follows it
            goes_on += 1
            name, length = said[-1]
            assert outputs[name] == length
    assert goes_on > 100
    assert 2 < np.mean([len(r.segments) // 2 for r in requests]) < 8


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "none"}, "'none' is not one of poisson"),
        ({"rate": 0.0}, "rate=0"),
        ({"rate": math.inf}, "rate=inf"),
    ],
)
def test_workloads_that_there_are_not(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_workload(**({"name": "poisson", "rate": 1.0, "num_requests": 1} | wrong))


def test_a_trace_survives_being_written(tmp_path: Path) -> None:
    requests = list(make_workload("chat", rate=5.0, num_requests=60))
    requests += list(make_workload("tenants", rate=5.0, num_requests=60))
    requests.sort(key=lambda r: r.arrival_time)
    write_trace(tmp_path / "trace.jsonl", requests)
    read = list(read_trace(tmp_path / "trace.jsonl"))
    first = requests[0].arrival_time
    for one, other in zip(requests, read, strict=True):
        assert other.arrival_time == pytest.approx(one.arrival_time - first)
        assert (other.segments, other.output_len, other.terms, other.output_name) == (
            one.segments, one.output_len, one.terms, one.output_name,
        )  # fmt: skip


def as_csv(rows: list[dict[str, Any]]) -> str:
    lines = [",".join(rows[0])] + [",".join(map(str, row.values())) for row in rows]
    return "\n".join(lines) + "\n"


def as_jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


AZURE = [
    {"TIMESTAMP": "2023-11-16 18:17:03.9799600", "ContextTokens": 374, "GeneratedTokens": 44},
    {"TIMESTAMP": "2023-11-16 18:17:04.0319600", "ContextTokens": 396, "GeneratedTokens": 109},
]
BURST_GPT = [
    {"Timestamp": 5, "Model": "ChatGPT", "Request tokens": 472, "Response tokens": 18, "Total tokens": 490},
    {
        "Timestamp": 45,
        "Model": "ChatGPT",
        "Request tokens": 1087,
        "Response tokens": 230,
        "Total tokens": 1317,
    },
    {"Timestamp": 50, "Model": "GPT-4", "Request tokens": 417, "Response tokens": 0, "Total tokens": 417},
]


@pytest.mark.parametrize(("suffix", "write"), [(".csv", as_csv), (".jsonl", as_jsonl)])
def test_known_traces(tmp_path: Path, suffix: str, write: Callable[[list[dict[str, Any]]], str]) -> None:
    path = tmp_path / f"trace{suffix}"
    path.write_text(write(AZURE))
    read = list(read_trace(path))
    assert [(r.num_prompt_tokens, r.output_len) for r in read] == [(374, 44), (396, 109)]
    assert [r.arrival_time for r in read] == pytest.approx([0.0, 0.052], abs=1e-6)
    path.write_text(write(BURST_GPT))
    read = list(read_trace(path))
    assert [(r.arrival_time, r.num_prompt_tokens, r.output_len) for r in read] == [
        (0, 472, 18),
        (40, 1087, 230),
    ]
    assert read[0].segments != read[1].segments


@pytest.mark.parametrize("line", ['{"a": 1}', "no JSON", "[1]", '{"segments": [[1]], "arrival_time": 0}'])
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"segments": [[1, 5]], "arrival_time": 0, "output_len": 3}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"trace\.jsonl, request 2"):
        list(read_trace(path))


def test_the_cpu_at_hand_is_a_device() -> None:
    device = this_cpu(num_bytes=1 << 22, size=256)
    # No processor that runs this is slower, and none is faster than the fastest accelerator.
    assert 1e8 < device.flops < DEVICES["h200"].flops
    assert 1e8 < device.bandwidth < DEVICES["h200"].bandwidth
    assert device.memory > 1e9


class TestCommandLine:
    ARGUMENTS = ("--num-requests", "40", "--num-gpu-blocks", "400", "--rate", "20,40")

    def run(self, *arguments: str) -> int:
        return main([*self.ARGUMENTS, *arguments])

    def test_a_table_and_a_file(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        given = ("--policy", "fcfs,mlfq", "--workload", "tenants", "--json", str(tmp_path / "out.json"))
        assert self.run(*given, "--scheduling-config", '{"mlfq": {"quantum": 64}}') == 0
        printed = capsys.readouterr().out
        assert printed.count("mlfq") == 2
        assert "fairness" in printed
        rows = json.loads((tmp_path / "out.json").read_text())
        assert [(row["policy"], row["rate"]) for row in rows] == [
            ("fcfs", 20.0), ("mlfq", 20.0), ("fcfs", 40.0), ("mlfq", 40.0),
        ]  # fmt: skip
        assert all(row["summary"]["num_requests"] == 40 for row in rows)

    def test_on_the_cpu_at_hand_from_a_config_alone(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        config = Path(jaxllm.__file__).parent / "demo" / "config.json"
        (tmp_path / "config.json").write_text(config.read_text())
        assert self.run("--device", "cpu", "--model", str(tmp_path / "config.json")) == 0
        assert "1 x cpu" in capsys.readouterr().out

    def test_pictures_and_a_page_that_needs_nothing_beside_it(self, tmp_path: Path) -> None:
        page, plots = tmp_path / "out.html", tmp_path / "plots"
        given = ("--policy", "fcfs,mlfq", "--workload", "tenants", "--max-num-seqs", "4")
        assert self.run(*given, "--html", str(page), "--plots", str(plots)) == 0
        names = ["distributions-20", "distributions-40", "rates", "timeline-fcfs", "timeline-mlfq"]
        assert sorted(path.stem for path in plots.iterdir()) == names
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in plots.iterdir())
        text = page.read_text()
        assert text.count("<img ") == text.count("data:image/png;base64,") == len(names)
        assert text.count("<td>mlfq</td>") == 2
        assert "http" not in text

    def test_replicas_have_a_table_of_their_own(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        page, file = tmp_path / "out.html", tmp_path / "out.json"
        given = ("-dp", "3", "-tp", "2", "-pp", "2", "--device", "v6e", "--workload", "chat", "--rate", "40")
        assert self.run(*given, "--html", str(page), "--json", str(file)) == 0
        assert "3 replicas on 12 x v6e" in capsys.readouterr().out
        assert page.read_text().count("<table>") == 2
        for row in json.loads(file.read_text()):
            each = row["summary"]["replicas"]
            assert len(each) == 3 and all(one["num_requests"] for one in each)
            for name in ("num_requests", "num_preemptions", "output_tokens_per_second"):
                assert sum(one[name] for one in each) == pytest.approx(row["summary"][name]), name
            assert max(one["device_busy"] for one in each) <= row["summary"]["device_busy"]

    def test_without_matplotlib_it_says_what_to_install(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        assert self.run("--html", str(tmp_path / "out.html")) == 1
        assert "pip install 'jaxllm[plots]'" in capsys.readouterr().err

    def test_a_trace_and_a_fitted_cost(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        write_trace(tmp_path / "trace.jsonl", make_workload("tenants", rate=3.0, num_requests=20))
        FittedCost({Shape(8192, 256, False): 0.01}, Work()).save(tmp_path / "cost.json")
        given = ("--trace", str(tmp_path / "trace.jsonl"), "--cost", str(tmp_path / "cost.json"))
        assert self.run(*given) == 0
        printed = capsys.readouterr().out
        assert "trace.jsonl" in printed
        assert "10.0 ms" in printed, "every token takes a step, and a step a hundredth of a second"

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--policy", "none"), "'none'; it must be one of fcfs"),
            (("-pp", "300"), "--pipeline-parallel-size 300 is more than the"),
            (("-tp", "6", "--device", "v5e"), "6 chips: a power of two up to 256"),
            (("--model", "/no/such/model"), "/no/such/model"),
            (("--trace", "/no/such/trace.jsonl"), "trace.jsonl"),
            (("--policy", "mlfq", "--scheduling-config", '{"mlfq": {"quantum": 0}}'), "must be at least 1"),
        ],
    )
    def test_what_goes_wrong_is_told(
        self, arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(*arguments) == 1
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        "arguments",
        [("--scheduling-config", '{"vtc": {}}'), ("--rate", "0"), ("--policy", ","), ("-dp", "0")],
    )
    def test_what_makes_no_sense_is_refused(self, arguments: tuple[str, ...]) -> None:
        with pytest.raises(SystemExit) as caught:
            self.run(*arguments)
        assert caught.value.code == 2

    def test_rates(self) -> None:
        assert parse_rates("4") == [4.0]
        assert parse_rates("2,4.5") == [2.0, 4.5]
        assert parse_rates("2:32") == [2.0, 4.0, 8.0, 16.0, 32.0]
        assert parse_rates("1:9:3") == [1.0, 3.0, 9.0]

"""A live engine's record, simulated again, gives the plans that the engine made."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from jaxllm import LLM, SamplingParams, TokensPrompt
from jaxllm.errors import ConfigError
from jaxllm.replay.__main__ import main
from jaxllm.scheduling import Plan, load_policy
from jaxllm.scheduling.recording.schedule import read_schedule
from jaxllm.scheduling.simulator import read_trace, simulate
from tests.otlp_collector import Collector

Row = tuple[int, int, int, bool]


class Plans:
    """Keeps the plans that it is asked to price."""

    def __init__(self) -> None:
        self.rows: list[list[Row]] = []

    def seconds(self, plan: Plan) -> float:
        self.rows.append(sorted((int(e.request.request_id), *e[1:]) for e in plan.scheduled))
        return 1.0


def test_a_recording_simulated_again_gives_the_same_plans(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    collector = Collector()
    rng = random.Random(5)
    stems = [[rng.randrange(1000) for _ in range(80)] for _ in range(2)]
    prompts = [
        rng.choice(stems)[: rng.randrange(1, 80)] + [rng.randrange(1000) for _ in range(rng.randrange(1, 20))]
        for _ in range(24)
    ]
    params = [
        SamplingParams(temperature=0, max_tokens=rng.randrange(1, 50), ignore_eos=True) for _ in prompts
    ]
    schedule, trace = tmp_path / "schedule.jsonl.gz", tmp_path / "trace.jsonl"
    arguments = {
        "max_model_len": 128,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 64,
        "num_gpu_blocks_override": 12,
    }
    files = {"record_schedule": schedule, "record_trace": trace}
    with LLM(**arguments, **files, otlp_traces_endpoint=collector.url) as llm:  # type: ignore[arg-type]
        assert llm.llm_engine.scheduler.num_preemptions == 0
        given = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
        llm.generate(given, params, use_tqdm=False)
        hits, preemptions = (
            llm.llm_engine.scheduler.prefix_cache_hits,
            llm.llm_engine.scheduler.num_preemptions,
        )
    assert hits and preemptions
    collector.close()
    attributes = [{pair.key: pair.value for pair in span.attributes} for span in collector.spans]
    assert sorted(spoken["gen_ai.usage.completion_tokens"].int_value for spoken in attributes) == sorted(
        one.max_tokens or 0 for one in params
    )
    latencies = [name for name in attributes[0] if name.startswith("gen_ai.latency.")]
    assert len(latencies) == 6 and all(name in spoken for spoken in attributes for name in latencies)

    read = read_schedule(schedule)
    recorded = [sorted((r.request.number, *r[1:]) for r in read.rows(i)) for i in range(len(read.steps))]
    # The engine had them all before its first step; the clock says that they came one after the other.
    for traced in (list(read.trace().values()), list(read_trace(trace))):
        plans = Plans()
        at_once = [type(t)(0.0, t.segments, t.output_len, t.terms, t.output_name) for t in traced]
        simulate(at_once, read.config, plans, load_policy("fcfs"))
        assert plans.rows == recorded
    assert read.as_simulation().num_preemptions == preemptions
    assert sum(r.num_cached_tokens for r in read.requests.values()) == hits

    assert main([str(schedule), "--policy", "sarathi"]) == 0
    assert "sarathi" in capsys.readouterr().out


def test_a_file_that_cannot_be_written_is_refused_before_the_model_loads(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="record_schedule"):
        LLM(tmp_path / "no-model", record_schedule=tmp_path / "missing" / "schedule.jsonl")

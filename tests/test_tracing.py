"""Spans: what they say of a request, and that a collector gets them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from jaxllm.async_engine import AsyncEngine
from jaxllm.errors import ConfigError
from jaxllm.pooling_params import PoolingParams
from jaxllm.request import Request, RequestStatus
from jaxllm.sampling_params import SamplingParams
from jaxllm.scheduling.plan import Plan, RequestUpdate
from jaxllm.serve.config import ServerConfig
from jaxllm.tracing import SpanRecorder, make_exporter, span_attributes, start_tracing, trace_headers_of
from tests.otlp_collector import Collector
from tests.serve.conftest import Api
from tests.serve.fake_engine import wait_until
from tests.serve.scheduled_engine import ScheduledFakeEngine

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
HEADERS = {"traceparent": f"00-{TRACE}-{PARENT}-01"}


def make_request(**fields: Any) -> Request:
    params = SamplingParams(temperature=0.5, top_p=0.9, n=2, max_tokens=8)
    request = Request("0_a", [1, 2, 3], params, arrival_time=10.0, max_tokens=8, group_id="a", **fields)
    request.token_ids += [4, 5]
    return request


def test_a_span_says_what_happened_and_when() -> None:
    request = make_request()
    request.first_scheduled_time, request.first_token_time, request.last_token_time = 11.0, 13.0, 17.0
    request.status = RequestStatus.FINISHED_STOPPED
    assert span_attributes(request, "m", 18.0) == {
        "gen_ai.request.id": "a",
        "gen_ai.response.model": "m",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.prompt_tokens": 3,
        "gen_ai.usage.completion_tokens": 2,
        "gen_ai.request.max_tokens": 8,
        "gen_ai.request.n": 2,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 0.9,
        "gen_ai.latency.e2e": 8.0,
        "gen_ai.latency.time_in_queue": 1.0,
        "gen_ai.latency.time_to_first_token": 3.0,
        "gen_ai.latency.time_in_model_prefill": 2.0,
        "gen_ai.latency.time_in_model_decode": 4.0,
        "gen_ai.latency.time_in_model_inference": 6.0,
    }


def test_what_never_happened_has_no_duration() -> None:
    request = make_request(pooling_params=PoolingParams())
    request.status = RequestStatus.FINISHED_ABORTED
    attributes = span_attributes(request, "m", 18.0)
    assert [name for name in attributes if "latency" in name] == ["gen_ai.latency.e2e"]
    assert not [name for name in attributes if name.startswith("gen_ai.request.t")]


def test_spans_are_parts_of_their_callers_traces() -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    recorder = SpanRecorder(provider, "m")
    now = time.monotonic()
    ours, alone, running, wrong = (
        make_request(trace_headers=h) for h in (HEADERS, None, None, {"traceparent": "x"})
    )
    for request in (ours, alone, wrong):
        request.arrival_time = now - 2.0
        request.status = RequestStatus.FINISHED_LENGTH
    running.status = RequestStatus.RUNNING
    updates = [RequestUpdate(request, [5]) for request in (ours, running, alone)]
    recorder.applied(Plan(0, (), (), 0), updates, now)
    recorder.ended(wrong, now)
    recorder.close()
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["llm_request"] * 3
    assert [span.parent is not None for span in spans] == [True, False, False]
    assert spans[0].parent is not None and spans[0].context is not None
    assert (f"{spans[0].context.trace_id:032x}", f"{spans[0].parent.span_id:016x}") == (TRACE, PARENT)
    assert spans[0].kind.name == "SERVER"
    for span in spans:
        assert span.start_time is not None and span.end_time is not None
        assert (span.end_time - span.start_time) / 1e9 == pytest.approx(2.0, abs=1e-5)
        assert abs(span.end_time / 1e9 - time.time()) < 5


def test_only_headers_of_traces_are_kept() -> None:
    assert trace_headers_of({**HEADERS, "authorization": "secret"}) == HEADERS
    assert trace_headers_of({"authorization": "secret"}) is None


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf")
    collector = Collector()
    yield collector
    collector.close()


def test_a_collector_gets_the_spans_of_a_server(collector: Collector) -> None:
    fake = ScheduledFakeEngine(otlp_traces_endpoint=collector.url)
    recorder = start_tracing(collector.url, "demo")
    fake.add_recorder(recorder)
    engine = AsyncEngine(fake)  # type: ignore[arg-type]
    try:
        api = Api(fake, engine, ServerConfig())
        body = {"prompt": "Hello", "max_tokens": 5, "n": 2}
        response = api.post("/v1/completions", body, headers={**HEADERS, "x-request-id": "mine"})
        assert response.status_code == 200, response.text
        api.complete(max_tokens=3)
        recorder.close()
        wait_until(lambda: len(collector.spans) == 3)
    finally:
        engine.stop(timeout=10)
    assert [span.trace_id.hex() == TRACE for span in collector.spans] == [True, True, False]
    assert {span.parent_span_id.hex() for span in collector.spans[:2]} == {PARENT}
    values = {pair.key: pair.value for pair in collector.spans[0].attributes}
    assert values["gen_ai.usage.completion_tokens"].int_value == 5
    assert values["gen_ai.request.id"].string_value.startswith("cmpl-mine")


def test_without_opentelemetry_one_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"pip install 'jaxllm\[otlp\]'"):
        make_exporter("http://localhost:4317")


def test_an_unknown_protocol_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "pigeon")
    with pytest.raises(ConfigError, match="'pigeon': spans go by 'grpc' or 'http/protobuf'"):
        make_exporter("http://localhost:4317")

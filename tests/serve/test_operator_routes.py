from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

import jaxllm
from jaxllm.serve.config import ServerConfig
from jaxllm.serve.throughput_log import ThroughputLog
from jaxllm.stats import (
    DESCRIPTIONS,
    Counter,
    Distribution,
    EngineStats,
    FinishedRequestStats,
    Gauge,
    Histogram,
    snapshot_metrics,
)
from tests.serve.conftest import Api, serving
from tests.serve.fake_engine import MAX_MODEL_LEN, demo_tokenizer

USER = [{"role": "user", "content": "Hello"}]


def test_models(api: Api) -> None:
    body = api.get("/v1/models").json()
    assert body["object"] == "list"
    assert [card["id"] for card in body["data"]] == ["fake", "alias"]
    assert {card["max_model_len"] for card in body["data"]} == {MAX_MODEL_LEN}
    assert api.get("/v1/models/alias").json() == body["data"][1]
    assert api.get("/v1/models/other").status_code == 404


def test_small_routes(api: Api) -> None:
    assert api.get("/version").json() == {"version": jaxllm.__version__}
    assert api.get("/health").content == b""
    assert api.get("/ping").status_code == api.request("POST", "/ping").status_code == 200
    assert api.get("/load").json() == {"server_load": 0}


def test_tokenize_and_back(api: Api) -> None:
    text = "Hello, Wörld 🎉"
    body = api.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    assert body["tokens"] == demo_tokenizer().encode(text)
    assert body["count"] == len(body["tokens"]) == len(body["token_strs"])
    assert body["max_model_len"] == MAX_MODEL_LEN
    assert api.post("/detokenize", {"tokens": body["tokens"]}).json() == {"prompt": text}
    chat = api.post("/tokenize", {"messages": USER}).json()["tokens"]
    api.chat()
    assert chat == api.fake.submitted[-1].prompt_token_ids


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": USER}, "prompt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
def test_bad_tokenize_requests(api: Api, path: str, body: dict[str, object], param: str) -> None:
    assert api.refused(path, body)["param"] == param


def test_metrics_are_what_prometheus_reads(api: Api) -> None:
    api.complete(n=2, max_tokens=3)
    api.complete(max_tokens=64)
    text = api.get("/metrics").text
    families = {family.name: family for family in text_string_to_metric_families(text)}
    for name in DESCRIPTIONS:
        assert f"jaxllm:{name}" in families, name
    samples = {
        (sample.name, sample.labels.get("finished_reason")): sample
        for family in families.values()
        for sample in family.samples
    }
    assert samples["jaxllm:request_success_total", "length"].value == 2
    assert samples["jaxllm:request_success_total", "stop"].value == 1
    assert samples["jaxllm:generation_tokens_total", None].labels == {"model_name": "fake", "engine": "0"}
    assert samples["jaxllm:request_generation_tokens_count", None].value == 3
    buckets = [
        (float(s.labels["le"]), s.value)
        for s in families["jaxllm:request_generation_tokens"].samples
        if s.name.endswith("_bucket")
    ]
    assert buckets == sorted(buckets)
    assert dict(buckets)[2] == 0
    assert dict(buckets)[5] == 2
    assert dict(buckets)[float("inf")] == 3
    info = families["jaxllm:cache_config_info"].samples[0]
    assert info.labels["block_size"] == "16"
    assert "process_resident_memory_bytes" in families


def test_two_servers_in_one_process_keep_their_metrics_apart(api: Api) -> None:
    with serving() as other:
        api.complete()
        assert 'request_success_total{engine="0",finished_reason="stop",model_name="fake"} 1' in (
            api.get("/metrics").text
        )
        assert 'request_success_total{engine="0",finished_reason="stop",model_name="fake"} 0' in (
            other.get("/metrics").text
        )


def test_a_distribution_counts_on_the_right_side_of_its_bounds() -> None:
    distribution = Distribution((1, 2, 5))
    distribution.observe_many([0, 1, 1.5, 2, 5])
    distribution.observe(5.1)
    assert distribution.counts == [2, 2, 1, 1]
    assert distribution.sum == pytest.approx(14.6)
    assert distribution.buckets() == {"1.0": 2, "2.0": 4, "5.0": 5, "+Inf": 6}


def test_what_never_happened_is_not_observed() -> None:
    stats = EngineStats()
    stats.record_finished(
        FinishedRequestStats.from_times(
            finish_reason="abort",
            num_prompt_tokens=3,
            num_generation_tokens=0,
            max_tokens=5,
            n=None,
            arrival_time=10.0,
            first_scheduled_time=None,
            first_token_time=None,
            last_token_time=None,
            finished_time=12.0,
        )
    )
    metrics = {(m.name, m.labels.get("finished_reason")): m for m in snapshot_metrics(stats, {"a": "b"})}
    aborted = metrics["jaxllm:request_success", "abort"]
    assert isinstance(aborted, Counter)
    assert aborted.value == 1
    assert aborted.labels == {"a": "b", "finished_reason": "abort"}
    latency = metrics["jaxllm:e2e_request_latency_seconds", None]
    assert isinstance(latency, Histogram)
    assert (latency.count, latency.sum) == (1, 2.0)
    for name in ("request_queue_time_seconds", "request_decode_time_seconds", "request_params_n"):
        histogram = metrics[f"jaxllm:{name}", None]
        assert isinstance(histogram, Histogram)
        assert histogram.count == 0
    assert isinstance(metrics["jaxllm:num_requests_running", None], Gauge)


def test_times_of_a_finished_sequence() -> None:
    finished = FinishedRequestStats.from_times(
        finish_reason="stop",
        num_prompt_tokens=1,
        num_generation_tokens=5,
        max_tokens=9,
        n=1,
        arrival_time=1.0,
        first_scheduled_time=2.0,
        first_token_time=5.0,
        last_token_time=9.0,
        finished_time=9.5,
    )
    assert (finished.queue_time, finished.prefill_time, finished.decode_time) == (1.0, 3.0, 4.0)
    assert (finished.inference_time, finished.e2e_time) == (7.0, 8.5)
    stats = EngineStats()
    stats.record_finished(finished)
    assert stats.time_per_output_token.sum == 1.0


def test_cors_is_off_unless_asked_for() -> None:
    headers = {"Origin": "http://page.example", "Access-Control-Request-Method": "POST"}
    with serving() as api:
        assert "access-control-allow-origin" not in api.get("/version", headers=headers).headers
    with serving(ServerConfig(allowed_origins=("http://page.example",), api_key=("k",))) as api:
        assert api.request("OPTIONS", "/v1/models", headers=headers).status_code == 200
        response = api.get("/version", headers=headers)
        assert response.headers["access-control-allow-origin"] == "http://page.example"
        refused = api.get("/version", headers={**headers, "Origin": "http://evil.example"})
        assert "access-control-allow-origin" not in refused.headers


def test_docs_and_request_id_headers_and_root_path() -> None:
    with serving() as api:
        assert "/v1/completions" in api.get("/openapi.json").json()["paths"]
        assert "x-request-id" not in api.get("/version", headers={"X-Request-Id": "a"}).headers
    config = ServerConfig(
        disable_fastapi_docs=True, enable_request_id_headers=True, root_path="/llm", api_key=("k",)
    )
    with serving(config) as api:
        key = {"Authorization": "Bearer k"}
        assert api.get("/version", headers={**key, "X-Request-Id": "a"}).headers["x-request-id"] == "a"
        assert len(api.get("/version", headers=key).headers["x-request-id"]) == 32
        for path in ("/docs", "/redoc", "/openapi.json"):
            assert api.get(path, headers=key).status_code == 404
        # The prefix of a proxy that does not strip it is no way around the keys.
        assert api.get("/llm/v1/models").status_code == 401
        assert api.get("/llm/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200


def test_requests_are_logged_where_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with serving(ServerConfig(enable_log_requests=True, max_log_len=5)) as api, caplog.at_level("INFO"):
        api.complete("Hello World", temperature=0.125)
    line = next(record.getMessage() for record in caplog.records if "prompt tokens" in record.getMessage())
    assert "'Hello'" in line
    assert "World" not in line
    assert "temperature=0.125" in line


def test_the_throughput_log_speaks_when_there_is_something_to_say(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    stats = EngineStats()
    log = ThroughputLog(interval=10, clock=lambda: now)
    with caplog.at_level("INFO"):
        stats.generation_tokens = 500
        log.tick(lambda: stats)
        assert caplog.messages == []
        now = 120.0
        stats.prompt_tokens, stats.prefix_cache_queries, stats.prefix_cache_hits = 1000, 400, 100
        log.tick(lambda: stats)
        (line,) = caplog.messages
        for words in ("Prompt 50.0", "generation 25.0", "prefix cache hits 25.0 %"):
            assert words in line
        now = 140.0
        log.tick(lambda: stats)
        assert len(caplog.messages) == 1
        now, stats.num_requests_waiting = 160.0, 3
        log.tick(lambda: stats)
        assert "3 waiting" in caplog.messages[1]
        assert "generation 0.0" in caplog.messages[1]

"""What the operator bounds: headers, bodies, sequences, the queue; and what the log says."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import resource
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from jaxllm.async_engine import AsyncEngine
from jaxllm.serve.config import ServerConfig
from jaxllm.serve.launcher import keep_for_good, quiet_paths, raise_file_limit
from jaxllm.serve.logs import REQUEST_ID, JSONFormatter, QuietPaths
from tests.serve.conftest import serving
from tests.serve.fake_engine import wait_until
from tests.serve.test_server import Process, free_port, live_server

COMPLETIONS = "/v1/completions"


def test_headers_are_bounded() -> None:
    with serving(ServerConfig(h11_max_header_count=20, h11_max_incomplete_event_size=1000)) as api:
        assert api.get("/version", headers={"a": "b" * 600}).status_code == 200
        for headers in ({"a": "b" * 1000}, {f"a{i}": "b" for i in range(20)}):
            response = api.get("/version", headers=headers)
            assert response.status_code == 431
            assert "20 headers of 1000 bytes" in response.json()["error"]["message"]


def test_the_socket_bounds_headers_too() -> None:
    with live_server(h11_max_incomplete_event_size=2000) as live:
        assert httpx.get(f"{live.url}/version", headers={"a": "b" * 1000}).status_code == 200
        assert httpx.get(f"{live.url}/version", headers={"a": "b" * 100_000}).status_code in (400, 431)


def test_bodies_are_bounded() -> None:
    with serving(ServerConfig(max_request_bytes=500)) as api:
        assert api.post(COMPLETIONS, {"prompt": "a" * 100, "max_tokens": 1}).status_code == 200
        error = api.refused(COMPLETIONS, {"prompt": "a" * 1000}, status=413)
        assert "500 bytes" in error["message"]

        async def pieces() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b" " * 100

        # Without a length that says so in advance.
        response = api.request("POST", COMPLETIONS, content=pieces())
        assert response.status_code == 413
        assert "500 bytes" in response.json()["error"]["message"]
        assert len(api.fake.submitted) == 1


def test_sequences_of_one_request_are_bounded() -> None:
    with serving(ServerConfig(max_sequences_per_request=6)) as api:
        body = {"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 1}
        assert api.post(COMPLETIONS, body).status_code == 200
        error = api.refused(COMPLETIONS, {**body, "n": 3})
        assert "9 sequences" in error["message"]
        assert len(api.fake.submitted) == 6


def test_a_full_queue_says_when_to_come_back() -> None:
    config = ServerConfig(max_num_queued_reqs=3)
    with serving(config) as api:
        api.fake.gate.clear()

        async def main() -> tuple[httpx.Response, list[httpx.Response]]:
            transport = httpx.ASGITransport(api.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
                body = {"prompt": "a", "n": 2, "max_tokens": 2}
                first = asyncio.create_task(client.post(COMPLETIONS, json=body))
                while api.engine.num_unfinished != 2:
                    await asyncio.sleep(0.01)
                refused = await client.post(COMPLETIONS, json=body)
                fits = asyncio.create_task(client.post(COMPLETIONS, json={**body, "n": 1}))
                while api.engine.num_unfinished != 3:
                    await asyncio.sleep(0.01)
                api.fake.gate.set()
                return refused, [await first, await fits]

        refused, answered = asyncio.run(main())
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "ServiceUnavailable"
        assert [response.status_code for response in answered] == [200, 200]
        assert api.engine.num_unfinished == 0
        assert api.post(COMPLETIONS, {"prompt": "a", "n": 3, "max_tokens": 2}).status_code == 200


def test_prompts_that_wait_for_their_first_token_are_bounded() -> None:
    with serving(ServerConfig(max_num_queued_tokens=6)) as api:
        api.fake.gate.clear()
        api.fake.step_time = 0.01

        async def main() -> tuple[httpx.Response, int, httpx.Response]:
            transport = httpx.ASGITransport(api.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client:
                body = {"prompt": [5, 6, 7], "n": 2, "max_tokens": 200, "ignore_eos": True}
                first = asyncio.create_task(client.post(COMPLETIONS, json=body))
                while api.engine.num_unfinished != 2:
                    await asyncio.sleep(0.01)
                refused = await client.post(COMPLETIONS, json={**body, "n": 1, "max_tokens": 1})
                api.fake.gate.set()
                while api.engine.num_queued_tokens():
                    await asyncio.sleep(0.01)
                # The others still run, and their prompts wait no longer.
                unfinished = api.engine.num_unfinished
                taken = await client.post(COMPLETIONS, json={**body, "n": 1, "max_tokens": 1})
                first.cancel()
                return refused, unfinished, taken

        refused, unfinished, taken = asyncio.run(main())
        assert (refused.status_code, taken.status_code) == (503, 200)
        assert refused.headers["retry-after"] == "1"
        assert "Prompts of 6 tokens wait" in refused.json()["error"]["message"]
        assert unfinished == 2


def test_the_server_may_open_a_file_for_each_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int]] = []
    limits = {"now": (1024, 4096)}
    monkeypatch.setattr("resource.getrlimit", lambda kind: limits["now"])
    monkeypatch.setattr("resource.setrlimit", lambda kind, both: asked.append(both))
    raise_file_limit(2000)
    raise_file_limit(10_000)  # As many as the system allows.
    limits["now"] = (1024, resource.RLIM_INFINITY)
    raise_file_limit(10_000)
    assert [soft > wanted for (soft, _), wanted in zip(asked, (2000, 4095, 10_000), strict=True)] == [
        True
    ] * 3
    assert asked[1] == (4096, 4096)
    raise_file_limit(100)  # There are enough.
    assert len(asked) == 3


def test_sequences_are_no_longer_counted_however_they_end() -> None:
    with serving() as api:
        api.fake.refuse_submit = ValueError("broken")
        assert api.post(COMPLETIONS, {"prompt": "a", "n": 3}).status_code >= 500
        wait_until(lambda: api.engine.num_unfinished == 0)


def test_closing_a_stream_counts_once(api: Any) -> None:
    async def main(engine: AsyncEngine) -> None:
        processed = await engine.process("x", "Hello", api.engine.engine.input_processor.default_params())
        stream = engine.submit("x", processed, processed.requests[0].sampling_params.output_kind)
        assert engine.num_unfinished == 1
        stream.close()
        stream.close()
        async for _ in stream:
            pass
        assert engine.num_unfinished == 0

    asyncio.run(main(api.engine))


def record(name: str, message: str, *args: Any) -> logging.LogRecord:
    return logging.LogRecord(name, logging.INFO, "", 0, message, args, None)


def test_json_lines_carry_the_id_of_the_request(capsys: pytest.CaptureFixture[str]) -> None:
    formatter = JSONFormatter()
    assert "request_id" not in json.loads(formatter.format(record("jaxllm.x", "plain")))
    token = REQUEST_ID.set("abc")
    try:
        line = json.loads(formatter.format(record("jaxllm.x", 'said "%s"\n', "é")))
    finally:
        REQUEST_ID.reset(token)
    assert (line["message"], line["level"], line["logger"]) == ('said "é"\n', "info", "jaxllm.x")
    assert line["request_id"] == "abc"
    assert line["time"].endswith("+00:00")
    try:
        raise ValueError("why")
    except ValueError as error:
        failed = logging.LogRecord("a", 40, "", 0, "bad", (), (ValueError, error, error.__traceback__))
    assert "ValueError: why" in json.loads(formatter.format(failed))["exception"]


ACCESS = ("uvicorn.access", '%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", "/health?x=1", "1.1", 200)


def test_access_lines_have_fields() -> None:
    line = json.loads(JSONFormatter().format(record(*ACCESS)))
    assert (line["method"], line["path"], line["status"]) == ("GET", "/health?x=1", 200)


def test_paths_may_be_kept_from_the_access_log() -> None:
    paths = quiet_paths(ServerConfig(disable_access_log_for_endpoints="/health, /metrics"))
    assert paths == ("/health", "/metrics")
    assert not QuietPaths(paths).filter(record(*ACCESS))
    assert QuietPaths(["/metrics"]).filter(record(*ACCESS))
    assert QuietPaths(paths).filter(record("uvicorn.error", "about /health"))


def test_a_server_that_logs_json() -> None:
    port = free_port()
    server = Process(
        "fast",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--log-format",
        "json",
        "--enable-log-requests",
        "--disable-access-log-for-endpoints",
        "/version",
    )
    try:
        server.wait_for_banner()
        url = f"http://127.0.0.1:{port}"
        httpx.get(f"{url}/version")
        body = {"prompt": "Hello", "max_tokens": 1}
        httpx.post(f"{url}{COMPLETIONS}", json=body, headers={"X-Request-Id": "my-own"})
    finally:
        server.process.terminate()
        status, errors = server.end()
    assert status == 0, errors
    lines = [json.loads(line) for line in errors.splitlines() if line.startswith("{")]
    access = [line for line in lines if line["logger"] == "uvicorn.access"]
    assert [line["path"] for line in access] == [COMPLETIONS]
    mine = [line for line in lines if line.get("request_id") == "my-own"]
    assert {line["logger"] for line in mine} == {"uvicorn.access", "jaxllm.serve.state"}


def test_what_stays_is_not_looked_through_again_and_again() -> None:
    thresholds, before = gc.get_threshold(), gc.get_freeze_count()
    try:
        keep_for_good()
        assert gc.get_freeze_count() > before + 10_000  # What this process is made of.
        assert gc.get_threshold()[0] > thresholds[0]
        assert gc.isenabled()
    finally:
        gc.unfreeze()
        gc.set_threshold(*thresholds)

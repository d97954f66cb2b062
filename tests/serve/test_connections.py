"""Clients that are too slow, or too many: what happens on the socket."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import httpx
import pytest

from jaxllm.errors import ConfigError
from jaxllm.serve.config import ServerConfig
from tests.serve.fake_engine import REPLY, FakeEngine, wait_until
from tests.serve.test_server import Live, live_server

BODY = json.dumps({"prompt": "Hello", "max_tokens": 64}).encode()


def head_of(body: bytes) -> str:
    return (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )


HEAD = head_of(BODY)


def connect(live: Live) -> socket.socket:
    return socket.create_connection(("127.0.0.1", live.port), timeout=10)


def read_all(connection: socket.socket) -> bytes:
    parts = []
    while part := connection.recv(65536):
        parts.append(part)
    return b"".join(parts)


@pytest.mark.parametrize("begin", ["", "GET /he", HEAD, HEAD + '{"prompt"'])
def test_a_request_that_does_not_come_in_time_is_given_up(begin: str) -> None:
    with live_server(request_timeout=0.3) as live, connect(live) as connection:
        began = time.monotonic()
        connection.sendall(begin.encode())
        head, _, body = read_all(connection).partition(b"\r\n\r\n")
        assert 0.25 < time.monotonic() - began < 5
        assert head.startswith(b"HTTP/1.1 408 ")
        assert "0.3 seconds" in json.loads(body)["error"]["message"]
        wait_until(lambda: not live.server.server_state.connections)
        assert not live.fake.submitted
        assert httpx.get(f"{live.url}/health").status_code == 200


def test_a_byte_now_and_then_does_not_win_time() -> None:
    with live_server(request_timeout=0.5) as live, connect(live) as connection:
        began = time.monotonic()
        with pytest.raises(OSError):
            for byte in HEAD:
                connection.sendall(byte.encode())
                time.sleep(0.05)
            pytest.fail("all of it was taken")
        assert time.monotonic() - began < 5


def test_the_time_of_an_answer_is_none_of_the_request() -> None:
    fake = FakeEngine()
    fake.step_time = 0.05  # Ten tokens take longer than a request may.
    with live_server(fake, request_timeout=0.3) as live, connect(live) as connection:
        for _ in range(2):  # The second over the same connection.
            connection.sendall(HEAD.encode() + BODY)
            answer = connection.recv(65536)
            while REPLY.encode() not in answer:
                more = connection.recv(65536)
                assert more, answer
                answer += more
            assert answer.startswith(b"HTTP/1.1 200 ")


def test_who_never_reads_is_sent_away_and_his_request_ended() -> None:
    fake = FakeEngine()
    fake.reply = lambda request: "on and on " * 30
    with live_server(fake, write_timeout=0.3) as live, connect(live) as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        fields = {
            "n": 24,
            "max_tokens": 200,
            "logprobs": 20,
            "stream": True,
            "prompt": "a",
            "ignore_eos": True,
        }
        body = json.dumps(fields).encode()
        fake.gate.clear()
        connection.sendall(head_of(body).encode() + body)
        wait_until(lambda: live.engine.num_unfinished == 24)
        fake.gate.set()
        wait_until(lambda: live.state.requests_in_progress == 0, 20)
        wait_until(lambda: not live.server.server_state.connections)
        assert live.engine.num_unfinished == 0
        assert httpx.get(f"{live.url}/health").status_code == 200


def test_one_connection_too_many_is_told_so() -> None:
    with live_server(max_connections=3) as live:
        held = [connect(live) for _ in range(3)]
        wait_until(lambda: len(live.server.server_state.connections) == 3)
        response = httpx.get(f"{live.url}/health")
        assert response.status_code == 503
        assert "3 connections" in response.json()["error"]["message"]
        for connection in held:
            connection.close()
        wait_until(lambda: not live.server.server_state.connections)
        assert httpx.get(f"{live.url}/health").status_code == 200


def test_a_client_that_asks_for_a_websocket_gets_http(caplog: Any) -> None:
    with live_server() as live:
        headers = {"connection": "upgrade", "upgrade": "websocket", "sec-websocket-key": "a" * 24}
        assert httpx.get(f"{live.url}/version", headers=headers).status_code == 200


@pytest.mark.parametrize("name", ["request_timeout", "write_timeout", "max_connections", "max_request_bytes"])
def test_a_limit_of_nothing_is_refused(name: str) -> None:
    for value in (0, -1, float("nan")):
        with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} .* above 0"):
            ServerConfig(**{name: value})  # type: ignore[arg-type]

"""The server on a real socket: the official client, clients that go away, signals, start-up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from jaxllm.async_engine import AsyncEngine
from jaxllm.serve.app import build_app
from jaxllm.serve.config import ServerConfig
from jaxllm.serve.launcher import DrainingServer, bind, make_uvicorn_config
from tests.serve.fake_engine import REPLY, FakeEngine, wait_until

USER = [{"role": "user", "content": "Hello"}]


class Live:
    """A server on a free port of this process."""

    def __init__(self, config: ServerConfig, fake: FakeEngine | None = None) -> None:
        self.fake = fake or FakeEngine()
        self.engine = AsyncEngine(self.fake)  # type: ignore[arg-type]
        listener = bind(config)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        app = build_app(self.engine, config, model_names=("fake",))
        self.state = app.state.server
        self.server = DrainingServer(make_uvicorn_config(app, config), self.state)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]})
        self.thread.start()
        wait_until(lambda: self.server.started)

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="key", max_retries=0, timeout=20)

    def stop(self) -> None:
        self.fake.gate.set()
        self.server.handle_exit(signal.SIGTERM, None)
        self.thread.join(20)
        assert not self.thread.is_alive()
        self.engine.stop(timeout=10)


@contextlib.contextmanager
def live_server(fake: FakeEngine | None = None, **config: Any) -> Iterator[Live]:
    defaults = {"host": "127.0.0.1", "port": 0, "uvicorn_log_level": "warning"}
    live = Live(ServerConfig(**{**defaults, **config}), fake)
    try:
        yield live
    finally:
        live.stop()


@pytest.fixture
def live() -> Iterator[Live]:
    with live_server() as live:
        yield live


# -- the official client ------------------------------------------------------------------------------


def test_the_official_client_completes_and_chats(live: Live) -> None:
    with live.client() as client:
        assert [model.id for model in client.models.list()] == ["fake"]
        completion = client.completions.create(model="fake", prompt="Hello", max_tokens=64, logprobs=1)
        assert completion.choices[0].text == REPLY
        assert completion.usage is not None
        chat = client.chat.completions.create(model="fake", messages=USER, logprobs=True, top_logprobs=2)  # type: ignore[arg-type]
        assert chat.choices[0].message.content == REPLY
        assert chat.choices[0].finish_reason == "stop"
        assert chat.choices[0].logprobs is not None
        assert len(chat.choices[0].logprobs.content[0].top_logprobs) == 2  # type: ignore[index]


def test_the_official_client_streams(live: Live) -> None:
    with live.client() as client:
        stream = client.chat.completions.create(
            model="fake",
            messages=USER,  # type: ignore[arg-type]
            stream=True,
            n=2,
            stream_options={"include_usage": True},
            extra_body={"top_k": 5, "min_tokens": 1},
        )
        *chunks, last = list(stream)
        for index in range(2):
            choices = [c.choices[0] for c in chunks if c.choices[0].index == index]
            assert choices[0].delta.role == "assistant"
            assert "".join(choice.delta.content or "" for choice in choices) == REPLY
        assert last.usage is not None
        assert last.usage.completion_tokens == 2 * live.fake.submitted[0].num_output_tokens
        assert live.fake.submitted[0].sampling_params.top_k == 5


def test_the_official_client_meets_typed_errors(live: Live) -> None:
    with live.client() as client:
        with pytest.raises(openai.NotFoundError, match="gpt-99"):
            client.completions.create(model="gpt-99", prompt="Hello")
        with pytest.raises(openai.BadRequestError) as bad:
            client.chat.completions.create(model="fake", messages=USER, temperature=9)  # type: ignore[arg-type]
        assert bad.value.param == "temperature"
        with pytest.raises(openai.BadRequestError, match="--enable-auto-tool-choice"):
            client.chat.completions.create(
                model="fake",
                messages=USER,  # type: ignore[arg-type]
                tools=[{"type": "function", "function": {"name": "f"}}],
            )
        live.fake.fail = MemoryError("no more memory")
        with pytest.raises(openai.InternalServerError, match="no more memory"):
            client.completions.create(model="fake", prompt="Hello")


def test_an_error_in_mid_stream_reaches_the_official_client(live: Live) -> None:
    live.fake.step_time = 0.02
    live.fake.reply = lambda request: REPLY * 3
    with live.client() as client:
        stream = client.completions.create(model="fake", prompt="Hello", max_tokens=64, stream=True)
        said = next(stream).choices[0].text
        live.fake.fail = MemoryError("no more memory")
        with pytest.raises(openai.APIError, match="no more memory"):
            for chunk in stream:
                said += chunk.choices[0].text
        assert (REPLY * 3).startswith(said)


def test_keys(live: Live) -> None:
    with live_server(api_key=("key",)) as guarded, guarded.client() as client:
        assert client.completions.create(model="fake", prompt="Hello", max_tokens=64).choices[0].text == REPLY
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="other").models.list()


def test_a_hundred_streams_at_once(live: Live) -> None:
    live.fake.reply = lambda request: f"You said {request.prompt_token_ids}, and I heard it well."

    async def one(client: openai.AsyncOpenAI, i: int) -> str:
        stream = await client.completions.create(model="fake", prompt=[i, i + 1], max_tokens=200, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="key", timeout=30) as client:
            return await asyncio.gather(*(one(client, i) for i in range(100)))

    said = asyncio.run(main())
    assert said == [f"You said [{i}, {i + 1}], and I heard it well." for i in range(100)]
    wait_until(lambda: live.state.requests_in_progress == 0)


# -- clients that go away -----------------------------------------------------------------------------


def send(live: Live, path: str, body: dict[str, Any]) -> socket.socket:
    """A request on a bare socket, whose answer nobody has read yet."""
    content = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", live.port), timeout=10)
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("prompt", ["Hello", ["Hello", "World", "again"]])
def test_a_client_that_disconnects_aborts_its_request(live: Live, stream: bool, prompt: Any) -> None:
    live.fake.step_time = 0.01
    body = {"prompt": prompt, "ignore_eos": True, "max_tokens": None, "stream": stream}
    connection = send(live, "/v1/completions", body)
    count = 1 if isinstance(prompt, str) else 3
    wait_until(lambda: len(live.fake.submitted) == count)
    if stream:
        assert connection.recv(1000).startswith(b"HTTP/1.1 200")
    connection.close()
    wait_until(lambda: len(live.fake.aborted) == count)
    wait_until(lambda: not live.fake.has_unfinished_requests())
    wait_until(lambda: live.state.requests_in_progress == 0)


def test_a_client_that_disconnects_before_the_first_token(live: Live) -> None:
    live.fake.gate.clear()
    connection = send(live, "/v1/chat/completions", {"messages": USER, "stream": True})
    wait_until(lambda: live.fake.num_steps == 1)
    connection.close()
    time.sleep(0.05)
    live.fake.reply = lambda request: REPLY
    live.fake.gate.set()
    wait_until(lambda: live.fake.aborted or not live.fake.has_unfinished_requests())
    wait_until(lambda: live.state.requests_in_progress == 0)


def test_a_client_that_resets_the_connection(live: Live) -> None:
    live.fake.step_time = 0.005
    body = {"prompt": "Hello", "ignore_eos": True, "max_tokens": None, "stream": True}
    connection = send(live, "/v1/completions", body)
    connection.recv(1000)
    # Lingering for zero seconds makes close() a reset.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    wait_until(lambda: len(live.fake.aborted) == 1)


def test_a_client_that_stops_reading_does_not_stop_the_others(live: Live) -> None:
    deaf = send(
        live,
        "/v1/completions",
        {"prompt": "Hello", "n": 50, "ignore_eos": True, "max_tokens": None, "stream": True, "logprobs": 20},
    )
    wait_until(lambda: len(live.fake.submitted) == 50)
    with live.client() as client:
        assert client.completions.create(model="fake", prompt="Hi", max_tokens=64).choices[0].text == REPLY
    wait_until(lambda: not live.fake.has_unfinished_requests())
    # What it did not read yet is all there, and complete.
    deaf.settimeout(10)
    answer = b""
    while not answer.endswith(b"0\r\n\r\n"):
        answer += deaf.recv(1 << 20)
    assert b"data: [DONE]" in answer
    assert answer.count(b'"finish_reason":"length"') == 50
    deaf.close()


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0\1\2\3\r\n\r\n",
        b"GET\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
        b"",
    ],
)
def test_garbage_on_the_socket(live: Live, garbage: bytes) -> None:
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
        connection.sendall(garbage)
        connection.shutdown(socket.SHUT_WR)
        answer = connection.recv(1000)
        assert answer == b"" or answer.startswith(b"HTTP/1.1 400")
    assert httpx.get(f"{live.url}/health").status_code == 200


def test_half_a_body_and_away(live: Live) -> None:
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
    wait_until(lambda: live.state.requests_in_progress == 0)
    assert httpx.get(f"{live.url}/health").status_code == 200
    assert live.fake.submitted == []


def test_load_counts_requests_in_progress(live: Live) -> None:
    live.fake.gate.clear()
    connection = send(live, "/v1/completions", {"prompt": "Hello"})
    wait_until(lambda: live.fake.submitted)
    assert httpx.get(f"{live.url}/load").json() == {"server_load": 1}
    live.fake.gate.set()
    assert connection.recv(100).startswith(b"HTTP/1.1 200")
    wait_until(lambda: httpx.get(f"{live.url}/load").json() == {"server_load": 0})
    connection.close()


# -- draining -----------------------------------------------------------------------------------------


def test_a_signal_lets_streams_finish_and_refuses_new_requests() -> None:
    with live_server() as live:
        live.fake.step_time = 0.05
        with live.client() as client, httpx.Client() as late:
            stream = client.completions.create(model="fake", prompt="Hello", max_tokens=64, stream=True)
            said = next(stream).choices[0].text
            live.server.handle_exit(signal.SIGTERM, None)
            wait_until(lambda: live.engine.is_draining)
            response = late.post(f"{live.url}/v1/completions", json={"prompt": "Hello"})
            assert response.status_code == 503
            assert response.json()["error"]["type"] == "ServiceUnavailable"
            assert late.get(f"{live.url}/health").status_code == 503
            assert said + "".join(chunk.choices[0].text for chunk in stream) == REPLY
        live.thread.join(10)
        assert not live.thread.is_alive()
        assert live.fake.aborted == []


def test_what_outlasts_the_drain_is_aborted_and_told_so() -> None:
    with live_server(shutdown_timeout=0.2) as live:
        live.fake.step_time = 0.02
        with live.client() as client:
            stream = client.completions.create(
                model="fake", prompt="Hello", max_tokens=None, stream=True, extra_body={"ignore_eos": True}
            )
            next(stream)
            live.server.handle_exit(signal.SIGTERM, None)
            assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "abort"
        live.thread.join(10)
        assert not live.thread.is_alive()


# -- the process --------------------------------------------------------------------------------------


class Process:
    """A server process, and what it printed."""

    def __init__(self, *flags: str, **environment: str) -> None:
        command = [sys.executable, "-m", "tests.serve.fake_server", *flags]
        root = Path(__file__).parent.parent.parent
        self.process = subprocess.Popen(
            command,
            cwd=root,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        assert self.process.stdout is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,))
        self._reader.start()

    def _read(self, stdout: Any) -> None:
        self.lines.extend(iter(stdout.readline, ""))

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for_banner(self) -> None:
        wait_until(lambda: "curl" in self.output or self.process.poll() is not None, 30)
        assert self.process.poll() is None, self.end()[1]

    def end(self) -> tuple[int, str]:
        """Exit status and stderr."""
        assert self.process.stderr is not None
        try:
            errors = self.process.stderr.read()
            status = self.process.wait(20)
        finally:
            self.process.kill()
            self._reader.join(5)
            self.process.stderr.close()
            assert self.process.stdout is not None
            self.process.stdout.close()
        return status, errors


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_process_with_status_0_after_its_requests(name: str) -> None:
    port = free_port()
    server = Process("slow", "--host", "127.0.0.1", "--port", str(port))
    try:
        server.wait_for_banner()
        assert f"http://127.0.0.1:{port}/v1/chat/completions" in server.output
        assert "demo" not in server.output
        url = f"http://127.0.0.1:{port}/v1/completions"
        with httpx.stream("POST", url, json={"prompt": "a", "max_tokens": 12, "stream": True}) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(getattr(signal, name))
            rest = list(lines)
        assert rest[-2:] == ["data: [DONE]", ""]
        assert '"finish_reason":"length"' in rest[-4]
    finally:
        server.process.terminate()
        status, errors = server.end()
    assert status == 0, errors
    assert "running requests may finish" in errors
    assert "Traceback" not in errors


def test_a_second_signal_ends_it_at_once() -> None:
    port = free_port()
    server = Process("slow", "--host", "127.0.0.1", "--port", str(port), "--shutdown-timeout", "60")
    try:
        server.wait_for_banner()
        url = f"http://127.0.0.1:{port}/v1/completions"
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.stream("POST", url, json={"prompt": "a", "max_tokens": 200, "stream": True}) as response,
        ):
            lines = response.iter_lines()
            next(lines)
            started = time.monotonic()
            server.process.send_signal(signal.SIGINT)
            time.sleep(0.3)
            server.process.send_signal(signal.SIGINT)
            list(lines)
        status, errors = server.end()
    finally:
        server.process.kill()
    assert time.monotonic() - started < 8
    assert status == 0, errors


def test_a_busy_port_is_told_before_the_model_is_loaded() -> None:
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        port = str(busy.getsockname()[1])
        # A model that does not load would be complained about, were it tried.
        status, errors = Process("broken", "--host", "127.0.0.1", "--port", port).end()
    assert status == 1
    assert f"Cannot listen on 127.0.0.1:{port}" in errors
    assert "--port" in errors
    assert "Traceback" not in errors
    assert "no model" not in errors


def test_a_port_that_another_server_took_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    # Two servers that load their models at once can both hold the port, until one of them listens.
    first = bind(ServerConfig(host="127.0.0.1", port=0))
    config = ServerConfig(host="127.0.0.1", port=first.getsockname()[1], uvicorn_log_level="critical")
    second = bind(config)
    first.listen()
    engine = AsyncEngine(FakeEngine())  # type: ignore[arg-type]
    app = build_app(engine, config)
    server = DrainingServer(make_uvicorn_config(app, config), app.state.server, "listening")
    try:
        with caplog.at_level("ERROR"):
            server.run(sockets=[second])
    finally:
        first.close()
        second.close()
        engine.stop()
    assert not server.started
    assert "Another server took the port" in caplog.text


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_https(tmp_path: Path) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "cert.pem")
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=localhost",
    ]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate]
    subprocess.run(command, check=True, capture_output=True)
    with live_server(ssl_keyfile=key, ssl_certfile=certificate) as live:
        url = live.url.replace("http:", "https:")
        context = ssl.create_default_context(cafile=certificate)
        body = {"prompt": "Hello", "max_tokens": 64}
        answer = httpx.post(f"{url}/v1/completions", json=body, verify=context).json()
        assert answer["choices"][0]["text"] == REPLY
        context.load_cert_chain(certificate, key)
    # A client without a certificate of the authority, which here is the server itself, is turned away.
    guarded = {"ssl_keyfile": key, "ssl_certfile": certificate, "ssl_ca_certs": certificate}
    with live_server(**guarded, ssl_cert_reqs=2) as live:
        url = live.url.replace("http:", "https:")
        assert httpx.get(f"{url}/health", verify=context).status_code == 200
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{url}/health", verify=ssl.create_default_context(cafile=certificate))
    status, errors = Process("broken", "--ssl-keyfile", key, "--ssl-certfile", "/nowhere.pem").end()
    assert status == 1
    assert "--ssl-certfile /nowhere.pem cannot be read" in errors


def test_a_model_that_does_not_load_ends_it_with_a_message() -> None:
    status, errors = Process("broken", "--host", "127.0.0.1", "--port", "0").end()
    assert status == 1
    assert "there is no model at 'broken'" in errors
    assert "Traceback" not in errors


def test_the_demo_model_on_a_unix_socket_says_that_it_is_one(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    # Left behind by a server that was killed.
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    server = Process("--uds", path, JAXLLM_API_KEY="secret")
    try:
        server.wait_for_banner()
        wait_until(lambda: "curl" in server.output)
        assert "tiny demo model" in server.output
        assert "python -m jaxllm.serve DIRECTORY" in server.output
        assert f"--unix-socket {path}" in server.output
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://x") as client:
            assert client.get("/v1/models").status_code == 401
            models = client.get("/v1/models", headers={"Authorization": "Bearer secret"}).json()
        assert models["data"][0]["id"] == "jaxllm-demo"
        status, errors = Process("--uds", path).end()
        assert status == 1
        assert "Another server listens" in errors
    finally:
        server.process.terminate()
        status, errors = server.end()
    assert status == 0, errors
    assert not os.path.exists(path)

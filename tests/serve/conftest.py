from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from jaxllm.async_engine import AsyncEngine
from jaxllm.serve.app import build_app
from jaxllm.serve.config import ServerConfig
from tests.serve.fake_engine import FakeEngine


class Api:
    """A server in this process, without a socket."""

    def __init__(self, fake: FakeEngine, engine: AsyncEngine, config: ServerConfig) -> None:
        self.fake = fake
        self.engine = engine
        self.root_path = config.root_path
        self.app = build_app(engine, config, model_names=("fake", "alias"))

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False, root_path=self.root_path)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.request(method, path, **options)

        return asyncio.run(send())

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return self.request("POST", path, json=body, **options)

    def complete(self, prompt: Any = "Hello", **fields: Any) -> dict[str, Any]:
        response = self.post("/v1/completions", {"prompt": prompt, "max_tokens": 64, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, content: Any = "Hello", **fields: Any) -> dict[str, Any]:
        messages = [{"role": "user", "content": content}]
        response = self.post("/v1/chat/completions", {"messages": messages, **fields})
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        response = self.post(path, {**body, "stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return events_of(response.text)

    def refused(self, path: str, body: Any, status: int = 400) -> dict[str, Any]:
        response = self.post(path, body)
        assert response.status_code == status, response.text
        error = response.json()["error"]
        assert set(response.json()) == {"error"}
        assert set(error) == {"message", "type", "param", "code"}
        assert error["code"] == status
        return error


def events_of(text: str) -> list[dict[str, Any]]:
    """The events of a whole stream, which must end with [DONE]."""
    events = text.split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") for event in events)
    assert events.pop() == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events]


@contextmanager
def serving(config: ServerConfig | None = None, **engine_config: Any) -> Iterator[Api]:
    fake = FakeEngine(**engine_config)
    engine = AsyncEngine(fake)  # type: ignore[arg-type]
    try:
        yield Api(fake, engine, config or ServerConfig())
    finally:
        fake.gate.set()
        engine.stop(timeout=10)


@pytest.fixture
def api() -> Iterator[Api]:
    with serving() as api:
        yield api

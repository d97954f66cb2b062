"""The page's files and the data it draws, without a browser."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import pytest

from jaxllm.async_engine import AsyncEngine
from jaxllm.sampling_params import SamplingParams
from jaxllm.serve.config import ServerConfig
from jaxllm.serve.errors import OverloadedError
from jaxllm.serve.page import CONTENT_SECURITY_POLICY, load_static_files
from jaxllm.serve.page import feed as feed_module
from jaxllm.serve.page.feed import MAX_WATCHERS, LiveFeed, Watcher
from tests.scheduling.test_live_recorder import true_pages
from tests.serve.conftest import serving
from tests.serve.fake_engine import wait_until
from tests.serve.scheduled_engine import ScheduledFakeEngine
from tests.serve.test_server import live_server

FILES = load_static_files()


@pytest.mark.parametrize("path", sorted(FILES))
def test_files(path: str) -> None:
    with serving() as api:
        response = api.get(path)
        assert response.status_code == 200
        assert response.headers["content-security-policy"] == CONTENT_SECURITY_POLICY
        assert "default-src 'none'" in CONTENT_SECURITY_POLICY and "unsafe" not in CONTENT_SECURITY_POLICY
        assert response.headers["x-content-type-options"] == "nosniff"
        kind = {"": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
        assert response.headers["content-type"].startswith(kind[path.rpartition(".")[2].strip("/")])
        again = api.get(path, headers={"if-none-match": response.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        head = api.request("HEAD", path)
        assert (head.status_code, head.headers["content-length"]) == (200, str(len(response.content)))


def test_the_files_name_each_other_and_no_other_host() -> None:
    named = {"/"}
    for path, file in FILES.items():
        text = file.content.decode()
        named |= {"/" + name for name in re.findall(r'(?:href|src)="([^"]+)"', text)}
        named |= {"/page/" + name for name in re.findall(r'from "\./([^"]+)"', text)}
        hosts = set(re.findall(r"(?:https?:)?//[\w.]+", re.sub(r"(?m)^\s*// .*$", "", text)))
        assert hosts <= {"http://www.w3.org"}, path  # the name of SVG
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text
    assert named == set(FILES)
    html = FILES["/"].content.decode()
    assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*src=)", html)


def test_a_page_that_is_not_wanted() -> None:
    with serving(ServerConfig(disable_page=True)) as api:
        for path in (*FILES, "/engine/events"):
            assert api.get(path).status_code == 404
    with serving(ServerConfig(disable_page=True, api_key=("k",))) as api:
        assert api.get("/").status_code == 401


def test_keys_guard_the_data_and_not_the_files() -> None:
    with serving(ServerConfig(api_key=("secret",))) as api:
        assert {api.get(path).status_code for path in FILES} == {200}
        assert api.get("/engine/events").status_code == 401
        assert api.get("/page/other.js").status_code == 401
        assert api.get("/page/../v1/models").status_code == 401


def test_behind_a_prefix() -> None:
    with serving(ServerConfig(root_path="/llm", api_key=("secret",))) as api:
        assert api.get("/llm/").status_code == 200
        assert api.get("/llm/page/app.js").status_code == 200
        assert api.get("/llm/engine/events").status_code == 401


# The feed


def on_an_engine(test: Callable[[ScheduledFakeEngine, AsyncEngine, LiveFeed], Awaitable[None]]) -> None:
    fake = ScheduledFakeEngine()
    engine = AsyncEngine(fake)  # type: ignore[arg-type]

    async def run() -> None:
        await asyncio.wait_for(test(fake, engine, LiveFeed(engine)), 30)

    try:
        asyncio.run(run())
    finally:
        fake.gate.set()
        engine.stop(timeout=10)


class Listener:
    def __init__(self, feed: LiveFeed) -> None:
        self.watcher: Watcher = feed.watch()
        self.stream: AsyncIterator[bytes] = self.watcher.events()
        self.pages: list[int] = []
        self.events: list[Any] = []
        self.kinds: list[str] = []

    async def hear(self) -> str:
        body = await anext(self.stream)
        assert body.startswith(b"data: ") and body.endswith(b"\n\n")
        message = json.loads(body[6:])
        self.kinds.append(message["type"])
        if message["type"] == "snapshot":
            self.pages = [0] * message["limits"]["num_pages"]
            self._change(message["pages"])
        for event in message.get("events", ()):
            self.events.append(event)
            if event[0] != "arrival":
                self._change(event[-1])
        return str(message["type"])

    async def hear_end(self) -> None:
        """Listen until a request has ended."""
        while not any(event[0] == "end" or (event[0] == "result" and event[5]) for event in self.events):
            await self.hear()

    def _change(self, flat: list[int]) -> None:
        for first, count, state in zip(flat[::3], flat[1::3], flat[2::3], strict=True):
            self.pages[first : first + count] = [state] * count


async def generate(engine: AsyncEngine, name: str, max_tokens: int = 20) -> None:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    async for _ in engine.generate("Hello, how is the weather?", params, name):
        pass


def test_watchers_come_and_go() -> None:
    async def test(fake: ScheduledFakeEngine, engine: AsyncEngine, feed: LiveFeed) -> None:
        await generate(engine, "before")
        assert fake.recorders == []
        one = Listener(feed)
        assert await one.hear() == "snapshot"
        assert len(fake.recorders) == 1
        await generate(engine, "a")
        two = Listener(feed)
        assert await two.hear() == "snapshot"
        assert len(fake.recorders) == 1, "all watch one recorder"
        one.watcher.close()
        one.watcher.close()
        assert [kind async for kind in one.stream] == []
        await generate(engine, "b")
        await two.hear_end()
        assert two.pages == await engine.call(lambda e: true_pages(e.scheduler))  # type: ignore[arg-type]
        assert sum(two.pages) > 0, "something is cached"
        await engine.call(lambda e: e.reset_prefix_cache())
        while two.events[-1][0] != "forgotten":
            await two.hear()
        assert sum(two.pages) == 0
        two.watcher.close()
        await engine.call(lambda e: None)
        assert fake.recorders == []
        assert fake.scheduler.pool._touched is None
        # And again.
        three = Listener(feed)
        assert await three.hear() == "snapshot"
        three.watcher.close()

    on_an_engine(test)


def test_one_who_leaves_before_the_engine_answers_leaves_nothing() -> None:
    async def test(fake: ScheduledFakeEngine, engine: AsyncEngine, feed: LiveFeed) -> None:
        fake.gate.clear()
        running = asyncio.create_task(generate(engine, "a"))
        while fake.num_steps == 0:
            await asyncio.sleep(0.01)
        never, early, cancelled = Listener(feed), Listener(feed), Listener(feed)
        never.watcher.close()
        hearing = [asyncio.create_task(listener.hear()) for listener in (early, cancelled)]
        await asyncio.sleep(0.05)
        early.watcher.close()
        hearing[1].cancel()
        await asyncio.gather(hearing[1], return_exceptions=True)
        cancelled.watcher.close()
        fake.gate.set()
        await running
        await hearing[0]
        await engine.call(lambda e: None)
        assert fake.recorders == []
        assert (feed._num_watchers, feed._num_recorded) == (0, 0)

    on_an_engine(test)


def test_one_who_is_slow_gets_a_new_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    make = feed_module.LiveRecorder
    monkeypatch.setattr(feed_module, "LiveRecorder", lambda scheduler: make(scheduler, capacity=16))

    async def test(fake: ScheduledFakeEngine, engine: AsyncEngine, feed: LiveFeed) -> None:
        slow = Listener(feed)
        await slow.hear()
        await generate(engine, "a", max_tokens=100)
        assert await slow.hear() == "snapshot"
        assert slow.pages == await engine.call(lambda e: true_pages(e.scheduler))  # type: ignore[arg-type]
        slow.watcher.close()

    on_an_engine(test)


def test_there_are_only_so_many() -> None:
    async def test(fake: ScheduledFakeEngine, engine: AsyncEngine, feed: LiveFeed) -> None:
        watchers = [feed.watch() for _ in range(MAX_WATCHERS)]
        with pytest.raises(OverloadedError, match=str(MAX_WATCHERS)):
            feed.watch()
        watchers[0].close()
        feed.watch()

    on_an_engine(test)


def test_the_end_of_the_engine_is_told() -> None:
    async def test(fake: ScheduledFakeEngine, engine: AsyncEngine, feed: LiveFeed) -> None:
        one = Listener(feed)
        await one.hear()
        engine.stop(timeout=10)
        while await one.hear() != "stopped":
            pass
        late = Listener(feed)
        assert await late.hear() == "stopped"

    on_an_engine(test)


def test_over_a_socket() -> None:
    fake = ScheduledFakeEngine()
    with live_server(fake, api_key=("secret",)) as live:
        url, key = f"{live.url}/engine/events", {"authorization": "Bearer secret"}
        assert httpx.get(url).status_code == 401
        with httpx.stream("GET", url, headers=key) as response:
            assert response.status_code == 200
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = response.iter_lines()
            assert json.loads(next(lines)[6:])["type"] == "snapshot"
            wait_until(lambda: len(fake.recorders) == 1)
            body = {"prompt": "Hello", "max_tokens": 8}
            assert httpx.post(f"{live.url}/v1/completions", json=body, headers=key).status_code == 200
            message = next(json.loads(line[6:]) for line in lines if line)
            assert message["events"][0][0] == "arrival"
        # The client is gone: so is the recorder.
        wait_until(lambda: not fake.recorders)
        # A watcher does not hold up the end of the server.
        with httpx.stream("GET", url, headers=key) as response:
            lines = response.iter_lines()
            next(lines)
            live.stop()
            assert any('"stopped"' in line for line in lines)

"""However many long prompts come at once, a short one is tokenized as if there were none."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from jaxllm.input_threads import LONG_INPUT, InputThreads
from jaxllm.serve.config import ServerConfig
from tests.serve.conftest import serving


def test_short_inputs_do_not_wait_for_long_ones() -> None:
    gate = threading.Event()

    async def serve() -> None:
        threads = InputThreads()
        try:
            long = [asyncio.create_task(threads.run(lambda: gate.wait(30), LONG_INPUT + i)) for i in range(9)]
            await asyncio.sleep(0)
            short = await asyncio.wait_for(threads.run(lambda: "short", LONG_INPUT - 1), 20)
            assert short == "short" and not any(task.done() for task in long)
            gate.set()
            assert await asyncio.gather(*long) == [True] * 9
        finally:
            gate.set()
            threads.close()

    asyncio.run(serve())


def test_every_route_says_how_long_its_input_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    run = InputThreads.run

    async def noted(threads: InputThreads, call: Callable[[], Any], num_characters: int) -> Any:
        seen.append(num_characters)
        return await run(threads, call, num_characters)

    monkeypatch.setattr(InputThreads, "run", noted)
    text = "ab " * 1000
    user = [{"role": "user", "content": text}]
    with serving(ServerConfig()) as api:
        for path, body in (
            ("/v1/completions", {"prompt": [text, "c"], "max_tokens": 1}),
            ("/v1/chat/completions", {"messages": user, "max_tokens": 1}),
            ("/v1/messages/count_tokens", {"messages": user}),
            ("/tokenize", {"prompt": text}),
        ):
            seen.clear()
            api.post(path, {"model": "fake", **body})
            assert max(seen) >= len(text) - 1, path  # a template may strip a message

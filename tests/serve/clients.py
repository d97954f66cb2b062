"""The official clients, spoken to without a socket."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anthropic
import httpx
import httpx2
import openai

from tests.serve.conftest import Api

T = TypeVar("T")


def with_openai(api: Api, ask: Callable[[openai.AsyncOpenAI], Awaitable[T]], **options: Any) -> T:
    async def run() -> T:
        transport = httpx.ASGITransport(api.app, raise_app_exceptions=False)
        http = httpx.AsyncClient(transport=transport)
        settings = {"api_key": "-", "max_retries": 0, **options}
        async with openai.AsyncOpenAI(base_url="http://test/v1", http_client=http, **settings) as client:
            return await ask(client)

    return asyncio.run(run())


def with_anthropic(api: Api, ask: Callable[[anthropic.AsyncAnthropic], Awaitable[T]], **options: Any) -> T:
    async def run() -> T:
        transport = httpx2.ASGITransport(api.app, raise_app_exceptions=False)
        http = httpx2.AsyncClient(transport=transport)
        settings = {"api_key": "-", "max_retries": 0, "timeout": 60, **options}
        async with anthropic.AsyncAnthropic(base_url="http://test", http_client=http, **settings) as client:
            return await ask(client)

    return asyncio.run(run())

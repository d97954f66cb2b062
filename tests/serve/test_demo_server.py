"""The whole thing, as a newcomer starts it: `python -m jaxllm.serve`, the demo model, the official client."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.serve.fake_engine import wait_until
from tests.serve.test_server import free_port

ROOT = Path(__file__).parent.parent.parent
QUESTION = [{"role": "user", "content": "Who are you?"}]


class DemoServer:
    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        flags = [
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--max-model-len",
            "1k",
            # Few sizes of steps, which are compiled behind its back while it is tested.
            "--max-num-seqs",
            "8",
            "--max-num-batched-tokens",
            "64",
            "--enable-auto-tool-choice",
            "--tool-call-parser",
            "hermes",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "jaxllm.serve", *flags],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.lines: list[str] = []
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def metrics(self) -> dict[str, float]:
        families = text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        values: dict[str, float] = {}
        for sample in samples:
            if not sample.name.endswith("_bucket"):
                values[sample.name] = values.get(sample.name, 0) + sample.value
        return values

    def idle(self) -> bool:
        now = self.metrics()
        return now["jaxllm:num_requests_running"] == now["jaxllm:num_requests_waiting"] == 0


@pytest.fixture(scope="module")
def demo() -> Iterator[DemoServer]:
    server = DemoServer()
    try:
        wait_until(lambda: "curl" in server.output or server.process.poll() is not None, 300)
        assert server.process.poll() is None, server.output
        wait_until(lambda: _answers(server.url), 20)
        yield server
        # Every test left it idle and alive; a signal ends it well.
        assert httpx.get(f"{server.url}/health").status_code == 200
        wait_until(server.idle)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0, server.output
        assert "Traceback" not in server.output
    finally:
        server.process.kill()
        server.process.wait()
        server.reader.join(5)
        assert server.process.stdout is not None
        server.process.stdout.close()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def client(demo: DemoServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(client: openai.OpenAI, **fields: Any) -> Any:
    arguments = {"model": "jaxllm-demo", "messages": QUESTION, "temperature": 0, "max_tokens": 60, **fields}
    return client.chat.completions.create(**arguments)


def test_the_banner_says_that_it_is_a_demo(demo: DemoServer) -> None:
    assert "tiny demo model" in demo.output


@pytest.mark.skipif(shutil.which("curl") is None, reason="the banner's command needs curl")
def test_the_command_of_the_banner_works_as_pasted(demo: DemoServer) -> None:
    match = re.search(r"curl (.*?)\n\s*\n", demo.output + "\n\n", re.S)
    assert match is not None
    command = shlex.split(match[0].replace("\\\n", " "))
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(result.stdout)["choices"][0]["message"]["content"]


def test_it_says_who_it_is(client: openai.OpenAI) -> None:
    answer = ask(client).choices[0]
    assert "demo" in answer.message.content.lower()
    assert answer.finish_reason == "stop"


def test_a_stream_says_the_same(client: openai.OpenAI) -> None:
    whole = ask(client)
    *chunks, last = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == whole.choices[0].message.content
    assert last.usage == whole.usage.model_copy()


def test_seeded_samples_repeat_and_n_differ(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"temperature": 1.5, "n": 4, "seed": 7, "max_tokens": 24}
    first, again = (ask(client, **fields) for _ in range(2))
    said = [choice.message.content for choice in first.choices]
    assert said == [choice.message.content for choice in again.choices]
    assert len(set(said)) > 1


def test_logprobs_of_an_echo_are_those_of_the_generation(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {"model": "jaxllm-demo", "temperature": 0, "logprobs": 2}
    prompt = "jaxllm is"
    written = client.completions.create(
        prompt=prompt, max_tokens=12, extra_body={"return_token_ids": True, "ignore_eos": True}, **fields
    ).choices[0]
    assert written.logprobs is not None
    ids = [*written.prompt_token_ids, *written.token_ids]  # type: ignore[attr-defined]
    scored = client.completions.create(prompt=ids, max_tokens=0, echo=True, **fields).choices[0]
    assert scored.logprobs is not None
    count = len(written.token_ids)  # type: ignore[attr-defined]
    assert scored.logprobs.token_logprobs is not None
    assert scored.logprobs.token_logprobs[-count:] == pytest.approx(written.logprobs.token_logprobs, abs=1e-3)
    assert scored.logprobs.tokens[-count:] == written.logprobs.tokens  # type: ignore[index]


def test_batched_prompts_answer_like_single_ones(client: openai.OpenAI) -> None:
    prompts = ["jaxllm is", "The capital of France", "One, two, three", "Once upon a time"]
    fields: dict[str, Any] = {"model": "jaxllm-demo", "temperature": 0, "max_tokens": 16}
    together = client.completions.create(prompt=prompts, **fields)
    alone = [client.completions.create(prompt=prompt, **fields).choices[0].text for prompt in prompts]
    assert [choice.text for choice in together.choices] == alone


def test_stop_strings(client: openai.OpenAI) -> None:
    whole = ask(client).choices[0].message.content
    stop = whole[len(whole) // 2 : len(whole) // 2 + 4]
    cut = ask(client, stop=[stop]).choices[0]
    assert cut.message.content == whole[: whole.index(stop)]
    assert cut.stop_reason == stop


WEATHER: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Get the weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    }
]


def test_a_tool_is_called_and_its_result_is_told(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    choice = ask(client, messages=messages, tools=WEATHER).choices[0]
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}
    # What the client makes of the message goes back as it is.
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21, "condition": "sunny"}'}
    answer = ask(client, messages=[*messages, choice.message, result], tools=WEATHER).choices[0]
    assert answer.finish_reason == "stop"
    assert "21" in answer.message.content


def test_a_streamed_call_is_the_same(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "messages": [{"role": "user", "content": "What is the weather in Rome?"}],
        "tools": WEATHER,
    }
    whole = ask(client, **fields).choices[0]
    arguments = {"model": "jaxllm-demo", "temperature": 0, "max_tokens": 60, **fields}
    with client.chat.completions.stream(**arguments) as stream:
        events = [event.type for event in stream]
        final = stream.get_final_completion().choices[0]
    # How many there are depends on how far the engine is ahead of the socket.
    assert events.count("tool_calls.function.arguments.delta") >= 1
    assert final.finish_reason == whole.finish_reason == "tool_calls"
    told = [call.function.model_dump() for call in final.message.tool_calls or ()]
    assert [(c["name"], c["arguments"]) for c in told] == [
        (c.function.name, c.function.arguments) for c in whole.message.tool_calls
    ]


def test_a_call_that_must_be_made(client: openai.OpenAI) -> None:
    """At a high temperature the model writes anything; its calls fit their schemas all the same."""
    fields: dict[str, Any] = {"tools": WEATHER, "temperature": 1.5, "seed": 1, "max_tokens": 200}
    forced = ask(client, tool_choice="required", parallel_tool_calls=False, n=4, **fields)
    named = ask(client, tool_choice={"type": "function", "function": {"name": "get_weather"}}, n=4, **fields)
    for choice in (*forced.choices, *named.choices):
        if choice.finish_reason == "length":
            continue
        (call,) = choice.message.tool_calls
        assert call.function.name == "get_weather"
        assert isinstance(json.loads(call.function.arguments)["city"], str)
    assert {choice.finish_reason for choice in forced.choices} <= {"tool_calls", "length"}
    assert {choice.finish_reason for choice in named.choices} <= {"stop", "length"}
    assert any(choice.finish_reason != "length" for choice in (*forced.choices, *named.choices))


def test_a_response_is_gone_on_from_and_held_to_a_schema(client: openai.OpenAI) -> None:
    first = client.responses.create(
        model="jaxllm-demo", input="What is 2 + 3?", temperature=0, max_output_tokens=32
    )
    assert "5" in first.output_text
    schema = {"type": "object", "properties": {"n": {"enum": [3, 5]}}, "required": ["n"]}
    second = client.responses.create(
        model="jaxllm-demo",
        input="As JSON.",
        previous_response_id=first.id,
        text={"format": {"type": "json_schema", "name": "n", "schema": schema}},
        max_output_tokens=64,
    )
    assert json.loads(second.output_text)["n"] in (3, 5)
    assert second.usage is not None
    assert first.usage is not None
    assert second.usage.input_tokens > first.usage.total_tokens - 4


def test_a_message_of_the_other_api_says_the_same(demo: DemoServer, client: openai.OpenAI) -> None:
    expected = ask(client).choices[0].message.content
    with anthropic.Anthropic(base_url=demo.url, api_key="none", max_retries=0, timeout=60) as other:
        body: Any = {"model": "jaxllm-demo", "messages": QUESTION, "max_tokens": 60}
        greedy = {"temperature": 0}
        whole = other.messages.create(**body, extra_body=greedy)
        with other.messages.stream(**body, extra_body=greedy) as stream:
            assert "".join(stream.text_stream) == expected
        assert [block.to_dict()["text"] for block in whole.content] == [expected]


def test_forty_clients_at_once(demo: DemoServer, client: openai.OpenAI) -> None:
    expected = ask(client).choices[0].message.content

    async def one(asynchronous: openai.AsyncOpenAI, stream: bool) -> str:
        arguments: dict[str, Any] = {
            "model": "jaxllm-demo",
            "messages": QUESTION,
            "temperature": 0,
            "max_tokens": 60,
        }
        if not stream:
            return (await asynchronous.chat.completions.create(**arguments)).choices[0].message.content or ""
        chunks = await asynchronous.chat.completions.create(stream=True, **arguments)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="none", timeout=120) as asynchronous:
            return await asyncio.gather(*(one(asynchronous, i % 2 == 0) for i in range(40)))

    assert asyncio.run(main()) == [expected] * 40


def test_a_client_that_leaves_frees_the_engine(demo: DemoServer) -> None:
    body = {"prompt": "Once upon a time", "max_tokens": 900, "ignore_eos": True, "stream": True}
    before = demo.metrics()["jaxllm:generation_tokens_total"]
    with httpx.stream("POST", f"{demo.url}/v1/completions", json=body) as response:
        next(response.iter_lines())
    wait_until(demo.idle)
    assert demo.metrics()["jaxllm:generation_tokens_total"] - before < 900


def test_what_the_engine_refuses_it_survives(client: openai.OpenAI) -> None:
    before = ask(client).choices[0].message.content
    for fields in (
        {"prompt": "word " * 2000},
        {"prompt": [10**6]},
        {"prompt": ""},
        {"prompt": "a", "temperature": 3},
        {"prompt": "a", "max_tokens": 2000},
    ):
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model="jaxllm-demo", **fields)  # type: ignore[call-overload]
    assert ask(client).choices[0].message.content == before


def test_metrics_count(demo: DemoServer, client: openai.OpenAI) -> None:
    before = demo.metrics()
    usage = ask(client).usage
    wait_until(
        lambda: demo.metrics()["jaxllm:request_success_total"] > before["jaxllm:request_success_total"]
    )
    after = demo.metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["jaxllm:prompt_tokens_total"] == usage.prompt_tokens
    assert grown["jaxllm:generation_tokens_total"] == usage.completion_tokens
    assert grown["jaxllm:request_success_total"] == 1
    for name in ("time_to_first_token", "e2e_request_latency", "request_queue_time", "request_decode_time"):
        assert grown[f"jaxllm:{name}_seconds_count"] == 1, name
    assert grown["jaxllm:inter_token_latency_seconds_count"] == usage.completion_tokens - 1


def test_the_engine_is_watched_at_work(demo: DemoServer, client: openai.OpenAI) -> None:
    with httpx.stream("GET", f"{demo.url}/engine/events", timeout=8) as response:
        messages = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: "))
        snapshot = next(messages)
        assert snapshot["type"] == "snapshot" and snapshot["limits"]["max_num_seqs"] == 8
        asked = ask(client).usage
        events: list[Any] = []
        # An overlapped step, which was planned before the end was known, may come after it.
        ends: list[Any] = []
        while not ends:
            events += next(messages)["events"]
            ends = [
                end for event in events for end in {"result": event[-2], "end": [event[-2]]}.get(event[0], ())
            ]
    assert [end[2] for end in ends] == [asked.completion_tokens]
    kinds = [event[0] for event in events]
    assert kinds[0] == "arrival" and kinds.count("plan") >= kinds.count("result") >= asked.completion_tokens

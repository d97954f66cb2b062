"""Anthropic's Messages API, spoken to with the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

from jaxllm.serve.config import ServerConfig
from jaxllm.text.grammar import GrammarMatcher
from tests.serve.clients import with_anthropic
from tests.serve.conftest import Api, serving
from tests.serve.fake_engine import REPLY, demo_tokenizer
from tests.text.transcripts import PARIS, SUM, TOOLS, hermes

PATH = "/v1/messages"
HELLO = [{"role": "user", "content": "Hello"}]
FUNCTIONS = [
    {
        "name": tool["function"]["name"],
        "description": tool["function"].get("description", ""),
        "input_schema": tool["function"].get("parameters", {"type": "object"}),
    }
    for tool in TOOLS
]
PARSING = ServerConfig(
    enable_auto_tool_choice=True, tool_call_parser="hermes", reasoning_parser="qwen3", api_key=("k",)
)
ANSWER = f"<think>\nHm, hm.</think>I look.\n{hermes('get_weather', PARIS)}\n{hermes('add', SUM)}"


@pytest.fixture
def chatty() -> Iterator[Api]:
    with serving(PARSING, max_model_len=1024) as api:
        yield api


def create(api: Api, **fields: Any) -> anthropic.types.Message:
    async def ask(client: anthropic.AsyncAnthropic) -> Any:
        return await client.messages.create(
            **{"model": "fake", "max_tokens": 128, "messages": HELLO, **fields}
        )

    return with_anthropic(api, ask, api_key="k")


def stream(api: Api, **fields: Any) -> tuple[list[Any], anthropic.types.Message]:
    async def ask(client: anthropic.AsyncAnthropic) -> Any:
        body: Any = {"model": "fake", "max_tokens": 128, "messages": HELLO, **fields}
        async with client.messages.stream(**body) as events:
            seen = [event async for event in events]
            return seen, await events.get_final_message()

    return with_anthropic(api, ask, api_key="k")


def prompt_of(api: Api) -> str:
    return str(demo_tokenizer().decode(api.fake.submitted[-1].prompt_token_ids))


def test_a_message(api: Api) -> None:
    message = create(
        api, system=[{"type": "text", "text": "Be brief."}], extra_body={"temperature": 0.5, "top_k": 3}
    )
    assert message.role == "assistant"
    assert [block.to_dict() for block in message.content] == [{"type": "text", "text": REPLY}]
    assert (message.stop_reason, message.stop_sequence) == ("end_turn", None)
    submitted = api.fake.submitted[-1]
    assert message.usage.input_tokens == len(submitted.prompt_token_ids)
    assert message.usage.output_tokens > 1
    assert submitted.sampling_params.temperature == 0.5
    assert submitted.sampling_params.top_k == 3
    assert "Be brief." in prompt_of(api)


def test_why_it_stopped(api: Api) -> None:
    assert create(api, max_tokens=2).stop_reason == "max_tokens"
    message = create(api, stop_sequences=["blue"])
    assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", "blue")
    assert "blue" not in message.content[0].to_dict()["text"]


@pytest.mark.parametrize("fields", [{}, {"tools": FUNCTIONS}])
def test_the_stream_says_what_the_whole_says(chatty: Api, fields: dict[str, Any]) -> None:
    chatty.fake.reply = lambda request: ANSWER
    whole = create(chatty, **fields)
    events, streamed = stream(chatty, **fields)

    def without_ids(message: anthropic.types.Message) -> Any:
        blocks = [{k: v for k, v in block.to_dict().items() if k != "id"} for block in message.content]
        return blocks, message.stop_reason, message.usage.to_dict()

    assert without_ids(streamed) == without_ids(whole)
    raw = [event.type for event in events]
    assert raw[0] == "message_start"
    assert raw[-1] == "message_stop"
    kinds = [block.type for block in whole.content]
    if not fields:
        assert kinds == ["thinking", "text"]
        return
    assert kinds == ["thinking", "text", "tool_use", "tool_use"]
    assert whole.stop_reason == "tool_use"
    uses = [block.to_dict() for block in whole.content[2:]]
    assert [(use["name"], use["input"]) for use in uses] == [("get_weather", PARIS), ("add", SUM)]
    assert raw.count("content_block_start") == raw.count("content_block_stop") == 4


def test_a_conversation_with_tools_is_that_of_a_chat(chatty: Api) -> None:
    use = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": PARIS}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": [{"type": "text", "text": "I look."}, use]},
        {"role": "user", "content": [result, {"type": "text", "text": "And?"}]},
    ]
    create(chatty, messages=messages, tools=FUNCTIONS, system="Obey.")
    prompt = prompt_of(chatty)
    function = {"name": "get_weather", "arguments": json.dumps(PARIS)}
    chat = [
        {"role": "system", "content": "Obey."},
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "rain"},
        {"role": "user", "content": "And?"},
    ]
    tools = [
        {
            "type": "function",
            "function": {"name": f["name"], "description": f["description"], "parameters": f["input_schema"]},
        }
        for f in FUNCTIONS
    ]
    body = {"messages": chat, "tools": tools}
    response = chatty.post("/v1/chat/completions", body, headers={"Authorization": "Bearer k"})
    assert response.status_code == 200, response.text
    assert prompt == prompt_of(chatty)

    async def count(client: anthropic.AsyncAnthropic) -> Any:
        return await client.messages.count_tokens(
            model="fake",
            messages=messages,
            tools=FUNCTIONS,
            system="Obey.",  # type: ignore[arg-type]
        )

    counted = with_anthropic(chatty, count, api_key="k")
    assert counted.input_tokens == len(chatty.fake.submitted[-1].prompt_token_ids)


def test_errors_are_in_the_words_of_this_api(chatty: Api) -> None:
    async def ask(client: anthropic.AsyncAnthropic) -> None:
        body: Any = {"model": "fake", "max_tokens": 9, "messages": HELLO}
        with pytest.raises(anthropic.NotFoundError, match="does not exist"):
            await client.messages.create(**{**body, "model": "other"})
        for wrong in (
            {"max_tokens": 0},
            {"max_tokens": 10**6},
            {"messages": []},
            {"temperature": 1.5},
            {"thinking": {"type": "enabled"}},
            {"thinking": {"type": "adaptive", "budget_tokens": 1024}},
            {"thinking": {"type": "enabled", "budget_tokens": 0}},
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            {"messages": [{"role": "user", "content": [{"type": "tool_use", "name": "x"}]}]},
            {"tools": FUNCTIONS, "tool_choice": {"type": "tool", "name": "nobody"}},
            {"stop_sequences": list("abcde")},
        ):
            with pytest.raises(anthropic.BadRequestError) as caught:
                await client.messages.create(**body, extra_body=wrong)
            error: Any = caught.value.body
            assert error["type"] == "error"
            assert error["error"]["type"] == "invalid_request_error"
            assert f"'{next(iter(wrong))}" in error["error"]["message"] or next(iter(wrong)) in str(error)

    with_anthropic(chatty, ask, api_key="k")

    async def knock(client: anthropic.AsyncAnthropic) -> None:
        with pytest.raises(anthropic.AuthenticationError):
            await client.messages.create(model="fake", max_tokens=9, messages=HELLO)  # type: ignore[arg-type]

    with_anthropic(chatty, knock, api_key="wrong")


def test_thinking_may_be_bounded(chatty: Api, api: Api) -> None:
    create(chatty, thinking={"type": "enabled", "budget_tokens": 2})
    grammar = chatty.fake.submitted[-1].grammar
    assert isinstance(grammar, GrammarMatcher) and grammar.forced is None
    for token in demo_tokenizer().encode("I think", add_special_tokens=False)[:2]:
        assert grammar.accept(token) is None
    assert grammar.forced == demo_tokenizer().encode("</think>", add_special_tokens=False)[0]
    for unbounded in ("adaptive", "disabled"):
        create(chatty, thinking={"type": unbounded})
        assert chatty.fake.submitted[-1].grammar is None
    # Where nobody tells reasoning from the answer.
    with pytest.raises(anthropic.BadRequestError, match="'thinking' is 2: it needs a server with"):
        create(api, thinking={"type": "enabled", "budget_tokens": 2})


def test_the_form_of_the_text_is_the_form_of_the_output(api: Api) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    create(api, extra_body={"output_config": {"format": {"type": "json_schema", "schema": schema}}})
    outputs = api.fake.submitted[-1].sampling_params.structured_outputs
    assert outputs is not None
    assert outputs.json == schema


def test_a_failure_in_mid_stream_is_the_last_event(api: Api) -> None:
    step, calls = api.fake.step, []

    def fails_at_the_fourth() -> Any:
        calls.append(None)
        if len(calls) == 4:
            raise RuntimeError("out of luck")
        return step()

    api.fake.step = fails_at_the_fourth  # type: ignore[method-assign]
    with pytest.raises(anthropic.APIStatusError, match="out of luck"):
        stream(api)

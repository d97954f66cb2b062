"""OpenAI's Responses API, spoken to with the official client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai.types.responses import Response

from jaxllm.serve.config import ServerConfig
from tests.serve.clients import with_openai
from tests.serve.conftest import Api, serving
from tests.serve.fake_engine import REPLY, demo_tokenizer, wait_until
from tests.text.transcripts import PARIS, SUM, TOOLS, hermes

PATH = "/v1/responses"
FUNCTIONS = [{"type": "function", **tool["function"]} for tool in TOOLS]
PARSING = ServerConfig(
    enable_auto_tool_choice=True,
    tool_call_parser="hermes",
    reasoning_parser="qwen3",
    response_store_size=3,
)
THOUGHT = "<think>\nHm, hm.</think>I look.\n"


@pytest.fixture
def chatty() -> Iterator[Api]:
    with serving(PARSING, max_model_len=1024) as api:
        yield api


def create(api: Api, **fields: Any) -> Any:
    async def ask(client: openai.AsyncOpenAI) -> Any:
        return await client.responses.create(**{"model": "fake", "input": "Hello", **fields})

    return with_openai(api, ask)


def stream(api: Api, **fields: Any) -> list[Any]:
    async def ask(client: openai.AsyncOpenAI) -> list[Any]:
        events = await client.responses.create(
            **{"model": "fake", "input": "Hello", "stream": True, **fields}
        )
        return [event async for event in events]

    return with_openai(api, ask)


def without_ids(value: Any) -> Any:
    """What is left of a response once what is new in each is gone."""
    if isinstance(value, dict):
        return {
            k: without_ids(v) for k, v in value.items() if k not in ("id", "item_id", "call_id", "created_at")
        }
    return [without_ids(v) for v in value] if isinstance(value, list) else value


def prompt_of(api: Api) -> str:
    return str(demo_tokenizer().decode(api.fake.submitted[-1].prompt_token_ids))


def test_a_response(api: Api) -> None:
    response = create(api, instructions="Be brief.", max_output_tokens=99, metadata={"a": "b"}, temperature=0)
    assert isinstance(response, Response)
    assert response.output_text == REPLY
    assert response.status == "completed"
    assert response.metadata == {"a": "b"}
    usage = response.usage
    assert usage is not None
    assert usage.input_tokens == len(api.fake.submitted[-1].prompt_token_ids)
    assert usage.output_tokens == len(demo_tokenizer().encode(REPLY, add_special_tokens=False)) + 1
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert "Be brief." in prompt_of(api)
    assert api.fake.submitted[-1].max_tokens == 99


def test_a_response_that_is_cut_is_incomplete(api: Api) -> None:
    response = create(api, max_output_tokens=3)
    assert response.status == "incomplete"
    assert response.incomplete_details.reason == "max_output_tokens"
    assert stream(api, max_output_tokens=3)[-1].type == "response.incomplete"


def test_the_stream_says_what_the_whole_says(chatty: Api) -> None:
    chatty.fake.reply = lambda request: f"{THOUGHT}{hermes('get_weather', PARIS)}\n{hermes('add', SUM)}"
    whole = create(chatty, tools=FUNCTIONS)
    kinds = [item.type for item in whole.output]
    assert kinds == ["reasoning", "message", "function_call", "function_call"]
    assert whole.output[0].content[0].text == "Hm, hm."
    assert whole.output_text == "I look.\n"
    assert [(c.name, json.loads(c.arguments)) for c in whole.output[2:]] == [
        ("get_weather", PARIS),
        ("add", SUM),
    ]
    assert whole.usage.output_tokens_details.reasoning_tokens > 0

    events = stream(chatty, tools=FUNCTIONS)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0].response.output == []
    last = events[-1]
    assert last.type == "response.completed"
    assert without_ids(last.response.to_dict()) == without_ids(whole.to_dict())

    # A client that only adds up what it is told has the same in the end.
    built: list[dict[str, Any]] = []
    for event in events:
        if event.type == "response.output_item.added":
            assert event.output_index == len(built)
            built.append(event.item.to_dict())
        elif event.type == "response.content_part.added":
            built[event.output_index]["content"].append(event.part.to_dict())
        elif event.type in ("response.output_text.delta", "response.reasoning_text.delta"):
            assert event.item_id == built[event.output_index]["id"]
            built[event.output_index]["content"][event.content_index]["text"] += event.delta
        elif event.type == "response.function_call_arguments.delta":
            built[event.output_index]["arguments"] += event.delta
        elif event.type == "response.output_item.done":
            item = event.item.to_dict()
            assert {**built[event.output_index], "status": "completed"} == item
            built[event.output_index] = item
    assert built == last.response.to_dict()["output"]


def test_a_conversation_goes_on_from_a_response(chatty: Api) -> None:
    chatty.fake.reply = lambda request: f"{THOUGHT}{hermes('get_weather', PARIS)}"
    first = create(chatty, tools=FUNCTIONS, instructions="Obey.", input="Weather in Paris?")
    chatty.fake.reply = lambda request: "<think>\nHm.</think>It rains."
    call = first.output[2]
    result = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    second = create(chatty, tools=FUNCTIONS, previous_response_id=first.id, input=[result])
    prompt = prompt_of(chatty)
    assert second.output_text == "It rains."
    assert second.previous_response_id == first.id
    assert prompt.index("Weather in Paris?") < prompt.index("I look.") < prompt.rindex("rain")
    assert "Obey." not in prompt  # Instructions are of one response.
    # The same conversation, told by the client instead of remembered.
    items = [{"role": "user", "content": "Weather in Paris?"}, *(i.to_dict() for i in first.output), result]
    create(chatty, tools=FUNCTIONS, input=items)
    assert prompt_of(chatty) == prompt
    third = create(chatty, previous_response_id=second.id, input="And tomorrow?")
    assert "Weather in Paris?" in prompt_of(chatty).split("It rains.")[0]
    assert third.status == "completed"


def test_the_store_is_bounded_and_forgets_on_demand(chatty: Api) -> None:
    ids = [create(chatty, input=str(i)).id for i in range(4)]

    async def ask(client: openai.AsyncOpenAI) -> tuple[Any, ...]:
        kept = await client.responses.retrieve(ids[3])
        with pytest.raises(openai.BadRequestError, match="stream"):
            await client.responses.retrieve(ids[3], stream=True)
        with pytest.raises(openai.NotFoundError, match="newest 3"):
            await client.responses.retrieve(ids[0])
        await client.responses.delete(ids[3])
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(ids[3])
        unstored = await client.responses.create(model="fake", input="x", store=False)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(unstored.id)
        with pytest.raises(openai.BadRequestError, match="in the background"):
            await client.responses.cancel(ids[2])
        return (kept,)

    (kept,) = with_openai(chatty, ask)
    assert kept.id == ids[3]
    assert kept.status == "completed"


def test_a_background_response_is_fetched_or_cancelled(chatty: Api) -> None:
    chatty.fake.reply = lambda request: f"<think>\nHm.</think>{REPLY}"

    async def ask(client: openai.AsyncOpenAI) -> tuple[Any, ...]:
        chatty.fake.gate.clear()
        first = await client.responses.create(model="fake", input="x", background=True)
        again = await client.responses.retrieve(first.id)
        second = await client.responses.create(model="fake", input="y", background=True)
        cancelled = await client.responses.cancel(second.id)
        with pytest.raises(openai.BadRequestError, match="in progress"):
            await client.responses.create(model="fake", input="z", previous_response_id=first.id)
        chatty.fake.gate.set()
        done = again
        for _ in range(500):
            done = await client.responses.retrieve(first.id)
            if done.status != "in_progress":
                break
            await asyncio.sleep(0.01)
        return first, again, cancelled, done, await client.responses.retrieve(second.id)

    first, again, cancelled, done, still = with_openai(chatty, ask)
    assert first.status == again.status == "in_progress"
    assert again.usage is None
    assert done.status == "completed"
    assert done.output_text == REPLY
    assert cancelled.status == still.status == "cancelled"
    wait_until(lambda: chatty.fake.aborted)


def test_logprobs_come_with_the_text(api: Api) -> None:
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = create(api, **fields).output[0].content[0].logprobs
    assert "".join(entry.token for entry in whole).startswith(REPLY)
    assert {len(entry.top_logprobs) for entry in whole} == {2}
    deltas = [e.logprobs for e in stream(api, **fields) if e.type == "response.output_text.delta"]
    streamed = [entry.to_dict() for entries in deltas for entry in entries]
    assert streamed == [entry.to_dict() for entry in whole][: len(streamed)]
    assert len(whole) - len(streamed) <= 1  # The token that ends the answer says nothing.


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"type": "image_generation_call"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"input": [{"type": "function_call", "name": "f", "arguments": "{}"}]}, "input"),
        ({"max_output_tokens": 100000}, "max_output_tokens"),
        ({"temperature": 7.0}, "temperature"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": FUNCTIONS, "tool_choice": {"type": "function", "name": "nobody"}}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"background": True, "store": False}, "store"),
        ({"text": {"format": {"type": "json_schema"}}}, "text"),
        ({"text": {"format": {"type": "json_schema", "schema": {"type": 5}}}}, "text"),
        ({"stream_options": {}}, "stream_options"),
        ({"conversation": "c"}, "conversation"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(api: Api, fields: dict[str, Any], param: str | None) -> None:
    assert api.refused(PATH, {"input": "x", **fields})["param"] == param


def test_unknown_ids_are_404(api: Api) -> None:
    assert api.refused(PATH, {"input": "x", "previous_response_id": "resp_0"}, 404)["param"]
    assert api.refused(PATH, {"input": "x", "model": "other"}, 404)["param"] == "model"


def test_an_engine_that_fails_ends_the_stream_with_the_reason(api: Api) -> None:
    api.fake.fail = RuntimeError("out of luck")
    response = api.post(PATH, {"input": "x", "stream": True})
    assert response.status_code == 503
    assert "out of luck" in response.json()["error"]["message"]


def test_the_form_of_the_text_is_the_form_of_the_output(api: Api) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    response = create(api, text={"format": form})
    assert response.text.format.to_dict() == form
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
    events = stream(api)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.failed"
    assert last.response.status == "failed"
    assert "out of luck" in last.response.error.message
    assert last.response.output[0].status == "incomplete"

"""Completions and chats through OpenAI's own client: what it knows, and vLLM's fields as its extra body."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from jaxllm.serve.config import ServerConfig
from tests.serve.clients import with_openai
from tests.serve.conftest import Api, serving
from tests.serve.fake_engine import MAX_MODEL_LEN, REPLY, demo_tokenizer
from tests.text.transcripts import TOOLS

HELLO = [{"role": "user", "content": "Hello"}]
OPEN = ServerConfig(trust_request_chat_template=True, enable_request_id_headers=True)


@pytest.fixture
def free_api() -> Iterator[Api]:
    with serving(OPEN, scheduling_policy="priority") as api:
        yield api


def complete(api: Api, **fields: Any) -> Any:
    async def ask(client: openai.AsyncOpenAI) -> Any:
        answer = await client.completions.create(
            **{"model": "fake", "prompt": "Hi", "max_tokens": 64, **fields}
        )
        return [chunk async for chunk in answer] if fields.get("stream") else answer

    return with_openai(api, ask)


def chat(api: Api, **fields: Any) -> Any:
    async def ask(client: openai.AsyncOpenAI) -> Any:
        answer = await client.chat.completions.create(**{"model": "fake", "messages": HELLO, **fields})
        return [chunk async for chunk in answer] if fields.get("stream") else answer

    return with_openai(api, ask)


def ids(text: str) -> list[int]:
    return list(demo_tokenizer().encode(text))


@pytest.mark.parametrize("prompt", [["a b", "c"], [ids("a b"), ids("c")]])
def test_choices_of_several_prompts_are_in_order(api: Api, prompt: Any) -> None:
    api.fake.reply = lambda request: demo_tokenizer().decode(request.prompt_token_ids)
    answer = complete(api, prompt=prompt, n=2, temperature=1.0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == ["a b", "a b", "c", "c"]
    chunks = complete(api, prompt=prompt, n=2, temperature=1.0, stream=True)
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert list(texts.values()) == ["a b", "a b", "c", "c"]


def test_an_echo_alone_scores_the_prompt(api: Api) -> None:
    (choice,) = complete(api, prompt="What is this?", echo=True, max_tokens=0, logprobs=2).choices
    assert choice.text == "What is this?"
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.token_logprobs == [None] + [-1.5] * (len(ids("What is this?")) - 1)
    assert choice.logprobs.text_offset[0] == 0
    assert choice.finish_reason == "length"


def test_usage_as_a_stream_goes(api: Api) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = chat(api, stream=True, stream_options=options)
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert last.choices == []
    assert last.usage.completion_tokens == counts[-1]
    assert last.usage.total_tokens == last.usage.prompt_tokens + last.usage.completion_tokens


def test_fields_of_vllm_in_the_extra_body(free_api: Api) -> None:
    extra: dict[str, Any] = {
        "truncate_prompt_tokens": 2,
        "return_token_ids": True,
        "prompt_logprobs": 1,
        "priority": -3,
        "cache_salt": "salt",
        "request_id": "mine",
        "skip_special_tokens": False,
        "top_k": 7,
        "min_p": 0.1,
    }
    answer = complete(free_api, prompt="one two three four", extra_body=extra)
    submitted = free_api.fake.submitted[-1]
    assert submitted.prompt_token_ids == ids("one two three four")[-2:]
    assert (submitted.terms.priority, submitted.cache_salt) == (-3, "salt")
    params = submitted.sampling_params
    assert (params.top_k, params.min_p, params.skip_special_tokens) == (7, 0.1, False)
    assert answer.id == "cmpl-mine"
    (choice,) = answer.choices
    assert choice.token_ids == submitted.output_token_ids
    assert choice.prompt_token_ids == submitted.prompt_token_ids
    assert choice.prompt_logprobs[0] is None
    assert len(choice.prompt_logprobs) == 2


def test_the_id_of_a_header_comes_back(free_api: Api) -> None:
    async def ask(client: openai.AsyncOpenAI) -> Any:
        raw = await client.chat.completions.with_raw_response.create(
            model="fake",
            messages=HELLO,
            extra_headers={"X-Request-Id": "abc"},  # type: ignore[arg-type]
        )
        return raw.headers["x-request-id"], raw.parse().id

    assert with_openai(free_api, ask) == ("abc", "chatcmpl-abc")


def test_fields_of_templates(free_api: Api) -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% for d in documents or [] %}<{{ d.text }}>{% endfor %}{{ mood }}"
        "{% if add_generation_prompt %}!{% endif %}"
    )
    extra: dict[str, Any] = {
        "chat_template": template,
        "documents": [{"title": "t", "text": "read me"}],
        "chat_template_kwargs": {"mood": "glad"},
    }
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]

    def prompt(messages: Any, **more: Any) -> str:
        chat(free_api, messages=messages, extra_body={**extra, **more})
        return str(demo_tokenizer().decode(free_api.fake.submitted[-1].prompt_token_ids))

    assert prompt([{"role": "user", "content": parts}]) == "[user]a\nb<read me>glad!"
    assert prompt(HELLO, add_generation_prompt=False) == "[user]Hello<read me>glad"
    del extra["documents"], extra["chat_template_kwargs"]
    going_on = [*HELLO, {"role": "assistant", "content": "The sky"}]
    assert prompt(going_on, continue_final_message=True) == "[user]Hello[assistant]The sky"
    begun = ids("[user]Hello!")
    chat(free_api, extra_body={**extra, "add_special_tokens": True})
    assert free_api.fake.submitted[-1].prompt_token_ids == begun


def test_a_chat_with_everything_else(api: Api) -> None:
    answer = chat(api, n=2, temperature=1.0, logprobs=True, top_logprobs=2, max_completion_tokens=4, seed=5)
    for choice in answer.choices:
        assert REPLY.startswith(choice.message.content)
        assert choice.finish_reason == "length"
        assert [len(entry.top_logprobs) for entry in choice.logprobs.content] == [2] * 4
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        chat(api, max_completion_tokens=MAX_MODEL_LEN + 1)


def test_tokens_of_a_chat_with_tools_are_those_it_runs_with(api: Api) -> None:
    chat(api, tools=TOOLS, tool_choice="none")
    body = {"messages": HELLO, "tools": TOOLS}
    assert api.post("/tokenize", body).json()["tokens"] == api.fake.submitted[-1].prompt_token_ids

from __future__ import annotations

from typing import Any

import pytest

from jaxllm.serve.config import ServerConfig
from tests.serve.conftest import Api, serving
from tests.serve.fake_engine import MAX_MODEL_LEN, REPLY, demo_tokenizer

PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hello"}]


def prompt_of(api: Api) -> str:
    return demo_tokenizer().decode(api.fake.submitted[-1].prompt_token_ids)


def test_a_chat(api: Api) -> None:
    body = api.chat()
    assert body["object"] == "chat.completion"
    assert body["id"].startswith("chatcmpl-")
    (choice,) = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": REPLY, "refusal": None}
    assert (choice["finish_reason"], choice["stop_reason"], choice["logprobs"]) == ("stop", None, None)
    expected = demo_tokenizer().apply_chat_template(USER, tokenize=False, add_generation_prompt=True)
    assert prompt_of(api) == expected
    assert body["usage"]["prompt_tokens"] == len(demo_tokenizer().encode(expected, add_special_tokens=False))


def test_without_max_tokens_a_chat_may_fill_the_context(api: Api) -> None:
    usage = api.chat(ignore_eos=True)["usage"]
    assert usage["total_tokens"] == MAX_MODEL_LEN


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_max_tokens(api: Api, name: str) -> None:
    body = api.chat(**{name: 3})
    assert body["usage"]["completion_tokens"] == 3
    assert body["choices"][0]["finish_reason"] == "length"
    assert api.refused(PATH, {"messages": USER, name: MAX_MODEL_LEN})["param"] == name


def test_a_stream_begins_with_the_role_of_every_choice(api: Api) -> None:
    api.fake.reply = lambda request: f"I am number {request.request_id[0]}."
    chunks = api.stream(PATH, {"messages": USER, "n": 3})
    opening = [chunk["choices"][0] for chunk in chunks[:3]]
    assert [choice["index"] for choice in opening] == [0, 1, 2]
    assert all(choice["delta"] == {"role": "assistant", "content": ""} for choice in opening)
    said = {0: "", 1: "", 2: ""}
    reasons = {}
    for chunk in chunks[3:]:
        (choice,) = chunk["choices"]
        assert "role" not in choice["delta"]
        said[choice["index"]] += choice["delta"]["content"]
        if choice["finish_reason"]:
            reasons[choice["index"]] = choice["finish_reason"]
    assert said == {i: f"I am number {i}." for i in range(3)}
    assert reasons == {0: "stop", 1: "stop", 2: "stop"}


def test_usage_of_a_stream(api: Api) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = api.stream(PATH, {"messages": USER, "max_tokens": 4, "stream_options": options})
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(set(counts))
    assert (counts[0], counts[-1]) == (0, 4)
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 4


def test_logprobs(api: Api) -> None:
    choice = api.chat(logprobs=True, top_logprobs=2, max_tokens=3)["choices"][0]
    content = choice["logprobs"]["content"]
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert entry["logprob"] == -1.5
        # The most probable first; the fake engine samples the second best.
        assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.25, -1.5]
        assert entry["top_logprobs"][1]["token"] == entry["token"]


@pytest.mark.parametrize(("fields", "count"), [({}, 0), ({"top_logprobs": 0}, 0), ({"top_logprobs": 1}, 1)])
def test_top_logprobs_are_as_many_as_asked_for(api: Api, fields: dict[str, Any], count: int) -> None:
    content = api.chat(logprobs=True, max_tokens=2, **fields)["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in content] == [count, count]


def test_logprobs_of_a_stream_are_those_of_the_whole(api: Api) -> None:
    fields = {"logprobs": True, "top_logprobs": 3}
    whole = api.chat(**fields)["choices"][0]["logprobs"]["content"]
    chunks = api.stream(PATH, {"messages": USER, **fields})[1:]
    assert [entry for c in chunks for entry in c["choices"][0]["logprobs"]["content"]] == whole


def test_content_parts(api: Api) -> None:
    api.chat([{"type": "text", "text": "Hello"}, {"type": "text", "text": "World"}])
    assert "Hello\nWorld" in prompt_of(api)


def test_continue_final_message(api: Api) -> None:
    messages = [*USER, {"role": "assistant", "content": "The sky"}]
    body = {"messages": messages, "continue_final_message": True}
    assert api.post(PATH, body).status_code == 200
    assert prompt_of(api).endswith("The sky")
    echoed = api.post(PATH, {**body, "echo": True}).json()["choices"][0]["message"]
    assert echoed["content"] == "The sky" + REPLY
    chunks = api.stream(PATH, {**body, "echo": True})
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "The sky" + REPLY


def test_add_generation_prompt_false_goes_on_as_the_last_speaker(api: Api) -> None:
    body = {"messages": USER, "add_generation_prompt": False}
    assert api.post(PATH, body).json()["choices"][0]["message"]["role"] == "user"
    assert "assistant" not in prompt_of(api)


def test_a_template_of_the_operator_and_one_of_the_request() -> None:
    own = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ flavour }}"
    with serving(ServerConfig(chat_template=own, response_role="poet")) as api:
        body = api.chat(chat_template_kwargs={"flavour": "sweet"})
        assert prompt_of(api) == "<user>Hellosweet"
        assert body["choices"][0]["message"]["role"] == "poet"
        error = api.refused(PATH, {"messages": USER, "chat_template": "{{ messages[0].content }}"})
        assert error["param"] == "chat_template"
        assert "--trust-request-chat-template" in error["message"]
    with serving(ServerConfig(trust_request_chat_template=True)) as api:
        api.chat(chat_template="Only: {{ messages[0].content }}")
        assert prompt_of(api) == "Only: Hello"


def test_documents_reach_the_template() -> None:
    own = "{% for d in documents %}[{{ d.title }}]{% endfor %}{{ messages[0].content }}"
    with serving(ServerConfig(chat_template=own)) as api:
        api.chat(documents=[{"title": "A", "text": "a"}, {"title": "B", "text": "b"}])
        assert prompt_of(api) == "[A][B]Hello"


def test_token_ids_and_prompt_logprobs(api: Api) -> None:
    body = api.chat(return_token_ids=True, prompt_logprobs=0, max_tokens=2)
    sent = api.fake.submitted[0]
    assert body["prompt_token_ids"] == sent.prompt_token_ids
    assert body["choices"][0]["token_ids"] == sent.output_token_ids
    assert [p if p is None else list(p) for p in body["prompt_logprobs"]] == [
        None,
        *([str(i)] for i in sent.prompt_token_ids[1:]),
    ]
    first, *chunks = api.stream(PATH, {"messages": USER, "max_tokens": 2, "return_token_ids": True})
    assert first["prompt_token_ids"] == sent.prompt_token_ids
    assert [i for c in chunks for i in c["choices"][0]["token_ids"]] == sent.output_token_ids


def test_cached_tokens_are_reported_where_the_operator_wants_it() -> None:
    with serving(ServerConfig(enable_prompt_tokens_details=True, enable_force_include_usage=True)) as api:
        assert api.chat()["usage"]["prompt_tokens_details"] == {"cached_tokens": 0}
        assert api.stream(PATH, {"messages": USER})[-1]["usage"]["prompt_tokens_details"] == {
            "cached_tokens": 0
        }

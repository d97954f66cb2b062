from __future__ import annotations

from typing import Any

import pytest

from tests.serve.conftest import Api
from tests.serve.fake_engine import MAX_MODEL_LEN, REPLY, demo_tokenizer

PATH = "/v1/completions"


def encode(text: str) -> list[int]:
    return demo_tokenizer().encode(text)


def test_a_completion(api: Api) -> None:
    body = api.complete()
    assert body["object"] == "text_completion"
    assert body["model"] == "fake"
    assert body["id"].startswith("cmpl-")
    (choice,) = body["choices"]
    assert choice == {
        "index": 0,
        "text": REPLY,
        "logprobs": None,
        "finish_reason": "stop",
        "stop_reason": None,
    }
    prompt, completion = len(encode("Hello")), len(encode(REPLY)) + 1
    assert body["usage"] == {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


@pytest.mark.parametrize(
    ("prompt", "count"),
    [
        ("Hello", 1),
        (["Hello", "World", "again"], 3),
        ([1, 2, 3], 1),
        ([[1, 2, 3], [4], [5, 6]], 3),
    ],
)
def test_every_form_of_prompt(api: Api, prompt: Any, count: int) -> None:
    body = api.complete(prompt)
    assert [choice["index"] for choice in body["choices"]] == list(range(count))
    sent = [request.prompt_token_ids for request in api.fake.submitted]
    one_by_one = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    assert sent == [encode(p) if isinstance(p, str) else p for p in one_by_one]
    assert body["usage"]["prompt_tokens"] == sum(map(len, sent))


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_numbered_over_prompts_and_n(api: Api, stream: bool) -> None:
    api.fake.reply = lambda request: f"I am {request.request_id[0]} of {request.prompt_token_ids}."
    body = {"prompt": [[1], [2]], "n": 3, "max_tokens": 64}
    expected = {p * 3 + i: f"I am {i} of [{p + 1}]." for p in range(2) for i in range(3)}
    if stream:
        said: dict[int, str] = {}
        for chunk in api.stream(PATH, body):
            (choice,) = chunk["choices"]
            said[choice["index"]] = said.get(choice["index"], "") + choice["text"]
    else:
        said = {c["index"]: c["text"] for c in api.complete(**body)["choices"]}
        assert list(said) == list(range(6))
    assert said == expected


def test_a_stream_says_the_same_as_the_whole(api: Api) -> None:
    api.fake.step_time = 0.005
    chunks = api.stream(PATH, {"prompt": "Hello", "max_tokens": 64})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == REPLY
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks][:-1] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    assert len(chunks) > 3


def test_usage_of_a_stream(api: Api) -> None:
    body = {"prompt": "Hello", "max_tokens": 5, "stream_options": {"include_usage": True}}
    *chunks, last = api.stream(PATH, body)
    assert all("usage" not in chunk for chunk in chunks)
    assert last["choices"] == []
    prompt = len(encode("Hello"))
    assert last["usage"] == {"prompt_tokens": prompt, "completion_tokens": 5, "total_tokens": prompt + 5}

    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = api.stream(PATH, body)
    # A step or two may share a chunk where the machine is busy.
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(set(counts))
    assert 1 <= counts[0] <= counts[-1] == 5
    assert last["usage"]["completion_tokens"] == 5


@pytest.mark.parametrize("prompt", ["Say it", [1, 2, 3]])
@pytest.mark.parametrize("stream", [False, True])
def test_echo(api: Api, prompt: Any, stream: bool) -> None:
    body = {"prompt": prompt, "max_tokens": 64, "echo": True}
    if stream:
        said = "".join(chunk["choices"][0]["text"] for chunk in api.stream(PATH, body))
    else:
        said = api.complete(**body)["choices"][0]["text"]
    text = prompt if isinstance(prompt, str) else demo_tokenizer().decode(prompt)
    assert said == text + REPLY


@pytest.mark.parametrize("stream", [False, True])
def test_echo_alone_with_logprobs(api: Api, stream: bool) -> None:
    ids = encode("Score this text")
    body = {"prompt": "Score this text", "max_tokens": 0, "echo": True, "logprobs": 2}
    if stream:
        body["stream_options"] = {"include_usage": True}
        chunk, last = api.stream(PATH, body)
        choice, usage = chunk["choices"][0], last["usage"]
    else:
        answer = api.complete(**body)
        choice, usage = answer["choices"][0], answer["usage"]
    assert choice["text"] == "Score this text"
    assert choice["finish_reason"] == "length"
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == "Score this text"
    assert logprobs["token_logprobs"] == [None] + [-1.5] * (len(ids) - 1)
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["text_offset"] == [
        len("".join(logprobs["tokens"][:i])) for i in range(len(logprobs["tokens"]))
    ]
    assert usage["completion_tokens"] == 0


@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_of_a_stream_are_those_of_the_whole(api: Api, echo: bool) -> None:
    body = {"prompt": "Hello", "max_tokens": 64, "logprobs": 3, "echo": echo}
    whole = api.complete(**body)["choices"][0]
    pieces = [c["choices"][0]["logprobs"] for c in api.stream(PATH, body)]
    for key, values in whole["logprobs"].items():
        assert [value for piece in pieces for value in piece[key]] == values
    assert whole["logprobs"]["text_offset"][0] == 0
    assert all(set(top) >= {token} for top, token in _tops(whole["logprobs"]))


def _tops(logprobs: dict[str, Any]) -> list[tuple[dict[str, float], str]]:
    pairs = zip(logprobs["top_logprobs"], logprobs["tokens"], strict=True)
    return [(top, token) for top, token in pairs if top is not None]


def test_impossible_tokens_are_json(api: Api) -> None:
    top = api.complete(logprobs=5, max_tokens=1)["choices"][0]["logprobs"]["top_logprobs"][0]
    assert min(top.values()) == -9999.0


def test_logprobs_0_gives_the_token_itself(api: Api) -> None:
    logprobs = api.complete(logprobs=0, max_tokens=2)["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == [-1.5, -1.5]
    assert [list(top) for top in logprobs["top_logprobs"]] == [[token] for token in logprobs["tokens"]]


def test_tokens_as_ids(api: Api) -> None:
    choice = api.complete(logprobs=1, max_tokens=3, return_tokens_as_token_ids=True, return_token_ids=True)[
        "choices"
    ][0]
    assert choice["token_ids"] == encode(REPLY)[:3]
    assert choice["prompt_token_ids"] == encode("Hello")
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]


def test_prompt_logprobs(api: Api) -> None:
    choice = api.complete([5, 6, 7], prompt_logprobs=1)["choices"][0]
    first, second, third = choice["prompt_logprobs"]
    assert first is None
    assert second["6"]["logprob"] == -1.5
    assert second["6"]["rank"] == 2
    assert isinstance(third["7"]["decoded_token"], str)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(api: Api, stream: bool) -> None:
    body = {"prompt": "Hello", "max_tokens": 64, "stop": ["and so", "never"]}
    if stream:
        chunks = api.stream(PATH, body)
        said = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        last = chunks[-1]["choices"][0]
    else:
        last = api.complete(**body)["choices"][0]
        said = last["text"]
    assert said == REPLY[: REPLY.index("and so")]
    assert (last["finish_reason"], last["stop_reason"]) == ("stop", "and so")


def test_stop_token_ids_give_the_id_as_reason(api: Api) -> None:
    stop = encode(REPLY)[3]
    choice = api.complete(stop_token_ids=[stop])["choices"][0]
    assert choice["stop_reason"] == stop


def test_sampling_fields_reach_the_engine(api: Api) -> None:
    fields: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 7,
        "min_p": 0.25,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.5,
        "seed": 42,
        "stop": ["zzz"],
        "stop_token_ids": [9],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 2,
        "max_tokens": 5,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "allowed_token_ids": [1, 2, 3],
        "bad_words": ["bad"],
        "logprobs": 3,
        "prompt_logprobs": 2,
        "skip_reading_prefix_cache": True,
    }
    api.complete(
        **fields,
        logit_bias={"3": -50, "4": 2.5},
        repetition_detection={"max_pattern_size": 3},
        cache_salt="s",
    )
    request = api.fake.submitted[0]
    params = request.sampling_params
    assert {name: getattr(params, name) for name in fields} == fields
    assert params.logit_bias == {3: -50.0, 4: 2.5}
    assert params.repetition_detection is not None
    assert params.repetition_detection.max_pattern_size == 3
    assert request.cache_salt == "s"


def test_defaults_of_the_generation_config_yield_to_the_request(api: Api) -> None:
    api.fake.input_processor.default_sampling_params = {"temperature": 0.25, "top_k": 3}
    api.complete()
    api.complete(temperature=0.5)
    first, second = (request.sampling_params for request in api.fake.submitted)
    assert (first.temperature, first.top_k, first.top_p) == (0.25, 3, 1.0)
    assert (second.temperature, second.top_k) == (0.5, 3)


def test_max_tokens(api: Api) -> None:
    prompt = list(range(1, MAX_MODEL_LEN - 3))
    room = MAX_MODEL_LEN - len(prompt)
    assert api.complete(prompt, max_tokens=room, ignore_eos=True)["usage"]["completion_tokens"] == room
    assert api.complete(prompt, max_tokens=None, ignore_eos=True)["usage"]["completion_tokens"] == room
    # The default of 16 gives way to the room that is left; what is asked for does not.
    response = api.post(PATH, {"prompt": prompt, "ignore_eos": True})
    assert response.json()["usage"]["completion_tokens"] == room
    error = api.refused(PATH, {"prompt": prompt, "max_tokens": room + 1})
    assert error["param"] == "max_tokens"
    assert f"maximum context length is {MAX_MODEL_LEN}" in error["message"]


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"truncate_prompt_tokens": 3}, [8, 9, 10]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "left"}, [8, 9, 10]),
        ({"truncate_prompt_tokens": 3, "truncation_side": "right"}, [1, 2, 3]),
        ({"truncate_prompt_tokens": 100}, list(range(1, 11))),
        ({"truncate_prompt_tokens": -1, "max_tokens": MAX_MODEL_LEN - 4}, [7, 8, 9, 10]),
    ],
)
def test_truncation(api: Api, fields: dict[str, Any], kept: list[int]) -> None:
    body = api.complete(list(range(1, 11)), echo=True, **fields)
    assert api.fake.submitted[0].prompt_token_ids == kept
    assert body["choices"][0]["text"].startswith(demo_tokenizer().decode(kept))
    assert body["usage"]["prompt_tokens"] == len(kept)


def test_truncation_of_a_text(api: Api) -> None:
    text = "one two three four five six seven eight"
    api.complete(text, truncate_prompt_tokens=2)
    assert api.fake.submitted[0].prompt_token_ids == encode(text)[-2:]


def test_request_ids_of_the_client(api: Api) -> None:
    assert api.complete(request_id="mine")["id"] == "cmpl-mine"
    response = api.post(PATH, {"prompt": "Hello"}, headers={"X-Request-Id": "from-header"})
    assert response.json()["id"] == "cmpl-from-header"
    # Two clients may choose the same one at the same time.
    assert len({request.request_id for request in api.fake.submitted}) == 2


def test_an_alias_of_the_model(api: Api) -> None:
    assert api.complete(model="alias")["model"] == "fake"


def test_token_texts_in_a_stream_add_up_also_where_characters_span_tokens(api: Api) -> None:
    api.fake.reply = lambda request: "Grüße 🎉 日本語"
    chunks = api.stream(PATH, {"prompt": "Hello", "max_tokens": 64})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Grüße 🎉 日本語"
    assert all(chunk["choices"][0]["text"] or chunk["choices"][0]["finish_reason"] for chunk in chunks)

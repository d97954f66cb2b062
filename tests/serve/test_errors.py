"""Every way for a request to be wrong: the status, the field that is blamed, and a server that serves on."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxllm.errors import InvalidRequestError
from jaxllm.request import SchedulingTerms
from jaxllm.serve.config import ServerConfig
from jaxllm.serve.protocol import _UNSUPPORTED, ChatCompletionRequest, CompletionRequest
from tests.serve.conftest import Api, events_of, serving
from tests.serve.fake_engine import MAX_MODEL_LEN, REPLY, wait_until

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hello"}]

BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"temperature": -1}, "temperature"),
    ({"temperature": 2.5}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": "0.5"}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.5}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"n": 0}, "n"),
    ({"n": 20000}, "n"),
    ({"n": 2, "temperature": 0}, "n"),
    ({"n": True}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": -5}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": MAX_MODEL_LEN + 1}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
    ({"presence_penalty": 3}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**70}, "seed"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop_token_ids": [10**9]}, "stop_token_ids"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids"),
    ({"logit_bias": {"1": 101}}, "logit_bias"),
    ({"logit_bias": {"word": 1}}, "logit_bias"),
    ({"logit_bias": {"999999999": 1}}, "logit_bias"),
    ({"allowed_token_ids": []}, "allowed_token_ids"),
    ({"allowed_token_ids": [10**9]}, "allowed_token_ids"),
    ({"bad_words": [""]}, "bad_words"),
    ({"prompt_logprobs": 21}, "prompt_logprobs"),
    ({"prompt_logprobs": -2}, "prompt_logprobs"),
    ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options"),
    ({"stream": True, "stream_options": {"usage": True}}, "stream_options"),
    ({"ignore_eos": "no"}, "ignore_eos"),
    ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
    ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ({"truncation_side": "left"}, "truncation_side"),
    ({"truncation_side": "middle", "truncate_prompt_tokens": 3}, "truncation_side"),
    ({"priority": 1}, "priority"),
    ({"priority": 2**64}, "priority"),
    ({"request_id": ""}, "request_id"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"repetition_detection": {"max_pattern_size": 3, "min_count": 1}}, "repetition_detection"),
    ({"user": 5}, "user"),
]


@pytest.fixture(scope="module")
def shared() -> Any:
    with serving() as api:
        yield api
        # Whatever was refused, the server serves on and holds nothing.
        assert api.complete()["choices"][0]["text"] == REPLY
        wait_until(lambda: not api.fake.has_unfinished_requests())


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("fields", "param"), BAD_FIELDS, ids=lambda value: str(value)[:50])
def test_a_bad_field_is_blamed_by_name(shared: Api, path: str, fields: dict[str, Any], param: str) -> None:
    body = {"prompt": "Hello"} if path == COMPLETIONS else {"messages": USER}
    before = len(shared.fake.submitted)
    error = shared.refused(path, {**body, **fields})
    assert error["param"].split(".")[0] == param
    assert error["type"] == "BadRequestError"
    assert param in error["message"]
    assert len(shared.fake.submitted) == before


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["good", ""]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1, -1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [10**9]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [[[1]]]}, "prompt"),
        ({"prompt": [1] * MAX_MODEL_LEN}, "prompt"),
        ({"prompt": "word " * MAX_MODEL_LEN}, "prompt"),
        ({"prompt": "Hello", "logprobs": 21}, "logprobs"),
        ({"prompt": "Hello", "logprobs": True}, "logprobs"),
        ({"prompt": "Hello", "echo": "yes"}, "echo"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_bad_completions(shared: Api, body: dict[str, Any], param: str) -> None:
    before = len(shared.fake.submitted)
    assert shared.refused(COMPLETIONS, body)["param"] == param
    assert len(shared.fake.submitted) == before


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": ["Hello"]}, "messages"),
        ({"messages": [{"content": "Hello"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "word " * MAX_MODEL_LEN}]}, "messages"),
        (
            {"messages": USER, "add_generation_prompt": True, "continue_final_message": True},
            "add_generation_prompt",
        ),
        ({"messages": USER, "logprobs": 5}, "logprobs"),
        ({"messages": USER, "top_logprobs": 5}, "top_logprobs"),
        ({"messages": USER, "logprobs": True, "top_logprobs": 21}, "logprobs"),
        ({"messages": USER, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"messages": USER, "documents": "a"}, "documents"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_bad_chats(shared: Api, body: dict[str, Any], param: str) -> None:
    assert shared.refused(CHAT, body)["param"] == param


def test_images_are_refused(shared: Api) -> None:
    content = [{"type": "image_url", "image_url": {"url": "data:"}}]
    error = shared.refused(CHAT, {"messages": [{"role": "user", "content": content}]})
    assert "image_url" in error["message"] and error["param"] == "messages[0].content[0]"


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize("name", sorted(_UNSUPPORTED))
def test_what_is_not_served_is_refused_by_name_unless_it_asks_for_nothing(
    shared: Api, path: str, name: str
) -> None:
    body = {"prompt": "Hello"} if path == COMPLETIONS else {"messages": USER}
    if path == CHAT and name in ChatCompletionRequest.model_fields:
        return  # Refused in completions alone.
    error = shared.refused(path, {**body, name: {"some": "value"}})
    assert error["param"] == name
    assert f"'{name}' is not supported" in error["message"]
    for neutral in (None, *_UNSUPPORTED[name][0]):
        assert shared.post(path, {**body, name: neutral}).status_code == 200


def test_neutral_means_the_same_type_too(shared: Api) -> None:
    # 1 == True in Python, not in JSON.
    assert shared.refused(COMPLETIONS, {"prompt": "a", "best_of": True})["param"] == "best_of"
    assert shared.refused(COMPLETIONS, {"prompt": "a", "use_beam_search": 0})["param"] == "use_beam_search"


def test_every_unsupported_name_is_really_unknown_to_the_models() -> None:
    for name, (_, why) in _UNSUPPORTED.items():
        assert name not in CompletionRequest.model_fields
        assert (name in ChatCompletionRequest.model_fields) == ("chats" in why)


def test_an_unknown_field_comes_with_a_suggestion(shared: Api) -> None:
    error = shared.refused(COMPLETIONS, {"prompt": "Hello", "temprature": 1})
    assert error["param"] == "temprature"
    assert "Did you mean 'temperature'?" in error["message"]
    assert shared.refused(CHAT, {"messages": USER, "prompt": "x"})["param"] == "prompt"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[1, 2]",
        b'"text"',
        b"null",
        b"\xff\xfe",
        b'{"prompt": "a"',
        b'{"prompt": NaN}',
        b"[" * 100_000,
    ],
    ids=lambda content: repr(content)[:30],
)
def test_bodies_that_are_no_objects(shared: Api, content: bytes) -> None:
    response = shared.request(
        "POST", COMPLETIONS, content=content, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["message"]


@pytest.mark.parametrize("media_type", ["text/plain", "application/x-www-form-urlencoded", None])
def test_bodies_that_say_to_be_something_else(shared: Api, media_type: str | None) -> None:
    """Which is what curl does, unless it is told."""
    headers = {} if media_type is None else {"content-type": f"{media_type}; charset=utf-8"}
    for path in (COMPLETIONS, "/v1/messages", "/tokenize"):
        response = shared.request("POST", path, content=b'{"prompt": "a"}', headers=headers)
        assert response.status_code == 415
        message = response.json()["error"]["message"]
        assert "application/json" in message and (media_type or "missing") in message
    vendors = {"content-type": "application/vnd.example+json"}
    assert shared.request("POST", COMPLETIONS, content=b'{"prompt": "a"}', headers=vendors).status_code == 200


def test_not_a_number_is_no_number(shared: Api) -> None:
    for value in ("NaN", "Infinity", "-Infinity", "1e999"):
        response = shared.request(
            "POST",
            COMPLETIONS,
            content=f'{{"prompt": "a", "temperature": {value}}}',
            headers={"content-type": "application/json"},
        )
        assert response.status_code == 400
        assert "not valid JSON" in response.json()["error"]["message"]


def test_an_unknown_model(shared: Api) -> None:
    for path, body in (
        (COMPLETIONS, {"prompt": "a"}),
        (CHAT, {"messages": USER}),
        ("/tokenize", {"prompt": "a"}),
    ):
        error = shared.refused(path, {**body, "model": "gpt-99"}, status=404)
        assert (error["type"], error["param"]) == ("NotFoundError", "model")
        assert "gpt-99" in error["message"]


def test_unknown_routes_and_methods(shared: Api) -> None:
    for method, path, status in (
        ("GET", "/v2/none", 404),
        ("GET", COMPLETIONS, 405),
        ("POST", "/v1/models", 405),
    ):
        response = shared.request(method, path)
        assert response.status_code == status
        assert response.json()["error"]["code"] == status


def test_one_bad_prompt_of_many_submits_none(api: Api) -> None:
    error = api.refused(COMPLETIONS, {"prompt": ["good", "word " * MAX_MODEL_LEN, "fine"]})
    assert error["param"] == "prompt"
    assert api.fake.submitted == []


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_the_scheduler_refuses(api: Api, stream: bool) -> None:
    api.fake.refuse_submit = InvalidRequestError("needs more pages than there are")
    assert "more pages" in api.refused(COMPLETIONS, {"prompt": "a", "stream": stream})["message"]
    api.fake.refuse_submit = None
    assert api.complete()["choices"][0]["text"] == REPLY


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_the_engine_gives_up(api: Api, stream: bool) -> None:
    def step() -> list[Any]:
        return api.fake._outputs.fail(api.fake.submitted, "out of pages")

    api.fake.step = step  # type: ignore[method-assign]
    response = api.post(COMPLETIONS, {"prompt": "a", "stream": stream})
    api.fake._running.clear()
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "out of pages"
    assert response.json()["error"]["type"] == "InternalServerError"


def test_an_error_in_mid_stream_is_an_event_and_then_done(api: Api) -> None:
    step, calls = api.fake.step, 0

    def failing_step() -> list[Any]:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise MemoryError("no more memory")
        return step()

    api.fake.step_time = 0.05
    api.fake.step = failing_step  # type: ignore[method-assign]
    response = api.post(COMPLETIONS, {"prompt": "Hello", "max_tokens": 64, "stream": True})
    assert response.status_code == 200
    *chunks, last = events_of(response.text)
    assert chunks
    assert all("choices" in chunk for chunk in chunks)
    assert last["error"]["code"] == 503
    assert "no more memory" in last["error"]["message"]


def test_a_dead_engine(api: Api) -> None:
    assert api.get("/health").status_code == 200
    api.fake.fail = MemoryError("no more memory")
    for stream in (False, True):
        error = api.refused(COMPLETIONS, {"prompt": "a", "stream": stream}, status=503)
        assert error["type"] == "ServiceUnavailable"
    for path in ("/health", "/ping"):
        response = api.get(path)
        assert response.status_code == 503
        assert "no more memory" in response.json()["error"]["message"]
    # What needs no engine still answers.
    assert api.get("/v1/models").status_code == 200
    assert api.get("/metrics").status_code == 200


def test_a_bug_of_ours_is_a_500_that_tells_no_secrets(api: Api) -> None:
    def process(*_: Any, **__: Any) -> Any:
        raise RuntimeError("the password is hunter2")

    api.fake.input_processor.process = process  # type: ignore[method-assign]
    error = api.refused(COMPLETIONS, {"prompt": "a"}, status=500)
    assert "hunter2" not in json.dumps(error)


def test_without_a_tokenizer_token_ids_still_work() -> None:
    with serving(skip_tokenizer_init=True) as api:
        choice = api.complete([1, 2, 3], return_token_ids=True)["choices"][0]
        assert choice["text"] == ""
        assert len(choice["token_ids"]) > 1
        logprobs = api.complete([1, 2, 3], logprobs=1, max_tokens=1)["choices"][0]["logprobs"]
        assert logprobs["tokens"][0].startswith("token_id:")
        for path, body in (
            (COMPLETIONS, {"prompt": "a"}),
            (CHAT, {"messages": USER}),
            ("/tokenize", {"prompt": "a"}),
        ):
            assert "okenizer" in api.refused(path, body)["message"]


def test_priority_is_taken_where_something_looks_at_it() -> None:
    with serving(scheduling_policy="priority") as api:
        api.complete(priority=-7)
        assert api.fake.submitted[0].terms == SchedulingTerms(priority=-7)


def test_terms_are_taken_where_the_policy_goes_by_them() -> None:
    with serving(scheduling_policy="edf") as api:
        api.complete(ttft_objective=0.5, tpot_objective=0.05)
        assert api.fake.submitted[0].terms == SchedulingTerms(ttft_objective=0.5, tpot_objective=0.05)
        message = api.refused(COMPLETIONS, {"prompt": "a", "tenant": "b"})["message"]
        assert "tenant='b' has no effect under the scheduling policy 'edf'" in message
    with serving(scheduling_policy="vtc", scheduling_config={"output_weight": 3}) as api:
        api.complete(tenant="b")
        assert api.fake.submitted[0].terms == SchedulingTerms(tenant="b")


def test_while_draining_new_work_is_refused(api: Api) -> None:
    api.engine.start_draining()
    for path, body in ((COMPLETIONS, {"prompt": "a"}), (CHAT, {"messages": USER})):
        assert api.refused(path, body, status=503)["type"] == "ServiceUnavailable"
    assert api.get("/health").status_code == 503
    assert api.get("/metrics").status_code == 200


def test_api_keys() -> None:
    with serving(ServerConfig(api_key=("secret", "other"))) as api:
        for header in (
            None,
            "Bearer wrong",
            "Bearer",
            "secret",
            "Basic secret",
            "Bearer sécret",
            "Bearer secret2",
        ):
            headers = {} if header is None else {"Authorization": header.encode()}
            response = api.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["code"] == 401
            assert response.headers["www-authenticate"] == "Bearer"
        for key in ("secret", "other"):
            assert api.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200
        assert api.post(COMPLETIONS, {"prompt": "a"}).status_code == 401
        assert api.fake.submitted == []
        for path in ("/health", "/ping"):
            assert api.get(path).status_code == 200
        for path in ("/metrics", "/version", "/docs", "/openapi.json", "/load", "/no such", "/healthy"):
            assert api.get(path).status_code == 401, path
        assert api.post("/tokenize", {"prompt": "a"}).status_code == 401
        assert api.get("/metrics", headers={"Authorization": "Bearer other"}).status_code == 200


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.dictionaries(
        st.sampled_from(
            sorted({*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields, *_UNSUPPORTED})
        ),
        JSON,
        max_size=4,
    ),
    path=st.sampled_from([COMPLETIONS, CHAT]),
)
def test_no_body_is_an_internal_error(shared: Api, fields: dict[str, Any], path: str) -> None:
    base = {"prompt": "a"} if path == COMPLETIONS else {"messages": USER}
    response = shared.post(path, {**base, "max_tokens": 2, **fields})
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        assert response.json()["error"]["message"]

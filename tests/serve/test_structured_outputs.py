"""Forms over HTTP: every field that asks for one, through the official client, and what is refused."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from jaxllm.async_engine import AsyncEngine
from jaxllm.config import EngineConfig
from jaxllm.engine import Engine
from jaxllm.sampling_params import SamplingParams
from jaxllm.serve.config import ServerConfig
from jaxllm.serve.protocol import ChatCompletionRequest, CompletionRequest
from jaxllm.structured_outputs import StructuredOutputsParams
from jaxllm.text.grammar import GrammarCompiler
from tests.serve.conftest import Api, serving

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string", "maxLength": 12}, "sure": {"type": "boolean"}},
    "required": ["answer", "sure"],
    "additionalProperties": False,
}


class Place(BaseModel):
    name: str = Field(max_length=10)
    kind: Literal["city", "river"]
    size: int | None = Field(ge=0, le=99)


@pytest.fixture(scope="module")
def demo() -> Iterator[Api]:
    """The demo model behind the routes, without a socket."""
    config = EngineConfig(
        max_model_len=1024, max_num_seqs=2, max_num_batched_tokens=16, disable_log_stats=True
    )
    engine = AsyncEngine(Engine.from_config(config))
    try:
        yield Api(engine.engine, engine, ServerConfig())  # type: ignore[arg-type]
    finally:
        engine.stop(timeout=30)


@pytest.fixture(scope="module")
def client(demo: Api) -> openai.AsyncOpenAI:
    transport = httpx.ASGITransport(demo.app)
    return openai.AsyncOpenAI(
        base_url="http://test/v1", api_key="none", http_client=httpx.AsyncClient(transport=transport)
    )


def run(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


# What the client library makes of it


def test_pydantic_models_parse(client: openai.AsyncOpenAI) -> None:
    async def ask() -> Any:
        return await client.chat.completions.parse(
            model="fake", messages=QUESTION, response_format=Place, max_tokens=300, seed=3, temperature=1, n=2
        )

    for choice in run(ask()).choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Place)


def test_streamed_json_is_whole_at_the_end(client: openai.AsyncOpenAI) -> None:
    async def ask() -> list[str]:
        stream = await client.chat.completions.create(
            model="fake",
            messages=QUESTION,
            response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
            max_tokens=300,
            seed=1,
            stream=True,
            extra_body={"min_tokens": 3},
        )
        return [c.choices[0].delta.content or "" async for c in stream]

    pieces = run(ask())
    assert len(pieces) > 3
    jsonschema.validate(json.loads("".join(pieces)), SCHEMA)


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"regex": "[xyz]{7}"}}, "[xyz]{7}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'start: "<" /[ab]/{3} ">"'}}, "<[ab]{3}>"),
        ({"structured_outputs": {"json": {"const": [1, 2]}, "disable_any_whitespace": True}}, r"\[1,2\]"),
        (
            {"structured_outputs": {"json": {"const": [1, 2]}, "whitespace_pattern": "_"}},
            r"_?\[_?1_?,_?2_?\]_?",
        ),
        ({"guided_regex": "a{3}"}, "aaa"),
        ({"guided_choice": ["one"], "guided_decoding_backend": "auto"}, "one"),
        ({"guided_grammar": 'root ::= "b" | "c"\n'}, "b|c"),
        ({"guided_json": '{"const": 5}'}, "5"),
        ({"guided_json": {"const": []}, "guided_whitespace_pattern": "_"}, r"\[_?\]"),
        ({"response_format": {"type": "text"}, "guided_regex": "[01]{2}"}, "[01]{2}"),
        (
            {
                "response_format": {
                    "type": "structural_tag",
                    "format": {"type": "regex", "pattern": "[01]{2}"},
                }
            },
            "[01]{2}",
        ),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"const": 7}},
                }
            },
            "7",
        ),
    ],
    ids=str,
)
def test_every_field_in_both_routes(demo: Api, fields: dict[str, Any], pattern: str) -> None:
    completed = demo.complete("The capital of", **fields)["choices"][0]
    assert re.fullmatch(pattern, completed["text"]) and completed["finish_reason"] == "stop"
    answered = demo.chat(QUESTION[0]["content"], max_tokens=64, **fields)["choices"][0]
    assert re.fullmatch(pattern, answered["message"]["content"])


def test_any_object(demo: Api) -> None:
    choice = demo.chat(response_format={"type": "json_object"}, max_tokens=600, seed=2)["choices"][0]
    assert choice["finish_reason"] == "length" or isinstance(json.loads(choice["message"]["content"]), dict)


# What is refused, and how


def field(kind: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": kind}}}


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        (
            field({"properties": {"a": {"type": "strin"}}}),
            "response_format",
            "at /properties/a: Invalid type",
        ),
        (field({"uniqueItems": True}), "response_format", "uniqueItems"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "required"),
        ({"response_format": {"type": "yaml"}}, "response_format", "yaml"),
        ({"response_format": {"type": "structural_tag"}}, "response_format", "either 'format', or"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "structured_outputs", "json and regex"),
        (
            {"structured_outputs": {"regexp": "a"}},
            "structured_outputs",
            r"Unknown field 'structured_outputs\.regexp'",
        ),
        ({"structured_outputs": {"regex": "a("}}, "structured_outputs", "unclosed group"),
        ({"guided_regex": "a("}, "guided_regex", "unclosed group"),
        ({"guided_choice": []}, "guided_choice", "at least one string"),
        ({"guided_grammar": "start: b"}, "guided_grammar", "unknown name"),
        ({"guided_json": "{"}, "guided_json", "line 1, column 2"),
        ({"guided_json": {"items": {"format": "zip"}}}, "guided_json", "at /items: Unknown format: zip"),
        ({"guided_whitespace_pattern": " "}, "guided_whitespace_pattern", "goes with 'guided_json'"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex", "each ask for a form"),
        ({**field({}), "structured_outputs": {"regex": "a"}}, "response_format", "each ask for a form"),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend", "llguidance"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused_is_said_by_field(api: Api, fields: dict[str, Any], param: str, words: str) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "x", **fields}),
        ("/v1/chat/completions", {"messages": QUESTION, **fields}),
    ):
        error = api.refused(path, body)
        assert error["param"] == param
        assert re.search(words, error["message"]), error["message"]


def test_a_form_beside_a_call_that_must_be_made_is_refused(api: Api) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    body = {"messages": QUESTION, "tools": [tool], "tool_choice": "required", "guided_regex": "a"}
    assert "guided_regex" in api.refused("/v1/chat/completions", body)["message"]
    tool["function"]["parameters"] = {"type": "objet"}  # type: ignore[index]
    error = api.refused("/v1/chat/completions", {**body, "tools": [tool], "guided_regex": None})
    assert error["param"] == "tools" and "objet" in error["message"]


def test_an_engine_without_a_tokenizer_says_so() -> None:
    with serving(skip_tokenizer_init=True) as api:
        error = api.refused("/v1/completions", {"prompt": [1, 2], "guided_regex": "a"})
        assert "needs a fast tokenizer" in error["message"]


def test_fields_become_parameters() -> None:
    def of(**fields: Any) -> StructuredOutputsParams | None:
        body = CompletionRequest.model_validate({"prompt": "x", **fields})
        params: SamplingParams = body.to_sampling_params({})
        return params.structured_outputs

    assert of() is None
    assert of(response_format={"type": "text"}) is None
    assert of(response_format={"type": "json_object"}) == StructuredOutputsParams(json_object=True)
    older = {"triggers": ["<f"], "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}]}
    assert of(response_format={"type": "structural_tag", **older}) == StructuredOutputsParams(
        structural_tag=older
    )
    assert of(**field(SCHEMA)) == StructuredOutputsParams(json=SCHEMA)
    assert of(structured_outputs={"choice": ["a"]}) == StructuredOutputsParams(choice=["a"])
    body = ChatCompletionRequest.model_validate({"messages": QUESTION, "guided_json": SCHEMA})
    assert body.to_sampling_params({}).structured_outputs == StructuredOutputsParams(json=SCHEMA)


def test_a_grammar_that_takes_long_holds_up_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    inner = GrammarCompiler._compile

    def compile_(self: GrammarCompiler, params: StructuredOutputsParams) -> Any:
        if params.regex == "slow":
            release.wait(30)
        return inner(self, params)

    monkeypatch.setattr(GrammarCompiler, "_compile", compile_)
    with serving() as api:

        async def main() -> list[int]:
            transport = httpx.ASGITransport(api.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

                def post(**fields: Any) -> Any:
                    return client.post("/v1/completions", json={"prompt": "x", "max_tokens": 4, **fields})

                slow = [asyncio.create_task(post(guided_regex="slow")) for _ in range(20)]
                others = [await post(), await post(guided_regex="a|b"), await post()]
                assert not any(task.done() for task in slow)
                release.set()
                return [r.status_code for r in [*others, *await asyncio.gather(*slow)]]

        assert set(asyncio.run(main())) == {200}

"""Bodies that JSON allows and nobody writes, and some that it does not: never a 500, and never for long."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from json import JSONDecodeError
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.serve.json_body import MAX_DEPTH, parse_json
from tests.serve.conftest import Api, serving

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
USER = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def shared() -> Iterator[Api]:
    with serving() as api:
        yield api
        assert api.complete(max_tokens=2)["usage"]["completion_tokens"] == 2


def send(api: Api, path: str, content: str | bytes) -> httpx.Response:
    return api.request("POST", path, content=content, headers={"content-type": "application/json"})


def nested(depth: int, inner: str = "1", opening: str = "[", closing: str = "]") -> str:
    return opening * depth + inner + closing * depth


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=4) | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


@given(values)
def test_what_is_json_is_read_as_the_standard_library_reads_it(value: Any) -> None:
    text = json.dumps(value)
    try:
        expected = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    except pytest.fail.Exception:
        with pytest.raises(JSONDecodeError):
            parse_json(text.encode())
    else:
        assert parse_json(text.encode()) == expected


@pytest.mark.parametrize("opening,closing", [("[", "]"), ('{"a":', "}")])
def test_depth_is_bounded_to_the_level(opening: str, closing: str) -> None:
    # Beside many brackets that are not within each other.
    beside = f"[{','.join(['[]'] * MAX_DEPTH)}]"
    fits = nested(MAX_DEPTH - 2, beside, opening, closing)
    assert parse_json(fits.encode()) == json.loads(fits)
    for depth in (MAX_DEPTH + 1, 1000, 5000):
        with pytest.raises(JSONDecodeError):
            parse_json(nested(depth, "1", opening, closing).encode())


@pytest.mark.parametrize(
    "fields",
    [
        '"prompt": "\\ud800"',
        '"prompt": "a\\udfffb"',
        '"prompt": "\\ud83d\\u0041"',
        '"prompt": "a", "model": "\\ud800"',
        '"prompt": "a", "user": "\\udc00"',
        '"prompt": "a", "\\ud800": 1',
        '"prompt": "a", "stop": ["\\ud800"]',
        '"prompt": "a", "structured_outputs": {"choice": ["\\ud800"]}',
    ],
)
def test_half_a_surrogate_pair_is_no_text(shared: Api, fields: str) -> None:
    response = send(shared, COMPLETIONS, f"{{{fields}}}")
    assert response.status_code == 400, response.text
    assert "JSON" in response.json()["error"]["message"]


@pytest.mark.parametrize("field", ["content", "name", "role"])
def test_nor_within_a_chat(shared: Api, field: str) -> None:
    message = json.dumps({**USER[0], field: "\ud800"})
    assert send(shared, CHAT, f'{{"messages": [{message}]}}').status_code == 400


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize"])
def test_a_whole_pair_and_a_nul_are_text(shared: Api, path: str) -> None:
    text = "\\ud83d\\ude00 \\u0000 \\uffff \\u202e é"
    given = (
        f'"messages": [{{"role": "user", "content": "{text}"}}]' if path == CHAT else f'"prompt": "{text}"'
    )
    response = send(shared, path, f"{{{given}}}")
    assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    "content",
    [b'{"prompt": "\xff"}', b'{"prompt": "\xed\xa0\x80"}', b'\xef\xbb\xbf{"prompt": "a"}', b"\x00" * 50],
)
def test_bytes_that_are_no_utf8(shared: Api, content: bytes) -> None:
    assert send(shared, COMPLETIONS, content).status_code == 400


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", "1e999"),
        ("max_tokens", "-1e999"),
        ("max_tokens", str(2**70)),
        ("max_tokens", "9" * 5000),
        ("seed", str(2**64)),
        ("seed", str(-(2**70))),
        ("temperature", "1e400"),
        ("temperature", "NaN"),
        ("temperature", "-Infinity"),
        ("top_p", "1e-400"),
        ("top_k", str(2**64)),
        ("n", str(2**31)),
        ("logprobs", str(2**40)),
        ("truncate_prompt_tokens", str(2**64)),
        ("min_tokens", str(2**65)),
        ("priority", str(2**63)),
        ("stop_token_ids", f"[{2**70}]"),
        ("allowed_token_ids", f"[{-(2**63)}]"),
        ("logit_bias", f'{{"{10**30}": 1}}'),
        ("logit_bias", '{"1": 1e999}'),
        ("prompt", f"[{2**70}]"),
        ("prompt", "[1e2]"),
    ],
)
def test_huge_numbers(shared: Api, field: str, value: str) -> None:
    prompt = "" if field == "prompt" else '"prompt": "a", '
    response = send(shared, COMPLETIONS, f'{{{prompt}"{field}": {value}}}')
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] == field or "JSON" in error["message"]


DEEP = nested(MAX_DEPTH - 10, "{}", '{"a":', "}")
DEEP_SCHEMA = nested(30, '{"type":"integer"}', '{"type":"array","items":', "}")


@pytest.mark.parametrize(
    "fields",
    [
        f'"messages": [{{"role": "user", "content": {DEEP}}}]',
        f'"messages": [{DEEP}]',
        f'"chat_template_kwargs": {DEEP}',
        f'"documents": [{DEEP}]',
        f'"tools": [{{"type": "function", "function": {{"name": "f", "parameters": {DEEP}}}}}]',
        f'"tool_choice": {DEEP}',
        f'"response_format": {DEEP}',
        f'"response_format": {{"type": "json_schema", "json_schema": {{"name": "a", "schema": {DEEP}}}}}',
        f'"structured_outputs": {{"json": {DEEP_SCHEMA}}}',
        f'"structured_outputs": {{"structural_tag": {DEEP}}}',
        f'"logit_bias": {DEEP}',
        f'"model": {DEEP}',
    ],
    ids=lambda fields: fields[:40],
)
def test_what_is_nested_as_deeply_as_may_be_breaks_nothing(shared: Api, fields: str) -> None:
    messages = "" if fields.startswith('"messages"') else f'"messages": {json.dumps(USER)}, '
    response = send(shared, CHAT, f'{{{messages}{fields}, "max_tokens": 1}}')
    assert response.status_code in (200, 400), response.text


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/v1/responses", "/v1/messages", "/tokenize", "/score"])
def test_what_is_nested_deeper_is_refused_on_every_route(shared: Api, path: str) -> None:
    for depth in (MAX_DEPTH + 1, 100_000):
        response = send(shared, path, nested(depth))
        assert response.status_code == 400
        assert "message" in response.json()["error"]


BOMBS: dict[str, dict[str, Any]] = {
    "counted repetitions": {"regex": "((a{1,100}){1,100}){1,100}b"},
    "an automaton of 2^n states": {"regex": "(a|b)*a(a|b){40}"},
    "nested alternatives": {"regex": "(" * 60 + "a" + "|a)*" * 60},
    "a wide schema": {"json": {"properties": {f"p{i}": {"type": "string"} for i in range(300)}}},
    "a reference to itself": {"json": {"$ref": "#"}},
    "every one of many": {"json": {"allOf": [{"pattern": f"^(a|b)*a(a|b){{{i}}}$"} for i in range(40)]}},
    "by reference": {
        "json": {
            "$ref": "#/$defs/d0",
            "$defs": {
                f"d{i}": {"pattern": f"^(a|b)*a(a|b){{{i}}}$", "$ref": f"#/$defs/d{i + 1}"} for i in range(30)
            }
            | {"d30": {"type": "string"}},
        }
    },
    "in a grammar": {"grammar": "start: A\nA: " + " & ".join(f"/(a|b)*a(a|b){{{i}}}/" for i in range(30))},
    "an ambiguous grammar": {"grammar": 'start: s\ns: s s | s s s | "a" | \n'},
}


def test_while_bombs_are_compiled_the_server_answers(shared: Api) -> None:
    """Each is refused or served within seconds; meanwhile nobody else waits long."""

    async def main() -> tuple[list[httpx.Response], float]:
        transport = httpx.ASGITransport(shared.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            bombs = asyncio.gather(
                *(
                    client.post(
                        COMPLETIONS, json={"prompt": "a", "max_tokens": 2, "structured_outputs": bomb}
                    )
                    for bomb in BOMBS.values()
                )
            )
            slowest = 0.0
            while not bombs.done():
                began = time.monotonic()
                assert (await client.get("/health")).status_code == 200
                slowest = max(slowest, time.monotonic() - began)
                await asyncio.sleep(0.01)
            return await bombs, slowest

    responses, slowest = asyncio.run(main())
    for name, response in zip(BOMBS, responses, strict=True):
        assert response.status_code in (200, 400), (name, response.text)
    # A second or so on a machine of which others have their part; a compilation on the loop takes more.
    assert slowest < 3

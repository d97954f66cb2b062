"""What a constraint may say, before anybody compiles it."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from jaxllm.errors import ConfigError, InvalidRequestError
from jaxllm.structured_outputs import (
    MAX_CHARACTERS,
    MAX_GRAMMAR_CHARACTERS,
    MAX_NESTING,
    StructuredOutputsConfig,
    StructuredOutputsParams,
)


def refused(words: str, **fields: Any) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        StructuredOutputsParams(**fields)
    assert caught.value.param == "structured_outputs"


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth - 1):
        schema = {"items": schema}
    return schema


def test_exactly_one_constraint() -> None:
    refused("exactly one of .*; got none")
    refused("exactly one of .*; got json and regex", json="{}", regex="a")
    refused("exactly one of .*; got json_object and structural_tag", json_object=False, structural_tag="{}")


@pytest.mark.parametrize(
    "fields",
    [
        {"json": {"type": "object"}},
        {"json": '{"type": "object"}', "disable_any_whitespace": True},
        {"json": {}, "whitespace_pattern": " ?", "disable_additional_properties": True},
        {"regex": ""},
        {"regex": "[a-z]+"},
        {"choice": ["a", ""]},
        {"grammar": 'start: "a"'},
        {"json_object": True, "whitespace_pattern": ""},
        {"structural_tag": {"triggers": [], "structures": []}},
        {"json": nested(MAX_NESTING)},
    ],
    ids=str,
)
def test_what_may_be_compiled(fields: dict[str, Any]) -> None:
    params = StructuredOutputsParams(**fields)
    assert params.kind == next(iter(fields))
    text = params.text()
    assert isinstance(text, str)
    value = fields[params.kind]
    assert text == value if isinstance(value, str) else json.loads(text) == value


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"json": "{"}, r"structured_outputs\.json must be JSON \(.* at line 1, column 2\)"),
        ({"json": '{"a":\n 1,}'}, "at line 2, column 4"),
        ({"json": "[]"}, "must be a JSON object"),
        ({"json": 5}, "must be a JSON object"),
        ({"json": {"a": {1, 2}}}, "must be JSON"),
        ({"json": {"const": float("nan")}}, "must be JSON"),
        ({"json": nested(MAX_NESTING + 1)}, "at most 64 levels"),
        ({"json": '{"items":' * 100_000 + "{}" + "}" * 100_000}, "at most 64 levels"),
        ({"json": {"description": "x" * MAX_CHARACTERS}}, r"at most 1000000 characters.*\.\.\.\.$"),
        ({"regex": "x" * (MAX_GRAMMAR_CHARACTERS + 1)}, "at most 16000 characters"),
        ({"grammar": "x" * (MAX_GRAMMAR_CHARACTERS + 1)}, "at most 16000 characters"),
        ({"regex": 5}, r"structured_outputs\.regex must be a string"),
        ({"regex": "a\0"}, "NUL"),
        ({"choice": []}, "at least one string"),
        ({"choice": "abc"}, "at least one string"),
        ({"choice": ["a", 1]}, "at least one string"),
        ({"grammar": "  \n"}, "non-empty"),
        ({"json_object": False}, "must be True, or left out"),
        ({"structural_tag": ""}, "must be JSON"),
        ({"json": {}, "disable_any_whitespace": 1}, "disable_any_whitespace must be True or False"),
        ({"regex": "a", "disable_any_whitespace": True}, "left out beside regex"),
        ({"choice": ["a"], "whitespace_pattern": " "}, "left out beside choice"),
        ({"json_object": True, "disable_additional_properties": True}, "left out beside json_object"),
        ({"json": {}, "whitespace_pattern": " ", "disable_any_whitespace": True}, "whitespace_pattern"),
        ({"json": {}, "whitespace_pattern": 3}, "must be a regex"),
    ],
    ids=[str(i) for i in range(25)],
)
def test_what_is_refused(fields: dict[str, Any], words: str) -> None:
    refused(words, **fields)


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        StructuredOutputsParams(grammar="\0" * 5000)
    assert len(str(caught.value)) < 400
    assert re.search(r"\.\.\.", str(caught.value))


def test_what_holds_for_every_constraint() -> None:
    config = StructuredOutputsConfig.from_mapping(
        {"backend": "guidance", "disable_any_whitespace": True, "disable_additional_properties": True}
    )

    def applied(**fields: Any) -> tuple[bool, bool]:
        params = config.apply(StructuredOutputsParams(**fields))
        return params.disable_any_whitespace, params.disable_additional_properties

    assert applied(json={}) == applied(structural_tag={}) == (True, True)
    assert applied(json_object=True) == (True, False)
    assert applied(json={}, whitespace_pattern=" ") == (False, True)
    assert applied(regex="a") == applied(choice=["a"]) == (False, False)
    params = StructuredOutputsParams(json={}, disable_any_whitespace=True)
    assert StructuredOutputsConfig.from_mapping({}).apply(params) == params


@pytest.mark.parametrize(
    "mapping",
    [{"backend": "xgrammar"}, {"disable_any_whitespace": 1}, {"reasoning_parser": "qwen3"}],
    ids=str,
)
def test_a_config_that_is_wrong(mapping: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"structured_outputs_config holds .*; it takes backend: 'auto'"
    ) as caught:
        StructuredOutputsConfig.from_mapping(mapping)
    assert caught.value.param == "structured_outputs_config"

"""Structural tags take the texts that they describe, refuse others, and say which part of them is wrong."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from jaxllm.demo import demo_model_path
from jaxllm.errors import InvalidRequestError
from jaxllm.structured_outputs import MAX_GRAMMAR_CHARACTERS, StructuredOutputsParams
from jaxllm.text.grammar import GrammarCompiler
from jaxllm.text.structural_tag import FORMATS, quoted, structural_tag_grammar
from jaxllm.text.tokenizer import get_tokenizer

EOS = 0


@cache
def tokenizer() -> Any:
    return get_tokenizer(demo_model_path())


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(tokenizer(), 1536, [EOS])


def takes(tag: dict[str, Any], text: str) -> bool:
    """Whether the whole of a text matches."""
    params = StructuredOutputsParams(structural_tag=tag, disable_any_whitespace=True)
    matcher = compiler().compile(params).fork()
    tokens = tokenizer().encode(text, add_special_tokens=False)
    if any(matcher.accept(token) is not None for token in tokens):
        return False
    return matcher.is_complete or matcher.accept(EOS) is None


def of(format_: dict[str, Any]) -> dict[str, Any]:
    return {"type": "structural_tag", "format": format_}


def tag(begin: str, content: dict[str, Any], end: str) -> dict[str, Any]:
    return {"type": "tag", "begin": begin, "content": content, "end": end}


NUMBER = {"type": "regex", "pattern": "[0-9]/?[0-9]*"}
OBJECT = {
    "type": "json_schema",
    "json_schema": {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]},
}
TEXT = {"type": "any_text"}
NUMBER_TAG = tag("a", NUMBER, "b")
GRAMMAR = {"type": "grammar", "grammar": 'root ::= "(" root ")" | "x"\n'}


@pytest.mark.parametrize(
    ("format_", "good", "bad"),
    [
        ({"type": "const_string", "value": 'a "b"\n\x7f'}, ['a "b"\n\x7f'], ["", 'a "b"']),
        (OBJECT, ['{"n":1}', '{"n":1,"m":2}'], ["{}", '{"n":"1"}']),
        (NUMBER, ["1/2", "7"], ["x", "1//"]),
        (GRAMMAR, ["x", "((x))"], ["((x)", ""]),
        (TEXT, ["", "anything\nat all {"], []),
        (
            {"type": "sequence", "elements": [NUMBER, {"type": "const_string", "value": "!"}]},
            ["5!"],
            ["5", "!"],
        ),
        ({"type": "or", "elements": [NUMBER, GRAMMAR]}, ["5", "(x)"], ["5x"]),
        (tag("<n>", NUMBER, "</n>"), ["<n>12</n>"], ["<n>x</n>", "<n>12", "12</n>"]),
        (tag("<t>", TEXT, "</t>"), ["<t></t>", "<t>a < b\n</t>"], ["<t>a", "<t>a</t>b"]),
        (tag("", NUMBER, ""), ["3"], ["x"]),
        (tag("<tool_call>", OBJECT, "</tool_call>"), ['<tool_call>{"n":1}</tool_call>'], ['{"n":1}']),
        (tag("<tool_call>", TEXT, "</tool_call>"), ["<tool_call>so it is</tool_call>"], ["<tool_call>so"]),
    ],
    ids=str,
)
def test_formats(format_: dict[str, Any], good: list[str], bad: list[str]) -> None:
    for text in good:
        assert takes(of(format_), text), text
    for text in bad:
        assert not takes(of(format_), text), text


def triggered(**options: bool) -> dict[str, Any]:
    tags = [
        tag("<f=a>", NUMBER, "</f>"),
        tag("<f=b>", OBJECT, "</f>"),
        tag("<tool_call>", NUMBER, "</tool_call>"),
    ]
    return of({"type": "triggered_tags", "triggers": ["<f", "<tool_call>"], "tags": tags, **options})


def test_text_is_free_until_a_trigger() -> None:
    for text in ("", "nothing here", 'see <f=a>1</f> and\n<f=b>{"n":2}</f>.', "<tool_call>7</tool_call>"):
        assert takes(triggered(), text), text
    for text in ("<f=c>", "so <f=a>x</f>", "<f=a>1", "<tool_call>x</tool_call>"):
        assert not takes(triggered(), text), text


def test_how_many_calls_there_are() -> None:
    one, two = "a <f=a>1</f>", "<f=a>1</f><f=a>2</f> b"
    cases = {
        (): ("text", one, two),
        ("at_least_one",): (one, two),
        ("stop_after_first",): ("text", one),
        ("at_least_one", "stop_after_first"): (one,),
    }
    for options, good in cases.items():
        for text in ("text", one, two):
            assert takes(triggered(**dict.fromkeys(options, True)), text) == (text in good), (options, text)


def test_tags_with_a_separator_and_nothing_else() -> None:
    def separated(**options: bool) -> dict[str, Any]:
        tags = [tag("<", NUMBER, ">"), tag("[", GRAMMAR, "]")]
        return of({"type": "tags_with_separator", "tags": tags, "separator": ", ", **options})

    for text in ("", "<1>", "<1>, [x], <2>"):
        assert takes(separated(), text)
        assert takes(separated(at_least_one=True), text) == (text != "")
        assert takes(separated(stop_after_first=True), text) == (", " not in text)
    for text in ("<1>,[x]", "<1>, ", "<1> and"):
        assert not takes(separated(), text)


def test_the_older_notation_is_the_newer_one() -> None:
    schema = OBJECT["json_schema"]
    older = {"triggers": ["<f"], "structures": [{"begin": "<f>", "schema": schema, "end": "</f>"}]}
    newer = {"format": {"type": "triggered_tags", "triggers": ["<f"], "tags": [tag("<f>", OBJECT, "</f>")]}}
    written = [structural_tag_grammar(spec, str, ()) for spec in (older, newer)]
    assert written[0] == written[1]
    assert takes(older, 'see <f>{"n":3}</f>') and not takes(older, "see <f>3</f>")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({}, r"either 'format', or 'triggers' and 'structures'; got \[\]"),
        ({"type": "json", "format": TEXT}, "type must be 'structural_tag'"),
        ({"format": 5}, r"format\.type must be one of const_string, .*; got None"),
        (of({"type": "xml"}), rf"format\.type must be one of {', '.join(FORMATS)}; got 'xml'"),
        (of({"type": "const_string"}), r"format\.value is missing"),
        (of({"type": "regex", "pattern": 5}), r"format\.pattern must be a string; got 5"),
        (of({"type": "sequence", "elements": []}), r"format\.elements must be a list that is not empty"),
        (of({"type": "or", "elements": [TEXT, {"type": "x"}]}), r"elements\[1\]\.type must be one of"),
        (of({"type": "json_schema", "json_schema": 5}), r"format\.json_schema must be an object"),
        (of({"type": "triggered_tags", "triggers": [""], "tags": [tag("a", TEXT, "b")]}), "non-empty"),
        (
            of({"type": "triggered_tags", "triggers": ["<g"], "tags": [tag("<f", TEXT, "b")]}),
            r"format\.tags\[0\]\.begin '<f' begins with none of \['<g'\]",
        ),
        (
            of({"type": "tags_with_separator", "separator": "", "tags": [NUMBER_TAG], "at_least_one": 1}),
            "must be true or false",
        ),
        ({"triggers": ["<"], "structures": [{"begin": "<"}]}, r"structures\[0\] must hold 'begin', 'schema'"),
        (of({**TEXT, "excludes": ["a"]}), "format holds excludes; any_text has nothing"),
        (of(tag("<", {**NUMBER, "flags": "i"}, ">")), r"format\.content holds flags; regex has pattern"),
        (of({**tag("<", NUMBER, ">"), "ends": []}), "format holds ends; tag has begin, content, end"),
        (of({"type": "grammar", "grammar": "x" * (MAX_GRAMMAR_CHARACTERS + 1)}), "at most 16000"),
    ],
    ids=str,
)
def test_what_is_wrong_is_said_with_its_place(spec: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        structural_tag_grammar(spec, str, ())
    with pytest.raises(InvalidRequestError, match=words):
        compiler().compile(StructuredOutputsParams(structural_tag=spec))


def test_special_tokens_are_named_and_not_spelt() -> None:
    grammar = structural_tag_grammar(of(tag("a<|x|>b", NUMBER, "<|y|>")), str, {"<|x|>", "<|y|>"})
    assert '"a" <|x|> "b"' in grammar and grammar.rstrip().endswith("<|y|>")
    assert quoted("\x7f\n") == '"\\u007f\\n"'

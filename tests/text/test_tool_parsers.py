from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.text.parsers.message import MessageFormat, MessageParser
from jaxllm.text.parsers.tool_parsers import TOOL_PARSERS, call_list_of_any, named_call
from jaxllm.text.parsers.tools import tools_of
from tests.text.transcripts import SUM, TOOLS, TRANSCRIPTS, TWO, Transcript, call_text, hermes

OFFERED = tools_of(TOOLS)


class Message:
    """What a stream of deltas adds up to, for a client that adds them up."""

    def __init__(self) -> None:
        self.reasoning = self.content = ""
        self.calls: list[list[str]] = []
        self.ids: list[str] = []

    def read(self, parser: MessageParser, pieces: list[str]) -> Message:
        for i, piece in enumerate(pieces):
            delta = parser.feed(piece, finished=i == len(pieces) - 1)
            self.reasoning += delta.reasoning
            self.content += delta.content
            for call in delta.tool_calls:
                if call.name is not None:
                    assert call.index == len(self.calls)
                    assert call.id
                    self.ids.append(call.id)
                    self.calls.append([call.name, ""])
                assert call.index == len(self.calls) - 1, "fragments of a call that has ended"
                self.calls[-1][1] += call.arguments
        return self

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and self.everything() == other.everything()

    def everything(self) -> tuple[str, str, list[list[str]]]:
        return self.reasoning, self.content, self.calls

    def __repr__(self) -> str:
        return repr(self.everything())


def read(name: str, *pieces: str, tools: Any = OFFERED, **fields: Any) -> Message:
    how = MessageFormat(calls=TOOL_PARSERS[name], tools=tools, **fields)
    return Message().read(MessageParser(how), list(pieces))


def read_value(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError:
        return arguments


@pytest.mark.parametrize("case", TRANSCRIPTS, ids=str)
def test_what_is_in_a_transcript(case: Transcript) -> None:
    found = read(case.parser, case.text)
    assert [(name, read_value(arguments)) for name, arguments in found.calls] == case.calls
    assert found.content == case.content
    assert found.reasoning == case.reasoning


@pytest.mark.parametrize("case", TRANSCRIPTS, ids=str)
def test_however_it_is_cut_it_reads_the_same(case: Transcript) -> None:
    text = case.text
    whole = read(case.parser, text)
    for cut in range(len(text) + 1):
        assert read(case.parser, text[:cut], text[cut:]) == whole, cut
    assert read(case.parser, *text) == whole
    assert read(case.parser, *text, "") == whole


@pytest.mark.parametrize("case", TRANSCRIPTS, ids=str)
def test_a_text_that_ends_anywhere_reads_the_same_in_one_piece_and_in_many(case: Transcript) -> None:
    for end in range(1, len(case.text)):
        start = case.text[:end]
        assert read(case.parser, *start) == read(case.parser, start), start


@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
def test_every_parser_has_a_transcript_with_two_calls_or_says_why_not(name: str) -> None:
    most = max(len(case.calls) for case in TRANSCRIPTS if case.parser == name)
    # These read like another one that has two, or one call is all that the format has.
    assert most == (1 if name in ("granite4", "internlm", "llama4_pythonic", "qwen3_xml") else 2)


@pytest.mark.parametrize("name", sorted({c.parser for c in TRANSCRIPTS} - {"pythonic", "llama4_pythonic"}))
def test_a_stream_shows_arguments_while_the_call_goes_on(name: str) -> None:
    """Python's calls are read as a whole; every other one grows."""
    case = max((c for c in TRANSCRIPTS if c.parser == name), key=lambda c: len(str(c.calls)))
    parser = MessageParser(MessageFormat(calls=TOOL_PARSERS[name], tools=OFFERED))
    deltas = [parser.feed(character) for character in case.text]
    fragments = [call.arguments for delta in deltas for call in delta.tool_calls if call.arguments]
    assert len(fragments) > 8
    assert max(map(len, fragments)) < 60


SOUP = st.lists(
    st.sampled_from(
        [
            *sorted({mark for parser in TOOL_PARSERS.values() for mark in parser.marks}),
            *('{"name": "add", "arguments": ', '{"a": 1}', "}", "[", "]", "{", ", ", "\n", " ", '"', "\\"),
            *("add", "get_weather", "functions.add:0", "<function=add>", "<parameter=a>", "</function>", "'"),
            *("[add(a=1)", "text", "é😀", "<", ">", "(", ")", "\n```json\n", "```", "functools", " to="),
        ]
    ),
    max_size=12,
)


@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
@given(parts=SOUP)
@settings(max_examples=60, deadline=None)
def test_soup_reads_the_same_in_pieces_and_loses_nothing(name: str, parts: list[str]) -> None:
    text = "".join(parts)
    whole = read(name, text)
    assert read(name, *parts, "") == whole
    assert read(name, *text, "") == whole
    if not whole.calls and name != "openai":
        assert whole.content == text


@given(text=st.text(max_size=60))
@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
def test_plain_text_is_content(name: str, text: str) -> None:
    assert read(name, text).everything() == ("", text, [])


def test_ids() -> None:
    two = "\n".join(hermes(*one) for one in TWO)
    ids = read("hermes", two).ids
    assert len(set(ids)) == 2
    assert all(i.startswith("call_") for i in ids)
    kimi = next(c for c in TRANSCRIPTS if c.parser == "kimi_k2")
    assert read("kimi_k2", kimi.text).ids == ["functions.get_weather:0", "functions.add:1"]
    for case in (c for c in TRANSCRIPTS if c.parser == "mistral"):
        assert all(len(i) == 9 and i.isalnum() for i in read("mistral", case.text).ids), case
    assert read("mistral", "[TOOL_CALLS]add[CALL_ID]abc123def[ARGS]{}").ids == ["abc123def"]


def test_no_more_calls_than_wanted() -> None:
    two = "a" + "\n".join(hermes(*one) for one in TWO) + "b"
    found = read("hermes", *two, max_calls=1)
    assert [name for name, _ in found.calls] == ["get_weather"]
    assert json.loads(found.calls[0][1]) == TWO[0][1]
    assert found.content == "ab"


@pytest.mark.parametrize("tools", [OFFERED, {}])
def test_calls_of_tools_that_nobody_offered_are_told_where_the_format_is_clear(tools: Any) -> None:
    assert read("hermes", hermes("other", {}), tools=tools).calls == [["other", "{}"]]
    bare = call_text("other", {})
    # A bare bracket may open anything: only there the name decides.
    assert read("llama3_json", bare, tools=tools).calls == ([] if tools else [["other", "{}"]])


@pytest.mark.parametrize("name", sorted(n for n, parser in TOOL_PARSERS.items() if parser.form is not None))
def test_what_a_grammar_makes_of_a_call_is_read(name: str) -> None:
    form = TOOL_PARSERS[name].form
    assert form is not None
    assert form.begin.startswith(form.trigger)
    text = form.begin.replace("NAME", "add") + json.dumps(SUM) + form.end
    found = read(name, *f"So {text}{text}")
    assert [(n, json.loads(a)) for n, a in found.calls] == [("add", SUM), ("add", SUM)]
    assert found.content == "So "


def test_forced_calls() -> None:
    text = "\n[" + ",".join(call_text(n, a, "parameters") for n, a in TWO) + "]"
    for pieces in ([text], list(text)):
        required = MessageParser(MessageFormat(calls=call_list_of_any(None), tools=OFFERED))
        found = Message().read(required, pieces)
        assert [(n, json.loads(a)) for n, a in found.calls] == TWO
        assert found.content == ""
    arguments = json.dumps(TWO[0][1])
    for pieces in ([arguments], list(arguments), [*arguments[:5], ""]):
        named = MessageParser(
            MessageFormat(calls=named_call("get_weather", TOOL_PARSERS["mistral"]), tools=OFFERED)
        )
        found = Message().read(named, pieces)
        assert found.calls == [["get_weather", "".join(pieces)]]
        assert len(found.ids[0]) == 9


def test_long_output_is_read_in_linear_time() -> None:
    """A hundred thousand characters in the slowest way take well under a second each."""
    arguments = {"city": "x" * 50_000, "options": {"deep": ["y"] * 10_000}}
    text = "{" * 2_000 + "<tool_call>" * 500 + "[" * 2_000 + hermes("get_weather", arguments)
    found = read("hermes", *(text[i : i + 4] for i in range(0, len(text), 4)))
    assert json.loads(found.calls[0][1]) == arguments


def test_deep_nesting_does_not_exhaust_the_stack() -> None:
    for name in TOOL_PARSERS:
        for bracket in "[{(":
            deep = bracket * 20_000
            text = f'<tool_call>{{"x": {deep}'
            assert read(name, text).content == text
    deep = '{"a":' * 20_000
    call = f'<tool_call>{{"name": "add", "arguments": {deep}'
    assert read("hermes", call).calls == [["add", deep]]

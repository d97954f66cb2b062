from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.text.parsers.message import MessageFormat, MessageParser
from jaxllm.text.parsers.reasoning import REASONING_FORMATS
from jaxllm.text.parsers.tool_parsers import TOOL_PARSERS
from jaxllm.text.parsers.tools import tools_of
from tests.text.test_tool_parsers import Message
from tests.text.transcripts import KIMI_BEGIN, KIMI_END, SUM, TOOLS, hermes, kimi

CALL = hermes("add", SUM)

# Parser, prompt, completion, reasoning, content; "@" in a completion is the mark's own tool call.
CASES = [
    ("deepseek_r1", "", "I think\n\nof 1 < 2.\n</think>\n\nYes.\n", "I think\n\nof 1 < 2.", "Yes.\n"),
    ("deepseek_r1", "", "<think>\nSo</think>Yes", "So", "Yes"),
    ("deepseek_r1", "", "\n<think>\n\n</think>\n\nYes", "", "Yes"),
    ("deepseek_r1", "", "never ends\n", "never ends", ""),
    ("deepseek_r1", "...<think>\n", "So</think> Yes</think>", "So", " Yes</think>"),
    ("qwen3", "...<think>\n\n</think>\n\n", "Yes <think> no", "", "Yes <think> no"),
    ("qwen3", "...<|im_start|>assistant\n", "<think>\nA\n</think>\n\nB", "A", "B"),
    ("qwen3", "...<think>\n", "A\n\n\nB\n\n</think>\n\n\nC\n\nD", "A\n\n\nB", "C\n\nD"),
    ("qwen3", "", "cut </thi", "cut </thi", ""),
    ("glm45", "", "<think>A</think>\nB", "A", "B"),
    ("kimi_k2", "", "A</think>B", "A", "B"),
    ("mistral", "", "[THINK]A [/THIN B[/THINK]C", "A [/THIN B", "C"),
    ("mistral", "", " No thought", "", " No thought"),
    ("mistral", "", "<think>A</think>C", "A", "C"),
    ("mistral", "[THINK]", "A[/THINK]C", "A", "C"),
    (
        "granite",
        "",
        "Here is my thought process:\nHere is A.\nHere's my response:\nB: Here is my response:",
        "Here is A.",
        "B: Here is my response:",
    ),
    ("granite", "", "Here is my answer", "", "Here is my answer"),
    ("granite", "", "Here's my thought process:A", "A", ""),
    (
        "openai_gptoss",
        "",
        "<|channel|>analysis<|message|>A\n<|end|><|start|>assistant<|channel|>final<|message|>B<|return|>",
        "A\n",
        "B",
    ),
]


def read(name: str, prompt: str, pieces: list[str], tool_parser: str | None = None) -> Message:
    form = REASONING_FORMATS[name]
    how = MessageFormat(
        form,
        None if tool_parser is None else TOOL_PARSERS[tool_parser],
        form.starts_inside(prompt),
        tools_of(TOOLS) if tool_parser else {},
    )
    return Message().read(MessageParser(how), pieces)


@pytest.mark.parametrize(("name", "prompt", "text", "reasoning", "content"), CASES)
def test_reasoning_apart_from_content(
    name: str, prompt: str, text: str, reasoning: str, content: str
) -> None:
    whole = read(name, prompt, [text])
    assert whole.everything() == (reasoning, content, [])
    for cut in range(len(text) + 1):
        assert read(name, prompt, [text[:cut], text[cut:]]) == whole, cut
    assert read(name, prompt, [*text, ""]) == whole


def test_every_parser_is_tested() -> None:
    assert {name for name, *_ in CASES} == set(REASONING_FORMATS)


@pytest.mark.parametrize(
    ("reasoning", "tools", "text", "expected"),
    [
        ("qwen3", "hermes", f"A\n</think>\n\nB\n{CALL}", ("A", "B\n")),
        # A call ends the reasoning, where the model forgets to.
        ("qwen3", "hermes", f"A\n\n{CALL}C", ("A", "C")),
        ("deepseek_r1", "hermes", f"A {CALL}</think>{CALL}", (f"A {CALL}", "")),
        ("kimi_k2", "kimi_k2", f"A{KIMI_BEGIN}{kimi('add', 0, SUM)}{KIMI_END}", ("A", "")),
        (
            "openai_gptoss",
            "openai",
            "<|channel|>analysis<|message|>A<|end|><|start|>assistant<|channel|>commentary to=functions.add"
            ' <|constrain|>json<|message|>{"a": 1, "b": -2.5}<|call|>',
            ("A", ""),
        ),
    ],
)
def test_reasoning_and_calls_together(
    reasoning: str, tools: str, text: str, expected: tuple[str, str]
) -> None:
    whole = read(reasoning, "", [text], tools)
    assert (whole.reasoning, whole.content) == expected
    assert [name for name, _ in whole.calls] == ["add"]
    for cut in range(len(text) + 1):
        assert read(reasoning, "", [text[:cut], text[cut:]], tools) == whole, cut
    assert read(reasoning, "", [*text, ""], tools) == whole


def test_without_tools_a_mark_of_calls_is_a_thought() -> None:
    assert read("qwen3", "", ["about <tool_call> tags</think>x"]).reasoning == "about <tool_call> tags"


def test_where_the_answer_begins() -> None:
    class Tokenizer:
        def get_vocab(self) -> dict[str, int]:
            return {"</think>": 6}

        def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
            assert not add_special_tokens
            return [6] if text == "</think>" else [ord(character) for character in text]

    tokenizer = Tokenizer()
    assert REASONING_FORMATS["qwen3"].answer_after("So", tokenizer) == (6,)
    assert REASONING_FORMATS["qwen3"].answer_after("<think></think>\n", tokenizer) == ()
    assert REASONING_FORMATS["mistral"].answer_after("[THINK]", tokenizer) == (6,)
    assert REASONING_FORMATS["mistral"].answer_after("So", tokenizer) == ()
    granite = REASONING_FORMATS["granite"].answer_after("Here's my thought process:", tokenizer)
    assert "".join(map(chr, granite)) == "Here is my response:"
    final = REASONING_FORMATS["openai_gptoss"].answer_after("", tokenizer)
    assert "".join(map(chr, final)) == "<|channel|>final<|message|>"


SOUP = st.lists(
    st.sampled_from(
        [
            *sorted({mark for form in REASONING_FORMATS.values() for mark in (*form.starts, *form.ends)}),
            *("\n", "\n\n", " ", "<", "</", "Here", "text", "é😀", CALL, "<tool_call>", KIMI_BEGIN),
            *(
                "<|channel|>analysis<|message|>",
                "<|channel|>final<|message|>",
                "<|end|>",
                "<|start|>assistant",
            ),
        ]
    ),
    max_size=10,
)


@pytest.mark.parametrize("tools", [None, "hermes"])
@pytest.mark.parametrize("name", sorted(REASONING_FORMATS))
@given(parts=SOUP, inside=st.booleans())
@settings(max_examples=50, deadline=None)
def test_soup_reads_the_same_in_pieces(name: str, tools: str | None, parts: list[str], inside: bool) -> None:
    text = "".join(parts)
    prompt = "<think>" if inside else ""
    whole = read(name, prompt, [text], tools)
    assert read(name, prompt, [*parts, ""], tools) == whole
    assert read(name, prompt, [*text, ""], tools) == whole
    if name != "openai_gptoss" and tools is None:
        kept = (whole.reasoning + whole.content).replace("\n", "")
        assert all(kept.count(word) == text.count(word) for word in ("text", "é😀"))

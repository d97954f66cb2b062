"""Chat messages to prompt text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from jaxllm.errors import ConfigError, InvalidRequestError, UnsupportedError
from jaxllm.text.chat_template import normalize_messages, render_chat
from jaxllm.text.template_inspection import wants_content_parts

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PARTS = (
    "{% for message in messages %}[{{ message['role'] }}]{% for part in message['content'] %}"
    "<{{ part.type }}>{{ part.text }}{% endfor %}{% endfor %}"
)
USER = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def tokenizer(zoo: Callable[[str], PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=zoo("byte_level").backend_tokenizer, eos_token="</s>", chat_template=CHATML
    )


def test_chatml(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *USER]
    expected = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert render_chat(tokenizer, messages) == expected + "<|im_start|>assistant\n"
    assert render_chat(tokenizer, messages, add_generation_prompt=False) == expected


def test_continue_final_message(tokenizer: Any) -> None:
    messages = [*USER, {"role": "assistant", "content": "Hel"}]
    prompt = render_chat(tokenizer, messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt.endswith("<|im_start|>assistant\nHel")
    parts: list[Any] = [*USER, {"role": "assistant", "content": [{"type": "text", "text": "Hel"}]}]
    options: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}
    assert render_chat(tokenizer, parts, chat_template=PARTS, **options).endswith("[assistant]<text>Hel")


def test_text_parts_become_what_the_template_wants(tokenizer: Any) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}]
    assert "user\na\nb<|im_end|>" in render_chat(tokenizer, parts)
    assert render_chat(tokenizer, parts, chat_template=PARTS) == "[user]<text>a<text>b"
    assert render_chat(tokenizer, USER, chat_template=PARTS) == "[user]<text>Hi"
    assert "'type': 'text'" in render_chat(tokenizer, parts, content_format="openai")
    assert parts[0]["content"][0] == {"type": "text", "text": "a"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("{{ m.content }}", False),
        ("{% for p in m['content'] %}x{% endfor %}", True),
        ("{% for p in m.content | selectattr('type', 'equalto', 'text') %}x{% endfor %}", True),
        ("{% set c = m['content'] %}{% for p in c %}x{% endfor %}", True),
        ("{% set c = m.content %}{% set d = c %}{% for p in d %}x{% endfor %}", True),
        ("{% macro f(c) %}{% for p in c %}{{ p.text }}{% endfor %}{% endmacro %}{{ f(m.content) }}", True),
        ("{% macro f(c) %}{{ c }}{% endmacro %}{{ f(m.content) }}", False),
        ("{% for call in m.tool_calls %}x{% endfor %}{{ m.content }}", False),
        ("{% for line in m.content.split('\\n') %}{{ line }}{% endfor %}", False),
        ("{% generation %}{{ m.content }}{% endgeneration %}{% break %}", False),
        ("{% for", False),
    ],
)
def test_what_a_template_wants(body: str, expected: bool) -> None:
    assert wants_content_parts("{% for m in messages %}" + body + "{% endfor %}") is expected


def test_variables_reach_the_template(tokenizer: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    template = "{{ tools[0].function.name }} {{ documents[0].title }} {{ enable_thinking }}"
    rendered = render_chat(
        tokenizer,
        USER,
        chat_template=template,
        tools=tools,
        documents=[{"title": "D"}],
        chat_template_kwargs={"enable_thinking": False},
    )
    assert rendered == "f D False"
    assert render_chat(tokenizer, USER, chat_template="{{ tools is none }}", tools=[]) == "True"


def test_named_templates(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": "plain", "tool_use": "{{ 'tools' if tools or true }}"}
    assert render_chat(tokenizer, USER) == "plain"
    assert render_chat(tokenizer, USER, tools=[{"type": "function"}]) == "tools"
    assert render_chat(tokenizer, USER, chat_template="tool_use") == "tools"
    tokenizer.chat_template = {"rag": "x"}
    with pytest.raises(InvalidRequestError, match="named rag"):
        render_chat(tokenizer, USER)


def test_tool_calls_get_their_arguments_as_objects() -> None:
    call: dict[str, Any] = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    empty = {"function": {"name": "f", "arguments": ""}}
    messages: list[Any] = [
        {"role": "assistant", "content": None, "tool_calls": [call, empty]},
        {"role": "tool", "tool_call_id": "1", "content": "2", "name": None},
    ]
    assistant, tool = normalize_messages(messages, as_parts=False)
    assert assistant["content"] is None
    assert [c["function"]["arguments"] for c in assistant["tool_calls"]] == [{"a": 1}, {}]
    assert call["function"]["arguments"] == '{"a": 1}', "the caller's messages stay as they are"
    assert tool == {"role": "tool", "tool_call_id": "1", "content": "2"}


def test_null_fields_are_as_good_as_absent() -> None:
    message = {"role": "assistant", "content": None, "tool_calls": None, "refusal": None}
    assert normalize_messages([message], as_parts=False) == [{"role": "assistant", "content": ""}]
    assert normalize_messages([message], as_parts=True) == [{"role": "assistant", "content": []}]


class TestErrors:
    def test_no_template(self, tokenizer: Any) -> None:
        tokenizer.chat_template = None
        with pytest.raises(InvalidRequestError, match="no chat template") as caught:
            render_chat(tokenizer, USER)
        assert caught.value.param == "chat_template"

    @pytest.mark.parametrize(
        ("template", "message", "param"),
        [
            ("{{ raise_exception('roles must alternate') }}", "roles must alternate", "messages"),
            ("{% for %}", r"not valid Jinja.*line 1", "chat_template"),
            ("{{ messages[9].content }}", "'list object|no element|undefined", "messages"),
            ("{{ messages + 1 }}", "TypeError", "messages"),
            ("{{ 1 // 0 }}", "ZeroDivisionError", "messages"),
            ("{{ ''.__class__.__mro__ }}", "unsafe", "messages"),
            (" ", "must be Jinja source", "chat_template"),
        ],
    )
    def test_templates_that_fail(self, tokenizer: Any, template: str, message: str, param: str) -> None:
        with pytest.raises(InvalidRequestError, match=message) as caught:
            render_chat(tokenizer, USER, chat_template=template)
        assert caught.value.param == param

    @pytest.mark.parametrize(
        ("messages", "param"),
        [
            ([], "messages"),
            ("Hi", "messages"),
            ({"role": "user"}, "messages"),
            (["Hi"], "messages[0]"),
            ([{"content": "Hi"}], "messages[0].role"),
            ([{"role": 1, "content": "Hi"}], "messages[0].role"),
            ([*USER, {"role": "user"}], "messages[1].content"),
            ([{"role": "user", "content": 5}], "messages[0].content"),
            ([{"role": "user", "content": {"type": "text"}}], "messages[0].content"),
            ([{"role": "user", "content": [5]}], "messages[0].content[0]"),
            ([{"role": "user", "content": [{"text": "no type"}]}], "messages[0].content[0]"),
            ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0]"),
            ([{"role": "assistant", "tool_calls": "f()"}], "messages[0].tool_calls"),
            ([{"role": "assistant", "tool_calls": [{"id": 1}]}], "messages[0].tool_calls[0]"),
            (
                [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
                "messages[0].tool_calls[0].function.arguments",
            ),
        ],
    )
    def test_malformed_messages(self, tokenizer: Any, messages: Any, param: str) -> None:
        with pytest.raises(InvalidRequestError) as caught:
            render_chat(tokenizer, messages)
        assert caught.value.param == param

    def test_images_are_not_served(self, tokenizer: Any) -> None:
        image = {"type": "image_url", "image_url": {"url": "data:"}}
        with pytest.raises(UnsupportedError, match=r"messages\[0\].content\[0\] has type 'image_url'"):
            render_chat(tokenizer, [{"role": "user", "content": [image]}])

    def test_contradictions(self, tokenizer: Any) -> None:
        with pytest.raises(InvalidRequestError, match="both true") as caught:
            render_chat(tokenizer, USER, continue_final_message=True)
        assert caught.value.param == "continue_final_message"
        with pytest.raises(InvalidRequestError, match="at most one"):
            render_chat(tokenizer, USER, chat_template_kwargs={"continue_final_message": True})
        with pytest.raises(InvalidRequestError, match="'messages'"):
            render_chat(tokenizer, USER, chat_template_kwargs={"messages": []})
        nothing = [*USER, {"role": "assistant", "content": ""}]
        with pytest.raises(InvalidRequestError, match="no text to continue"):
            render_chat(tokenizer, nothing, add_generation_prompt=False, continue_final_message=True)

    def test_wrong_options(self, tokenizer: Any) -> None:
        with pytest.raises(ConfigError, match="auto, string, openai"):
            render_chat(tokenizer, USER, content_format="parts")  # type: ignore[arg-type]
        with pytest.raises(InvalidRequestError, match="tools must be a list"):
            render_chat(tokenizer, USER, tools="f")  # type: ignore[arg-type]


def test_tools_need_a_template_that_shows_them(tokenizer: Any) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(InvalidRequestError, match="no place for tools") as caught:
        render_chat(tokenizer, USER, tools=tools)
    assert caught.value.param == "tools"
    # Inside a macro it is still the template's own variable.
    inside = "{% macro m() %}{{ tools | length }}{% endmacro %}{{ m() }}"
    shown = render_chat(tokenizer, USER, tools=tools, chat_template=inside)
    assert shown == "1"


@pytest.mark.parametrize(
    ("template", "effort", "expected"),
    [
        ("{{ reasoning_effort }}", "high", "high"),
        ("{{ enable_thinking }}", "low", "True"),
        ("{{ enable_thinking }}", "none", "False"),
        ("{{ enable_thinking is defined }}", None, "False"),
    ],
)
def test_reasoning_effort(tokenizer: Any, template: str, effort: str | None, expected: str) -> None:
    assert render_chat(tokenizer, USER, chat_template=template, reasoning_effort=effort) == expected


def test_reasoning_effort_that_a_template_does_not_know_is_refused(tokenizer: Any) -> None:
    with pytest.raises(InvalidRequestError, match="knows no effort"):
        render_chat(tokenizer, USER, reasoning_effort="high")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
def test_reasoning_of_former_turns_goes_by_both_names(name: str) -> None:
    (message,) = normalize_messages([{"role": "assistant", "content": "a", name: "why"}], as_parts=False)
    assert message["reasoning"] == message["reasoning_content"] == "why"

"""Tool parsers by name: what tells the calls from the text, for each family of models.

A parser of one's own is a `ToolParser` registered under a name, from a file given by
`--tool-parser-plugin`.
"""

from __future__ import annotations

import re
import secrets
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from jaxllm.text.parsers import harmony
from jaxllm.text.parsers.events import Arguments, CallStart, Steps
from jaxllm.text.parsers.json_calls import (
    NamedArguments,
    call_list,
    call_object,
    call_object_list_or_named,
    call_object_or_list,
)
from jaxllm.text.parsers.python_calls import python_list
from jaxllm.text.parsers.reader import Reader
from jaxllm.text.parsers.sections import Section
from jaxllm.text.parsers.tools import Tools
from jaxllm.text.parsers.xml_calls import TaggedArguments


def random_call_id() -> str:
    """An id such as OpenAI's."""
    return f"call_{uuid.uuid4().hex[:24]}"


def mistral_call_id() -> str:
    """An id as Mistral's templates demand it: nine letters or digits."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a call whose arguments are JSON is written, for grammars that hold it to a schema.

    Attributes:
        trigger: what `begin` begins with; wherever it appears in a text, a call follows.
        begin: up to the arguments, with NAME where the function's name goes.
        end: behind the arguments.
    """

    trigger: str
    begin: str
    end: str


@dataclass(frozen=True, slots=True)
class ToolParser:
    """How a family of models writes its calls.

    Attributes:
        parse: tells content and calls of a text (`jaxllm.text.parsers.reader` has what it reads with).
        marks: what delimits the calls. Those that are special tokens are kept in the text for it.
        make_id: ids of calls whose text has none.
        form: how one call is written, where that is known and the same for every call.
    """

    parse: Callable[[Reader, Tools], Steps[None]]
    marks: tuple[str, ...] = ()
    make_id: Callable[[], str] = random_call_id
    form: CallForm | None = None


def _sections(
    section: Section,
    *marks: str,
    make_id: Callable[[], str] = random_call_id,
    form: CallForm | None = None,
) -> ToolParser:
    return ToolParser(section.parse, (*section.marks, *marks), make_id, form)


_DEEPSEEK_SECTION = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
_DEEPSEEK_CALL = ("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
_KIMI_SECTION = ("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>")
_KIMI_CALL = ("<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>")


def _deepseek(middle: str, header: str, begin: str, *close: str) -> ToolParser:
    item = NamedArguments(
        re.compile(header, re.DOTALL), _DEEPSEEK_CALL[0], middle, (*close, _DEEPSEEK_CALL[1])
    )
    section = Section(item, _DEEPSEEK_SECTION[:1], _DEEPSEEK_SECTION[1], bare=_DEEPSEEK_CALL[:1])
    end = "\n".join(("", *close)) + _DEEPSEEK_CALL[1]
    form = CallForm(_DEEPSEEK_CALL[0], _DEEPSEEK_CALL[0] + begin + middle, end)
    return _sections(section, *_DEEPSEEK_CALL, "<｜tool▁sep｜>", form=form)


_QWEN = TaggedArguments(
    open="<function=",
    name_ends=(">",),
    own_end=">",
    parameter="<parameter=",
    key_end=">",
    value=None,
    value_end="</parameter>",
    close="</function>",
    section_end="</tool_call>",
)
_GLM = TaggedArguments(
    open="",
    name_ends=("\n", "<arg_key>", "</tool_call>"),
    own_end=None,
    parameter="<arg_key>",
    key_end="</arg_key>",
    value="<arg_value>",
    value_end="</arg_value>",
    close="</tool_call>",
    section_end="</tool_call>",
)

_OBJECT = '{"name": "NAME", "arguments": '

_hermes = _sections(
    Section(call_object_or_list, ("<tool_call>",), "</tool_call>"),
    form=CallForm("<tool_call>", f"<tool_call>\n{_OBJECT}", "}\n</tool_call>"),
)
_qwen = _sections(Section(_QWEN, ("<tool_call>",), "</tool_call>", bare=("<function=",)))
_glm = _sections(Section(_GLM, ("<tool_call>",), "</tool_call>"), "<arg_key>", "</arg_key>", "<arg_value>")
_internlm = _sections(
    Section(call_object, ("<|action_start|><|plugin|>",), "<|action_end|>"),
    *("<|action_start|>", "<|plugin|>"),
    form=CallForm(
        "<|action_start|><|plugin|>",
        '<|action_start|><|plugin|>\n{"name": "NAME", "parameters": ',
        "}<|action_end|>",
    ),
)
_KIMI_ITEM = NamedArguments(
    re.compile(r"\s*(?P<id>(?:functions\.)?(?P<name>[\w.\-]+):\d+)\s*"),
    _KIMI_CALL[0],
    _KIMI_CALL[1],
    _KIMI_CALL[2:],
)
_kimi = _sections(Section(_KIMI_ITEM, _KIMI_SECTION[:1], _KIMI_SECTION[1], bare=_KIMI_CALL[:1]), *_KIMI_CALL)

TOOL_PARSERS: dict[str, ToolParser] = {
    "deepseek_v3": _deepseek(
        "\n```json\n", r"(?:.*<｜tool▁sep｜>)?\s*(?P<name>[\w.\-]+)\s*", "function<｜tool▁sep｜>NAME", "```"
    ),
    "deepseek_v31": _deepseek("<｜tool▁sep｜>", r"\s*(?P<name>[\w.\-]+)\s*", "NAME"),
    "glm45": _glm,
    "granite": _sections(Section(call_list, ("<|tool_call|>", "<tool_call>"))),
    "granite4": _hermes,
    "hermes": _hermes,
    "internlm": _internlm,
    "jamba": _sections(Section(call_list, ("<tool_calls>",), "</tool_calls>")),
    "kimi_k2": _kimi,
    "llama3_json": _sections(Section(call_object, ("<|python_tag|>",), bare=("{",), separators=";")),
    "llama4_pythonic": _sections(Section(python_list, ("<|python_start|>",), "<|python_end|>", bare=("[",))),
    "mistral": _sections(
        Section(call_object_list_or_named, ("[TOOL_CALLS]",)), "[ARGS]", "[CALL_ID]", make_id=mistral_call_id
    ),
    "openai": ToolParser(harmony.parse_harmony, harmony.MARKS),
    "phi4_mini_json": _sections(Section(call_list, ("functools",))),
    "pythonic": _sections(Section(python_list, bare=("[",))),
    "qwen3_coder": _qwen,
    "qwen3_xml": _qwen,
}


def register_tool_parser(name: str, parser: ToolParser) -> None:
    """Make a parser available to `--tool-call-parser NAME`; the name goes before one that is there."""
    TOOL_PARSERS[name] = parser


def named_call(name: str, like: ToolParser | None) -> ToolParser:
    """For completions that a grammar makes the arguments of one tool.

    Args:
        like: whose ids the call gets.
    """

    def parse(reader: Reader, tools: Tools) -> Steps[None]:
        yield from reader.skip_space()
        if (yield from reader.peek()):
            yield CallStart(name)
            yield from reader.rest(Arguments)

    return ToolParser(parse, make_id=random_call_id if like is None else like.make_id)


def call_list_of_any(like: ToolParser | None) -> ToolParser:
    """For completions that a grammar makes a JSON list of calls; see `named_call`."""
    section = Section(call_list, bare=("[",))
    return ToolParser(section.parse, make_id=random_call_id if like is None else like.make_id)

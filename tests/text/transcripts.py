"""What models write when they call tools, one or more transcripts for each parser."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

# Braces, quotes, tags and characters beyond ASCII, inside a string.
NASTY = 'a } b ] "q" \\ </tool_call> <b> é😀\n\tend {'

TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "options": {"type": "object"},
                    "exact": {"type": ["boolean", "null"]},
                },
            },
        },
    },
    {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "now"}},
]

Call = tuple[str, Any]


@dataclass(frozen=True)
class Transcript:
    """A text, and what is in it. Arguments that are no object are the text of unfinished ones."""

    parser: str
    text: str
    calls: list[Call] = field(default_factory=list)
    content: str = ""
    reasoning: str = ""

    def __str__(self) -> str:
        return f"{self.parser}:{self.text[:30]!r}"


def j(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def call_text(name: str, arguments: Any, key: str = "arguments") -> str:
    return j({"name": name, key: arguments})


PARIS = {"city": "Paris", "days": 3, "options": {"deep": [{"er": "}"}]}}
HARD = {"city": NASTY, "options": {"k": [1, {"x": None}, "]"]}, "exact": True}
SUM = {"a": 1, "b": -2.5}
TWO = [("get_weather", HARD), ("add", SUM)]
MESSAGE = "<|message|>"
DS_BEGIN, DS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
DS_CALL, DS_SEP, DS_CLOSE = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
KIMI_BEGIN, KIMI_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"


def hermes(name: str, arguments: Any) -> str:
    return f"<tool_call>\n{call_text(name, arguments)}\n</tool_call>"


def deepseek(name: str, arguments: Any) -> str:
    return f"{DS_CALL}function{DS_SEP}{name}\n```json\n{j(arguments)}\n```{DS_CLOSE}"


def deepseek31(name: str, arguments: Any) -> str:
    return f"{DS_CALL}{name}{DS_SEP}{j(arguments)}{DS_CLOSE}"


def kimi(name: str, index: int, arguments: Any) -> str:
    header = f"<|tool_call_begin|>functions.{name}:{index}<|tool_call_argument_begin|>"
    return f"{header}{j(arguments)}<|tool_call_end|>"


def written(value: Any) -> str:
    """A parameter as the templates of models with tags write it."""
    return value if isinstance(value, str) else j(value)


def qwen(name: str, arguments: dict[str, Any]) -> str:
    parameters = "".join(f"<parameter={k}>\n{written(v)}\n</parameter>\n" for k, v in arguments.items())
    return f"<tool_call>\n<function={name}>\n{parameters}</function>\n</tool_call>"


def glm(name: str, arguments: dict[str, Any]) -> str:
    pairs = "".join(
        f"<arg_key>{k}</arg_key>\n<arg_value>{written(v)}</arg_value>\n" for k, v in arguments.items()
    )
    return f"<tool_call>{name}\n{pairs}</tool_call>"


def python(name: str, arguments: dict[str, Any]) -> str:
    return f"{name}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


NO_TAGS = {**HARD, "city": 'a } "q" \\ <b> é😀\n\tend {'}
XML_TWO = [("get_weather", NO_TAGS), ("add", SUM)]
LIST = "[" + ", ".join(call_text(*one) for one in TWO) + "]"


def unread(parser: str, text: str) -> Transcript:
    """A text in which there is no call."""
    return Transcript(parser, text, content=text)


TRANSCRIPTS = [
    unread("hermes", "Just text, with 1 < 2 and a <tag>."),
    Transcript("hermes", hermes("get_weather", PARIS), [("get_weather", PARIS)]),
    Transcript(
        "hermes",
        f"I look.\n{hermes(*TWO[0])}\n{hermes(*TWO[1])}\nDone, é.",
        TWO,
        "I look.\n\nDone, é.",
    ),
    Transcript(
        "hermes", '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>', [("add", {"a": 1})]
    ),
    Transcript("hermes", '<tool_call>{"name": "now"}</tool_call>', [("now", {})]),
    Transcript("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', [("now", {})]),
    Transcript(
        "hermes", '<tool_call>{"name":"add","arguments":"{\\"a\\": 1}"}</tool_call>', [("add", {"a": 1})]
    ),
    # The outer bracket is missing.
    Transcript(
        "hermes", '<tool_call>{"name": "add", "arguments": {"a": 1}\n</tool_call>', [("add", {"a": 1})]
    ),
    Transcript("hermes", f"<tool_call>{LIST}</tool_call>", TWO),
    # No end at all, then cut off at some places.
    Transcript("hermes", f"<tool_call>\n{call_text('add', SUM)}", [("add", SUM)]),
    Transcript("hermes", f"<tool_call>\n{call_text('add', SUM)}\n</tool_c", [("add", SUM)]),
    Transcript("hermes", '<tool_call>{"name": "add", "arguments": {"a": "xy', [("add", '{"a": "xy')]),
    unread("hermes", '<tool_call>{"name": "ad'),
    unread("hermes", "Hm <tool_ca"),
    # Malformed.
    unread("hermes", "<tool_call>oops</tool_call>!"),
    unread("hermes", '<tool_call>{"nam": "x"}</tool_call>'),
    unread("hermes", '<tool_call>{"name": 5}</tool_call>'),
    unread("hermes", '<tool_call>{"name": "a", "arguments": [1]}'),
    Transcript("hermes", f"<tool_call>{{'x'\n{hermes('add', SUM)}", [("add", SUM)], "<tool_call>{'x'\n"),
    Transcript(
        "hermes",
        f"<tool_call>{call_text('add', SUM)} and more</tool_call> end",
        [("add", SUM)],
        " and more end",
    ),
    Transcript("granite", f"<|tool_call|>{LIST}", TWO),
    Transcript("granite", f"Sure. <tool_call> {LIST} Bye.", TWO, "Sure.  Bye."),
    unread("granite", "<|tool_call|>[1, 2]"),
    Transcript("granite4", hermes("add", SUM), [("add", SUM)]),
    Transcript(
        "internlm",
        f"I check.<|action_start|><|plugin|>\n{call_text('get_weather', HARD, 'parameters')}<|action_end|>\n",
        [("get_weather", HARD)],
        "I check.",
    ),
    unread("internlm", "<|action_start|><|interpreter|>x"),
    Transcript("jamba", f"Yes\n<tool_calls>[\n  {LIST[1:-1]}\n]</tool_calls>", TWO, "Yes\n"),
    Transcript("jamba", f'<tool_calls>[{call_text("add", SUM)}, {{"nam', [("add", SUM)], ', {"nam'),
    Transcript("llama3_json", call_text("get_weather", HARD, "parameters"), [("get_weather", HARD)]),
    Transcript("llama3_json", "; ".join(call_text(n, a, "parameters") for n, a in TWO), TWO),
    Transcript("llama3_json", f"<|python_tag|>{call_text('add', SUM)}", [("add", SUM)]),
    Transcript(
        "llama3_json", f"See {{this}}: {call_text('add', SUM)}; ok", [("add", SUM)], "See {this}: ; ok"
    ),
    unread(
        "llama3_json", '{"people": [{"name": "add", "parameters": {}}]} {"name": "Bob", "parameters": {}}'
    ),
    Transcript("mistral", f"[TOOL_CALLS]{LIST}", TWO),
    Transcript("mistral", f"[TOOL_CALLS] {LIST}", TWO),
    Transcript("mistral", f"So:[TOOL_CALLS]get_weather{j(HARD)}[TOOL_CALLS]add{j(SUM)}", TWO, "So:"),
    Transcript("mistral", f"[TOOL_CALLS]add[CALL_ID]abc123def[ARGS]{j(SUM)} ok", [("add", SUM)], " ok"),
    Transcript("mistral", f"[TOOL_CALLS]add[ARGS]{j(SUM)}", [("add", SUM)]),
    unread("mistral", "[TOOL_CALLS]add or so"),
    Transcript("phi4_mini_json", f"functools{LIST}", TWO),
    unread("phi4_mini_json", "Use functools.partial"),
    Transcript("deepseek_v3", f"{DS_BEGIN}{deepseek(*TWO[0])}\n{deepseek(*TWO[1])}{DS_END}", TWO),
    Transcript("deepseek_v3", f"Well. {deepseek('now', {})}", [("now", {})], "Well. "),
    unread("deepseek_v3", f"{DS_BEGIN}{DS_CALL}what?{DS_CLOSE}{DS_END}"),
    Transcript("deepseek_v31", f"Hi{DS_BEGIN}{deepseek31(*TWO[0])}{deepseek31(*TWO[1])}{DS_END}", TWO, "Hi"),
    Transcript(
        "kimi_k2", f"Hm.{KIMI_BEGIN}{kimi('get_weather', 0, HARD)}{kimi('add', 1, SUM)}{KIMI_END}", TWO, "Hm."
    ),
    unread("kimi_k2", f"{KIMI_BEGIN}<|tool_call_begin|>functions.ad"),
    Transcript("pythonic", f"[{python('get_weather', HARD)}, {python('add', SUM)}]", TWO),
    Transcript("pythonic", f"Ok [1] [x] [{python('now', {})}] done [2", [("now", {})], "Ok [1] [x]  done [2"),
    Transcript(
        "pythonic",
        '[get_weather(city="x", exact=true, options={"a": null})]',
        [("get_weather", {"city": "x", "exact": True, "options": {"a": None}})],
    ),
    Transcript("pythonic", r"[get_weather(city='\d+')]", [("get_weather", {"city": r"\d+"})]),
    Transcript("pythonic", "[add(a=1), add(b=)]", [("add", {"a": 1})], ", add(b=)]"),
    unread("pythonic", "[add(1)] [add(a=b)] [add(**x)] [other(a=1)]"),
    unread("pythonic", "[add(a={1, 2})]"),
    Transcript("llama4_pythonic", f"<|python_start|>[{python('add', SUM)}]<|python_end|>", [("add", SUM)]),
    Transcript("llama4_pythonic", f"[{python('get_weather', HARD)}]", [("get_weather", HARD)]),
    Transcript("qwen3_coder", f"I see.\n{qwen(*XML_TWO[0])}\n{qwen(*XML_TWO[1])}", XML_TWO, "I see.\n"),
    Transcript("qwen3_coder", qwen("now", {}), [("now", {})]),
    Transcript(
        "qwen3_xml", f"Let me.{qwen('add', SUM).removeprefix('<tool_call>')}", [("add", SUM)], "Let me.\n"
    ),
    Transcript(
        "qwen3_xml",
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nNew\n\nYork\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n<parameter=exact>\nNone\n</parameter>\n"
        "<parameter=odd>\n[1, 'x']\n</parameter></function></tool_call>",
        [("get_weather", {"city": "New\n\nYork", "days": 3, "exact": None, "odd": [1, "x"]})],
    ),
    Transcript(
        "qwen3_xml",
        "<tool_call><function=add><parameter=a>1</parameter></tool_call> then",
        [("add", {"a": 1})],
        " then",
    ),
    Transcript("qwen3_xml", "<function=get_weather><parameter=city>Par", [("get_weather", '{"city": "Par')]),
    Transcript("qwen3_xml", "<function=get_weather><parameter=days>1", [("get_weather", '{"days": 1')]),
    Transcript("qwen3_xml", "<function=get_weather><parameter=da", [("get_weather", "{")]),
    unread("qwen3_xml", "<function=x>no</function>"),
    Transcript("glm45", f"Ok.\n{glm(*XML_TWO[0])}\n{glm(*XML_TWO[1])}", XML_TWO, "Ok.\n"),
    Transcript("glm45", "<tool_call>now</tool_call>!", [("now", {})], "!"),
    Transcript(
        "glm45",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>12</arg_value></tool_call>",
        [("get_weather", {"city": "12"})],
    ),
    unread("glm45", "<tool_call>two words</tool_call>"),
    Transcript(
        "openai",
        f"<|channel|>analysis{MESSAGE}Think {{.<|end|>"
        f"<|start|>assistant<|channel|>commentary{MESSAGE}I look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json"
        f"{MESSAGE}{j(HARD)}<|call|>"
        f"<|start|>assistant to=functions.add<|channel|>commentary json{MESSAGE}{j(SUM)}<|call|>",
        TWO,
        "I look.",
        "Think {.",
    ),
    Transcript("openai", f"<|channel|>final{MESSAGE}Hi <|return|>", content="Hi "),
    Transcript("openai", f" to=functions.now<|channel|>commentary{MESSAGE}<|call|>", [("now", {})]),
    unread("openai", "No channels <here>."),
    Transcript("openai", f"<|channel|>analysis{MESSAGE}cut off <|e", reasoning="cut off <|e"),
]

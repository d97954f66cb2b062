"""Tools and reasoning in chats, around an engine that says what a script says."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxllm.errors import ConfigError
from jaxllm.serve.app import build_app
from jaxllm.serve.config import ServerConfig
from jaxllm.serve.parsing import OutputParsers, load_plugin
from jaxllm.text.grammar import GrammarMatcher
from jaxllm.text.parsers.tool_parsers import TOOL_PARSERS
from tests.serve.conftest import Api, serving
from tests.serve.fake_engine import demo_tokenizer
from tests.text.transcripts import PARIS, SUM, TOOLS, hermes

PATH = "/v1/chat/completions"
USER = [{"role": "user", "content": "Weather?"}]
TWO = f"I look.\n{hermes('get_weather', PARIS)}\n{hermes('add', SUM)}"
HERMES = ServerConfig(enable_auto_tool_choice=True, tool_call_parser="hermes")


@pytest.fixture
def tools_api() -> Iterator[Api]:
    with serving(HERMES, max_model_len=1024) as api:
        yield api


def says(text: str) -> Callable[[Any], str]:
    return lambda request: text


def ask(api: Api, **fields: Any) -> dict[str, Any]:
    return api.chat("Weather?", tools=TOOLS, **fields)["choices"][0]


def streamed(api: Api, **fields: Any) -> dict[str, Any]:
    """The message and the reason that a client makes of the chunks."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    reason = None
    for chunk in api.stream(PATH, {"messages": USER, "tools": TOOLS, **fields}):
        if not chunk["choices"]:
            continue
        (choice,) = chunk["choices"]
        assert reason is None, "a chunk after the end"
        reason = choice["finish_reason"]
        delta = choice["delta"]
        assert delta.get("reasoning") == delta.get("reasoning_content")
        message["content"] += delta.get("content", "")
        message["reasoning"] += delta.get("reasoning", "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                assert call["index"] == len(message["tool_calls"])
                message["tool_calls"].append(
                    {"id": call["id"], "type": call["type"], "function": {**call["function"]}}
                )
            else:
                message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return {"message": message, "finish_reason": reason}


def calls(choice: dict[str, Any]) -> list[tuple[str, Any]]:
    functions = [call["function"] for call in choice["message"].get("tool_calls", ())]
    return [(function["name"], json.loads(function["arguments"])) for function in functions]


def test_calls_apart_from_content(tools_api: Api) -> None:
    tools_api.fake.reply = says(TWO)
    whole, stream = ask(tools_api), streamed(tools_api)
    for choice in (whole, stream):
        assert choice["message"]["content"] == "I look.\n"
        assert calls(choice) == [("get_weather", PARIS), ("add", SUM)]
        assert choice["finish_reason"] == "tool_calls"
        ids = [call["id"] for call in choice["message"]["tool_calls"]]
        assert len(set(ids)) == 2
        assert all(call["type"] == "function" for call in choice["message"]["tool_calls"])


def test_the_model_is_shown_the_tools(tools_api: Api) -> None:
    ask(tools_api)
    prompt = demo_tokenizer().decode(tools_api.fake.submitted[-1].prompt_token_ids)
    definitions = [tool["function"] for tool in TOOLS]
    shown = [json.loads(line)["function"] for line in prompt.splitlines() if line.startswith('{"type"')]
    assert shown == definitions


def test_calls_alone_have_no_content(tools_api: Api) -> None:
    tools_api.fake.reply = says(hermes("now", {}))
    choice = ask(tools_api)
    assert choice["message"]["content"] is None
    assert calls(choice) == [("now", {})]
    chunks = tools_api.stream(PATH, {"messages": USER, "tools": TOOLS})
    assert all(not chunk["choices"][0]["delta"].get("content") for chunk in chunks)


def test_an_answer_without_calls(tools_api: Api) -> None:
    tools_api.fake.reply = says("It rains.")
    choice = ask(tools_api)
    assert choice["message"] == {"role": "assistant", "content": "It rains.", "refusal": None}
    assert choice["finish_reason"] == "stop"


def test_without_tools_nothing_is_parsed(tools_api: Api) -> None:
    tools_api.fake.reply = says(TWO)
    for fields in ({}, {"tools": TOOLS, "tool_choice": "none"}):
        choice = tools_api.chat(**fields)["choices"][0]
        assert (choice["message"]["content"], choice["finish_reason"]) == (TWO, "stop")


def test_a_call_cut_off_says_length(tools_api: Api) -> None:
    tools_api.fake.reply = says(hermes("get_weather", {"city": "x" * 200}))
    for choice in (ask(tools_api, max_tokens=40), streamed(tools_api, max_tokens=40)):
        assert choice["finish_reason"] == "length"
        arguments = choice["message"]["tool_calls"][0]["function"]["arguments"]
        assert arguments.startswith('{"city": "xx')
        with pytest.raises(ValueError):
            json.loads(arguments)


def test_one_call_where_no_parallel_ones_are_wanted(tools_api: Api) -> None:
    tools_api.fake.reply = says(TWO)
    for read in (ask, streamed):
        assert len(calls(read(tools_api, parallel_tool_calls=False))) == 1
        assert len(calls(read(tools_api, parallel_tool_calls=True))) == 2


def test_every_choice_has_calls_of_its_own(tools_api: Api) -> None:
    tools_api.fake.reply = lambda request: hermes("add", {"a": int(request.request_id[0])})
    choices = tools_api.chat(tools=TOOLS, n=3)["choices"]
    assert [calls(choice) for choice in choices] == [[("add", {"a": i})] for i in range(3)]
    fragments = {0: "", 1: "", 2: ""}
    for chunk in tools_api.stream(PATH, {"messages": USER, "tools": TOOLS, "n": 3}):
        (choice,) = chunk["choices"]
        for call in choice["delta"].get("tool_calls", ()):
            fragments[choice["index"]] += call["function"]["arguments"]
    assert {i: json.loads(text) for i, text in fragments.items()} == {i: {"a": i} for i in range(3)}


def test_logprobs_and_usage_cover_every_token(tools_api: Api) -> None:
    tools_api.fake.reply = says(TWO)
    fields: dict[str, Any] = {"logprobs": True, "stream_options": {"include_usage": True}}
    chunks = tools_api.stream(PATH, {"messages": USER, "tools": TOOLS, **fields})
    count = chunks[-1]["usage"]["completion_tokens"]
    entries = [e for c in chunks[:-1] for e in (c["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert len(entries) == count


def test_results_of_tools_reach_the_model(tools_api: Api) -> None:
    tools_api.fake.reply = says("3.")
    call = {"id": "call_1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": 2}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "result three"},
    ]
    assert tools_api.post(PATH, {"messages": messages, "tools": TOOLS}).status_code == 200
    prompt = demo_tokenizer().decode(tools_api.fake.submitted[-1].prompt_token_ids)
    assert '<tool_call>{"name": "add", "arguments": {"a": 1, "b": 2}}</tool_call>' in prompt
    assert "result three" in prompt


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": []}, "tools"),
        ({"tools": [{"type": "custom"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, "tools"),
        ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"reasoning_effort": "huge"}, "reasoning_effort"),
        ({"include_reasoning": False}, "include_reasoning"),
    ],
)
def test_what_does_not_fit_is_refused(tools_api: Api, fields: dict[str, Any], param: str) -> None:
    assert tools_api.refused(PATH, {"messages": USER, **fields})["param"] == param


def test_auto_needs_a_parser(api: Api) -> None:
    error = api.refused(PATH, {"messages": USER, "tools": TOOLS})
    assert error["param"] == "tool_choice"
    assert "--enable-auto-tool-choice" in error["message"]


def test_tools_may_be_kept_from_the_prompt() -> None:
    for exclude in (False, True):
        config = ServerConfig(exclude_tools_when_tool_choice_none=exclude)
        with serving(config, max_model_len=1024) as api:
            api.chat(tools=TOOLS, tool_choice="none")
            prompt = demo_tokenizer().decode(api.fake.submitted[-1].prompt_token_ids)
            assert ("get_weather" in prompt) != exclude


def test_reasoning_apart_from_content() -> None:
    text = f"<think>\nWell then.\n</think>\n\n{TWO}"
    config = ServerConfig(enable_auto_tool_choice=True, tool_call_parser="hermes", reasoning_parser="qwen3")
    with serving(config, max_model_len=1024) as api:
        api.fake.reply = says(text)
        whole, stream = ask(api), streamed(api)
        for choice in (whole, stream):
            assert choice["message"]["reasoning"] == "Well then."
            assert choice["message"]["content"] == "I look.\n"
            assert len(calls(choice)) == 2
        assert whole["message"]["reasoning_content"] == "Well then."
        hidden = ask(api, include_reasoning=False)
        assert "reasoning" not in hidden["message"]
        assert streamed(api, include_reasoning=False)["message"]["reasoning"] == ""
        usage = api.chat("Weather?")["usage"]
        count = len(demo_tokenizer().encode("Well then.", add_special_tokens=False))
        assert usage["completion_tokens_details"] == {"reasoning_tokens": count}
        options = {"messages": USER, "stream_options": {"include_usage": True}}
        assert api.stream(PATH, options)[-1]["usage"] == usage


def test_the_prompt_may_open_or_close_the_reasoning() -> None:
    own = (
        "{{ messages[0].content }}{% if enable_thinking %}<think>{% else %}<think>\n\n</think>\n\n{% endif %}"
    )
    with serving(ServerConfig(chat_template=own, reasoning_parser="qwen3")) as api:
        api.fake.reply = says("So</think>Yes")
        message = api.chat(reasoning_effort="low")["choices"][0]["message"]
        assert (message["reasoning"], message["content"]) == ("So", "Yes")
        message = api.chat(reasoning_effort="none")["choices"][0]["message"]
        assert message["content"] == "So</think>Yes"


def test_marks_that_are_special_tokens_stay_in_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ServerConfig(enable_auto_tool_choice=True, tool_call_parser="hermes")
    with serving(config, max_model_len=1024) as api:
        ask(api)
        assert api.fake.submitted[-1].sampling_params.skip_special_tokens
        special = "jaxllm.serve.parsing._special_tokens"
        monkeypatch.setattr(special, lambda tokenizer: {"<tool_call>"})
        ask(api)
        assert not api.fake.submitted[-1].sampling_params.skip_special_tokens
        api.chat()
        assert api.fake.submitted[-1].sampling_params.skip_special_tokens


def listed(*wanted: tuple[str, Any]) -> str:
    return json.dumps([{"name": name, "parameters": arguments} for name, arguments in wanted])


def fits(api: Api, text: str) -> bool:
    """Whether the form of the newest request admits a text."""
    grammar = api.fake.submitted[-1].grammar
    assert grammar is not None
    matcher = grammar.fork()  # type: ignore[attr-defined]
    ids = demo_tokenizer().encode(text, add_special_tokens=False)
    eos = next(iter(api.fake.submitted[-1].eos_token_ids))
    return all(matcher.accept(i) is None for i in [*ids, eos])


def test_a_required_call_is_a_form_of_the_answer() -> None:
    with serving(max_model_len=1024) as api:  # No parser is needed for it.
        api.fake.reply = says(listed(("get_weather", PARIS), ("add", SUM)))
        for choice in (ask(api, tool_choice="required"), streamed(api, tool_choice="required")):
            assert calls(choice) == [("get_weather", PARIS), ("add", SUM)]
            assert not choice["message"]["content"]
            assert choice["finish_reason"] == "tool_calls"
        assert fits(api, listed(("get_weather", PARIS), ("now", {})))
        for bad in ("[]", "No.", listed(("other", {})), listed(("get_weather", {"days": "x"}))):
            assert not fits(api, bad), bad
        ask(api, tool_choice="required", parallel_tool_calls=False)
        assert fits(api, listed(("add", SUM)))
        assert not fits(api, listed(("add", SUM), ("add", SUM)))


def test_a_named_call_is_the_form_of_its_arguments() -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    with serving(max_model_len=1024) as api:
        api.fake.reply = says(json.dumps(PARIS))
        for choice in (ask(api, tool_choice=named), streamed(api, tool_choice=named)):
            assert calls(choice) == [("get_weather", PARIS)]
            assert choice["finish_reason"] == "stop"
        assert fits(api, '{"city": "x"}')
        assert not fits(api, '{"city": 5}')


def test_definitions_of_several_tools_stay_reachable() -> None:
    def tool(name: str, kind: str) -> dict[str, Any]:
        schema = {
            "type": "object",
            "properties": {"x": {"$ref": f"#/$defs/{name}"}},
            "required": ["x"],
            "$defs": {name: {"type": kind}},
        }
        return {"type": "function", "function": {"name": name, "parameters": schema}}

    with serving(max_model_len=1024) as api:
        tools = [tool("f", "integer"), tool("g", "boolean")]
        api.chat(tools=tools, tool_choice="required")
        assert fits(api, listed(("f", {"x": 1}), ("g", {"x": True})))
        assert not fits(api, listed(("f", {"x": True})))


def test_strict_functions_are_held_to_their_schemas(tools_api: Api) -> None:
    weather = {**TOOLS[0]["function"], "strict": True}
    tools = [{"type": "function", "function": weather}, TOOLS[1]]
    tools_api.fake.reply = says(TWO)
    choice = tools_api.chat(tools=tools)["choices"][0]
    assert len(calls(choice)) == 2
    assert fits(tools_api, "Just text <b>.")
    assert fits(tools_api, TWO)
    assert not fits(tools_api, hermes("get_weather", {"city": 5}))
    assert not fits(tools_api, hermes("other", {}))
    assert fits(tools_api, hermes("add", {"anything": 5}))
    tools_api.chat(tools=tools, parallel_tool_calls=False)
    assert not fits(tools_api, TWO)
    config = ServerConfig(enable_auto_tool_choice=True, tool_call_parser="pythonic")
    with serving(config, max_model_len=1024) as api:
        error = api.refused(PATH, {"messages": USER, "tools": tools})
        assert "hermes" in error["message"]
        assert api.chat(tools=tools, tool_choice="none")


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, '{"a": 1}', "[1]"),
        ({"structured_outputs": {"json": {"type": "integer"}}}, "17", '"17"'),
        ({"structured_outputs": {"json": '{"type": "integer"}'}}, "17", "x"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes", "maybe"),
        ({"structured_outputs": {"regex": "[ab]+"}}, "abba", "abc"),
        ({"structured_outputs": {"grammar": 'start: "x" "y"'}}, "xy", "x"),
        (
            {"structured_outputs": {"structural_tag": {"format": {"type": "const_string", "value": "hi"}}}},
            "hi",
            "ho",
        ),
    ],
)
def test_an_answer_of_a_form_or_calls(tools_api: Api, fields: dict[str, Any], good: str, bad: str) -> None:
    tools_api.fake.reply = says(hermes("add", SUM))
    assert calls(ask(tools_api, **fields)) == [("add", SUM)]
    assert fits(tools_api, good)
    assert fits(tools_api, hermes("add", SUM))
    assert fits(tools_api, f"{hermes('add', SUM)}\n{hermes('now', {})}")
    for text in (bad, f"{good} {hermes('add', SUM)}", hermes("other", {}), "Just text."):
        assert not fits(tools_api, text), text


def test_a_form_and_calls_that_no_grammar_knows() -> None:
    config = ServerConfig(enable_auto_tool_choice=True, tool_call_parser="qwen3_coder")
    with serving(config, max_model_len=1024) as api:
        body = {"messages": USER, "tools": TOOLS, "response_format": {"type": "json_object"}}
        error = api.refused(PATH, body)
        assert "'response_format' asks for a form" in error["message"]
        assert api.post(PATH, {**body, "tool_choice": "none"}).status_code == 200


def test_calls_and_another_form_exclude_each_other(tools_api: Api) -> None:
    body = {"messages": USER, "tools": TOOLS, "tool_choice": "required"}
    error = tools_api.refused(PATH, {**body, "response_format": {"type": "json_object"}})
    assert error["param"] == "tool_choice"


def test_a_schema_that_cannot_be_enforced_is_blamed_on_the_tools() -> None:
    bad = {"type": "function", "function": {"name": "f", "parameters": {"type": "nonsense"}}}
    with serving(max_model_len=1024) as api:
        error = api.refused(PATH, {"messages": USER, "tools": [bad], "tool_choice": "required"})
        assert error["param"] == "tools"


def test_a_form_holds_behind_the_reasoning() -> None:
    with serving(ServerConfig(reasoning_parser="deepseek_r1"), max_model_len=1024) as api:
        api.fake.reply = says("So.</think>" + listed(("add", SUM)))
        for choice in (ask(api, tool_choice="required"), streamed(api, tool_choice="required")):
            assert choice["message"]["reasoning"] == "So."
            assert calls(choice) == [("add", SUM)]
        mark = demo_tokenizer().encode("</think>", add_special_tokens=False)
        grammar = api.fake.submitted[-1].grammar.fork(mark)  # type: ignore[union-attr]
        assert not grammar.is_active
        for token in demo_tokenizer().encode("So.</think>", add_special_tokens=False):
            assert grammar.accept(token) is None
        assert api.fake.submitted[-1].grammar._awaited == mark  # type: ignore[union-attr]
        assert grammar.is_active


PLUGIN = """
from jaxllm.text.parsers.events import Arguments, CallStart, Content
from jaxllm.text.parsers.tool_parsers import ToolParser, register_tool_parser

def parse(reader, tools):
    while (yield from reader.until(("!call ",), Content)):
        reader.take(6)
        name = yield from reader.collect((";",))
        yield CallStart(name)
        yield Arguments("{}")
        reader.take(1)

register_tool_parser("shouted", ToolParser(parse))
"""


def test_a_parser_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "plugin.py"
    path.write_text(PLUGIN)
    config = ServerConfig(
        enable_auto_tool_choice=True, tool_call_parser="shouted", tool_parser_plugin=str(path)
    )
    try:
        with serving(config, max_model_len=1024) as api:
            api.fake.reply = says("So !call now; and !call add;.")
            for choice in (ask(api), streamed(api)):
                assert calls(choice) == [("now", {}), ("add", {})]
                assert choice["message"]["content"] == "So  and ."
    finally:
        TOOL_PARSERS.pop("shouted", None)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (ServerConfig(enable_auto_tool_choice=True), "--tool-call-parser"),
        (ServerConfig(tool_call_parser="hermess"), "hermes"),
        (ServerConfig(reasoning_parser="r1"), "deepseek_r1"),
        (ServerConfig(tool_call_parser="openai", reasoning_parser="qwen3"), "openai_gptoss"),
        (ServerConfig(tool_parser_plugin="/no/such.py"), "cannot be read"),
        (ServerConfig(tool_parser_plugin="/no/such.txt"), "no Python file"),
    ],
)
def test_flags_that_do_not_fit_are_refused(config: ServerConfig, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        OutputParsers.from_config(config)


def test_a_plugin_that_fails_says_how(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("1 / 0")
    with pytest.raises(ConfigError, match="ZeroDivisionError"):
        load_plugin(str(path))


def test_the_app_checks_its_parsers(api: Api) -> None:
    with pytest.raises(ConfigError):
        build_app(api.engine, ServerConfig(tool_call_parser="none such"), model_names=("fake",))


def test_reasoning_may_be_bounded() -> None:
    [end, *_] = demo_tokenizer().encode("</think>", add_special_tokens=False)
    with serving(ServerConfig(reasoning_parser="qwen3")) as api:
        api.chat(thinking_token_budget=0)
        grammar = api.fake.submitted[-1].grammar
        assert isinstance(grammar, GrammarMatcher) and grammar.forced == end
        assert api.fake.submitted[-1].needs_host_tokens
        for unbounded in (None, -1):
            api.chat(thinking_token_budget=unbounded)
            assert api.fake.submitted[-1].grammar is None
        assert api.refused("/v1/chat/completions", {"messages": USER, "thinking_token_budget": -2})[
            "param"
        ] == ("thinking_token_budget")
    with serving() as api:
        error = api.refused("/v1/chat/completions", {"messages": USER, "thinking_token_budget": 5})
        assert error["param"] == "thinking_token_budget" and "--reasoning-parser" in error["message"]

"""Which parsers this server reads a model's answers with, and how those of one chat are read."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from jaxllm.errors import ConfigError, InvalidRequestError
from jaxllm.serve.config import ServerConfig
from jaxllm.serve.protocol import ChatCompletionRequest
from jaxllm.serve.tools import NamedToolChoice, form_with_calls
from jaxllm.structured_outputs import StructuredOutputsParams
from jaxllm.text.parsers import harmony
from jaxllm.text.parsers.message import MessageFormat
from jaxllm.text.parsers.reasoning import REASONING_FORMATS, ReasoningFormat
from jaxllm.text.parsers.tool_parsers import TOOL_PARSERS, ToolParser, call_list_of_any, named_call
from jaxllm.text.parsers.tools import tools_of
from jaxllm.text.thinking import ThinkingBudget

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Demands:
    """What the reading of an answer demands of its generation.

    Attributes:
        skips_special_tokens: the text may do without them; else they stay, whatever the request says.
        form: of the text, in the place of the one that the request itself asks for; None leaves that.
        form_after: token ids behind which a form is to hold, the request's or this one; none for at once.
        thinking: bound of the reasoning; None is none.
    """

    skips_special_tokens: bool = True
    form: StructuredOutputsParams | None = None
    form_after: tuple[int, ...] = ()
    thinking: ThinkingBudget | None = None


NO_DEMANDS = Demands()


@dataclass(frozen=True, slots=True)
class OutputParsers:
    """The parsers that the operator chose.

    Attributes:
        tools: of `--tool-call-parser`.
        auto: whether the model may decide by itself to call a tool.
        reasoning: of `--reasoning-parser`.
    """

    tools: ToolParser | None = None
    auto: bool = False
    reasoning: ReasoningFormat | None = None

    @staticmethod
    def from_config(config: ServerConfig) -> OutputParsers:
        """The parsers that the flags name.

        Raises:
            ConfigError: an unknown name, or a plugin that cannot be loaded.
        """
        if config.tool_parser_plugin is not None:
            load_plugin(config.tool_parser_plugin)
        if config.enable_auto_tool_choice and config.tool_call_parser is None:
            raise ConfigError(
                "--enable-auto-tool-choice needs --tool-call-parser NAME, one of"
                f" {', '.join(sorted(TOOL_PARSERS))}.",
                param="tool_call_parser",
            )
        tools = _named(TOOL_PARSERS, "tool_call_parser", config.tool_call_parser)
        reasoning = _named(REASONING_FORMATS, "reasoning_parser", config.reasoning_parser)
        is_harmony = tools is not None and tools.parse is harmony.parse_harmony
        if is_harmony and reasoning is not None and not reasoning.is_harmony:
            raise ConfigError(
                f"--reasoning-parser {config.reasoning_parser} cannot go with --tool-call-parser"
                f" {config.tool_call_parser}, whose format has reasoning of its own; use openai_gptoss.",
                param="reasoning_parser",
            )
        return OutputParsers(tools, config.enable_auto_tool_choice, reasoning)

    def check(self, body: ChatCompletionRequest) -> None:
        """Refuse a chat that needs a parser which is not here.

        Raises:
            InvalidRequestError: naming the field.
        """
        if body.tools and body.chosen_tool == "auto" and not self.auto:
            raise InvalidRequestError(
                "Field 'tool_choice' is 'auto': this server finds no calls in what the model writes. Start"
                " it with --enable-auto-tool-choice and --tool-call-parser NAME, or say 'required', 'none'"
                " or a tool.",
                param="tool_choice",
            )
        if not body.include_reasoning and self.reasoning is None:
            raise InvalidRequestError(
                "Field 'include_reasoning' is false: this server does not tell reasoning from the answer."
                " Start it with --reasoning-parser NAME, or leave the field out.",
                param="include_reasoning",
            )

    def calls_of(self, body: ChatCompletionRequest) -> ToolParser | None:
        """What tells the calls of a chat; None where it wants none."""
        if not body.tools or body.chosen_tool == "none":
            return None
        if isinstance(body.chosen_tool, NamedToolChoice):
            return named_call(body.chosen_tool.function.name, self.tools)
        return call_list_of_any(self.tools) if body.chosen_tool == "required" else self.tools

    def format_of(self, body: ChatCompletionRequest, prompt: str) -> MessageFormat:
        """How the completions of a chat are read."""
        definitions = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        return MessageFormat(
            self.reasoning,
            self.calls_of(body),
            self.reasoning is not None and self.reasoning.starts_inside(prompt),
            tools_of(definitions),
            None if body.parallel_tool_calls is not False else 1,
        )

    def demands_of(self, body: ChatCompletionRequest, prompt: str, tokenizer: Any) -> Demands:
        """What the generation must heed for the answer to be read.

        Raises:
            InvalidRequestError: it wants a form, and no grammar knows how this model writes calls.
        """
        return Demands(
            self._marks_of(body).isdisjoint(_special_tokens(tokenizer)),
            self._form_of(body),
            () if self.reasoning is None else self.reasoning.answer_after(prompt, tokenizer),
            self._thinking_of(body, prompt, tokenizer),
        )

    def _thinking_of(self, body: ChatCompletionRequest, prompt: str, tokenizer: Any) -> ThinkingBudget | None:
        """The bound that a chat sets to its reasoning.

        Raises:
            InvalidRequestError: this server cannot tell where reasoning begins and ends.
        """
        budget = body.thinking_token_budget
        if budget is None or budget < 0:
            return None
        thinking = None if self.reasoning is None else self.reasoning.bound(budget, prompt, tokenizer)
        if thinking is None:
            why = "it has none" if self.reasoning is None else "openai_gptoss has no mark of its end alone"
            raise InvalidRequestError(
                f"Field 'thinking_token_budget' is {budget}: it needs a server with a --reasoning-parser that"
                f" knows where reasoning begins and ends, and {why}. Leave the field out.",
                param="thinking_token_budget",
            )
        return thinking

    def _marks_of(self, body: ChatCompletionRequest) -> set[str]:
        """What the parsers of a chat look for."""
        calls = self.calls_of(body)
        marks = set() if calls is None else set(calls.marks)
        if self.reasoning is not None:
            marks |= {*self.reasoning.starts, *self.reasoning.ends}
            if self.reasoning.is_harmony:
                marks |= set(harmony.MARKS)
        return marks

    def _form_of(self, body: ChatCompletionRequest) -> StructuredOutputsParams | None:
        """The form of an answer in which the model may call tools; None where that stays as it is."""
        tools = body.tools or []
        if not tools or body.chosen_tool != "auto" or self.tools is None:
            return None
        answer = body.constraint()
        strict = next((tool.function.name for tool in tools if tool.function.strict), None)
        if answer is None and strict is None:
            return None
        if self.tools.form is None:
            able = ", ".join(sorted(name for name, parser in TOOL_PARSERS.items() if parser.form is not None))
            what = f"'{strict}' is strict" if answer is None else f"'{answer[0]}' asks for a form"
            raise InvalidRequestError(
                f"Field 'tools' goes with no form of the answer here: {what}, and there is no grammar for the"
                f" calls that --tool-call-parser finds (there is for {able}). Leave it out, or set"
                " 'tool_choice' to 'none', 'required' or a tool.",
                param="tools",
            )
        parallel = body.parallel_tool_calls is not False
        return form_with_calls(
            tools, self.tools.form, None if answer is None else answer[1], parallel=parallel
        )


def load_plugin(path: str) -> None:
    """Run a Python file that registers parsers with `register_tool_parser`; once, however often asked.

    Raises:
        ConfigError: it cannot be read, or fails.
    """
    _run_file(str(Path(path).resolve()))


@lru_cache
def _run_file(path: str) -> None:
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(
            f"--tool-parser-plugin {path} is no Python file; give the path of one that ends in .py.",
            param="tool_parser_plugin",
        )
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except OSError as error:
        raise ConfigError(
            f"--tool-parser-plugin {path} cannot be read: {error.strerror}.", param="tool_parser_plugin"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"--tool-parser-plugin {path} fails with {type(error).__name__}: {error}.",
            param="tool_parser_plugin",
        ) from error


def _named(known: Mapping[str, T], field: str, name: str | None) -> T | None:
    if name is None or name in known:
        return None if name is None else known[name]
    raise ConfigError(
        f"--{field.replace('_', '-')} {name!r} is unknown; there are {', '.join(sorted(known))}.", param=field
    )


def _special_tokens(tokenizer: Any) -> set[str]:
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return {token.content for token in added if token.special} | set(tokenizer.all_special_tokens)

"""The fields of a chat that offer tools to the model, and what they demand of its answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxllm.errors import InvalidRequestError
from jaxllm.serve.body import Body, refusal
from jaxllm.structured_outputs import StructuredOutputsParams
from jaxllm.text.parsers.tool_parsers import CallForm


class FunctionDefinition(Body):
    """A function that the model may call; `parameters` is a JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[\w.:\-]+$", max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool on offer: a function."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(Body):
    """The function that must be called."""

    name: str


class NamedToolChoice(Body):
    """The choice of one tool."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


def check_tools(tools: Sequence[Tool] | None, choice: ToolChoice | None) -> None:
    """Refuse tools and choices that do not fit together.

    Raises:
        Refusal: naming the field.
    """
    if tools is None:
        if choice not in (None, "none", "auto"):
            raise refusal("Field 'tool_choice' asks for a call, but there are no 'tools'.", "tool_choice")
        return
    if not tools:
        raise refusal("Field 'tools' is empty: offer at least one tool, or leave it out.", "tools")
    names = [tool.function.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise refusal(
            f"Field 'tools' has two functions named '{twice}': each needs a name of its own.", "tools"
        )
    if isinstance(choice, NamedToolChoice) and choice.function.name not in names:
        raise refusal(
            f"Field 'tool_choice' names '{choice.function.name}', which is none of the tools:"
            f" {', '.join(names)}.",
            "tool_choice",
        )


def forced_form(
    tools: Sequence[Tool], choice: ToolChoice | None, *, parallel: bool
) -> StructuredOutputsParams | None:
    """The form that a required or named choice demands of the answer; None where it demands none.

    A named call is the object of its arguments; required calls are a list of
    `{"name": ..., "parameters": ...}`.
    """
    if isinstance(choice, NamedToolChoice):
        named = next(tool for tool in tools if tool.function.name == choice.function.name)
        return StructuredOutputsParams(json=_arguments_schema(named))
    if choice != "required":
        return None
    calls: list[dict[str, Any]] = []
    definitions: dict[str, dict[str, Any]] = {}
    for tool in tools:
        arguments = dict(_arguments_schema(tool))
        # References are from the root, so that definitions must go there.
        for key in ("$defs", "definitions"):
            definitions[key] = {**definitions.get(key, {}), **arguments.pop(key, {})}
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "parameters": arguments},
                "required": ["name", "parameters"],
                "additionalProperties": False,
            }
        )
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    return StructuredOutputsParams(json=schema | {key: value for key, value in definitions.items() if value})


def form_with_calls(
    tools: Sequence[Tool], call: CallForm, answer: StructuredOutputsParams | None, *, parallel: bool
) -> StructuredOutputsParams:
    """The form of an answer that may call tools, in which the calls of strict functions fit their schemas.

    Args:
        call: how the model writes a call.
        answer: the form of an answer without calls, which then excludes them; None is any text, in which
            they may stand.
        parallel: whether there may be several calls.
    """
    tags = [
        {
            "begin": call.begin.replace("NAME", tool.function.name),
            "content": {
                "type": "json_schema",
                "json_schema": _arguments_schema(tool) if tool.function.strict else {"type": "object"},
            },
            "end": call.end,
        }
        for tool in tools
    ]
    calls: dict[str, Any] = {"tags": tags, "stop_after_first": not parallel}
    if answer is None:
        calls |= {"type": "triggered_tags", "triggers": [call.trigger]}
        return StructuredOutputsParams(structural_tag={"format": calls})
    calls |= {"type": "tags_with_separator", "separator": "\n", "at_least_one": True}
    either = {"type": "or", "elements": [_format_of(answer), calls]}
    changes: dict[str, Any] = {answer.kind: None, "structural_tag": {"format": either}}
    return dataclasses.replace(answer, **changes)


def _format_of(answer: StructuredOutputsParams) -> dict[str, Any]:
    """A form as part of a structural tag."""
    match answer.kind:
        case "json":
            schema = json.loads(answer.json) if isinstance(answer.json, str) else answer.json
            return {"type": "json_schema", "json_schema": schema}
        case "json_object":
            return {"type": "json_schema", "json_schema": {"type": "object"}}
        case "regex":
            return {"type": "regex", "pattern": answer.regex}
        case "grammar":
            return {"type": "grammar", "grammar": answer.grammar}
        case "choice":
            texts = [{"type": "const_string", "value": text} for text in answer.choice or ()]
            return {"type": "or", "elements": texts}
        case _:
            tag = json.loads(answer.text())
            if "format" in tag:
                return dict(tag["format"])
            raise InvalidRequestError(
                "A structural tag with 'triggers' and 'structures' cannot go with tools that the model may"
                " call: write it with 'format'.",
                param="response_format",
            )


def _arguments_schema(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}}

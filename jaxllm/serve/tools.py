"""The fields of a chat that offer tools to the model, and what they demand of its answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

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


def strict_form(tools: Sequence[Tool], call: CallForm, *, parallel: bool) -> StructuredOutputsParams:
    """Free text in which every call of a strict function fits its schema.

    Args:
        call: how the model writes a call.
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
    triggered = {"type": "triggered_tags", "triggers": [call.trigger], "tags": tags}
    return StructuredOutputsParams(structural_tag={"format": {**triggered, "stop_after_first": not parallel}})


def _arguments_schema(tool: Tool) -> dict[str, Any]:
    return tool.function.parameters or {"type": "object", "properties": {}}

"""The fields that say what form an output has: `response_format`, `structured_outputs`, `guided_json` ..."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from jaxllm.errors import InvalidRequestError
from jaxllm.structured_outputs import StructuredOutputsParams

GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
}
"""Fields of older releases of vLLM, and what they are called in `structured_outputs`."""


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, protected_namespaces=())


class TextFormat(_Model):
    """No constraint."""

    type: Literal["text"]


class JSONObjectFormat(_Model):
    """Any JSON object."""

    type: Literal["json_object"]


class NamedSchema(_Model):
    """A JSON schema. It is enforced whether `strict` is said or not; the model is not told its name."""

    name: str
    description: str | None = None
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None


class JSONSchemaFormat(_Model):
    """JSON that fits a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


class StructuralTagFormat(_Model):
    """Free text with parts of fixed form, in either notation."""

    type: Literal["structural_tag"]
    format: dict[str, Any] | None = None
    triggers: list[str] | None = None
    structures: list[dict[str, Any]] | None = None


ResponseFormat = Annotated[
    TextFormat | JSONObjectFormat | JSONSchemaFormat | StructuralTagFormat, Field(discriminator="type")
]


def constraint_of(
    response_format: TextFormat | JSONObjectFormat | JSONSchemaFormat | StructuralTagFormat | None,
    structured_outputs: Mapping[str, Any] | None,
    guided: Mapping[str, Any],
    whitespace_pattern: str | None,
) -> tuple[str, StructuredOutputsParams] | None:
    """The constraint that a body asks for, and the field that does.

    Args:
        structured_outputs: fields of `StructuredOutputsParams`.
        guided: the fields of `GUIDED`, None where they are not given.
        whitespace_pattern: goes with `guided_json`.

    Raises:
        InvalidRequestError: there are several, or something is wrong with it; `param` is the field.
    """
    given: dict[str, dict[str, Any]] = {}
    match response_format:
        case JSONObjectFormat():
            given["response_format"] = {"json_object": True}
        case JSONSchemaFormat():
            given["response_format"] = {"json": response_format.json_schema.json_schema}
        case StructuralTagFormat():
            tag = response_format.model_dump(exclude_none=True, exclude={"type"})
            given["response_format"] = {"structural_tag": tag}
    if structured_outputs is not None:
        given["structured_outputs"] = dict(structured_outputs)
    for name, field in GUIDED.items():
        if guided.get(name) is not None:
            given[name] = {field: guided[name]}
    if len(given) > 1:
        raise InvalidRequestError(
            f"Fields {', '.join(repr(name) for name in given)} each ask for a form; give one of them.",
            param=next(iter(given)),
        )
    if whitespace_pattern is not None:
        if "guided_json" not in given:
            raise InvalidRequestError(
                "Field 'guided_whitespace_pattern' goes with 'guided_json'.",
                param="guided_whitespace_pattern",
            )
        given["guided_json"]["whitespace_pattern"] = whitespace_pattern
    if not given:
        return None
    [(name, arguments)] = given.items()
    known = [f.name for f in fields(StructuredOutputsParams)]
    unknown = next((key for key in arguments if key not in known), None)
    if unknown is not None:
        raise InvalidRequestError(f"Unknown field '{name}.{unknown}'; it has {', '.join(known)}.", param=name)
    try:
        return name, StructuredOutputsParams(**arguments)
    except InvalidRequestError as error:
        error.param = name
        raise

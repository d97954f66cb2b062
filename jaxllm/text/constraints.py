"""Constraints of requests in llguidance's language, and where in a schema something is wrong."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Collection, Iterator
from typing import Any
from urllib.parse import unquote

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from jaxllm.structured_outputs import StructuredOutputsParams
from jaxllm.text.structural_tag import quoted, structural_tag_grammar

# Keywords of JSON schema that hold a schema, a list of them, or a mapping to them.
_ONE = ("items", "additionalProperties", "additionalItems", "contains", "propertyNames", "not", "if", "then",
        "else", "unevaluatedItems", "unevaluatedProperties")  # fmt: skip
_SEVERAL = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_NAMED = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")

_MAX_TRIED = 200

# Patterns that one string must match, all of them. To find out whether any string can takes twice as long
# with each further one, and no limit of llguidance's stops it: 16 take 0.06 s, 20 take 1.3 s, 22 take 6.7 s.
_MAX_TOGETHER = 12


def grammar_of(params: StructuredOutputsParams, special_tokens: Collection[str]) -> str:
    """The grammar of a constraint.

    Args:
        special_tokens: tokens that text never spells out, such as `<|python_tag|>`.

    Raises:
        ValueError: it cannot be read; most of what may be wrong turns up when llguidance compiles it.
    """
    text = params.text()
    match params.kind:
        case "json":
            return llguidance.LLMatcher.grammar_from_json_schema(_written(json.loads(text), params))
        case "json_object":
            return llguidance.LLMatcher.grammar_from_json_schema(_written({"type": "object"}, params))
        case "regex":
            return llguidance.LLMatcher.grammar_from_regex(text)
        case "choice":
            options = " | ".join(quoted(option) for option in json.loads(text))
            return llguidance.LLMatcher.grammar_from_lark(f"start: {options}")
        case "grammar":
            if (together := 1 + _OPAQUE.sub("", text).count("&")) > _MAX_TOGETHER:
                raise ValueError(_too_many(together))
            return llguidance.LLMatcher.grammar_from_lark(any_to_lark(text))
        case _:
            return structural_tag_grammar(json.loads(text), lambda s: _written(s, params), special_tokens)


def _written(schema: dict[str, Any], params: StructuredOutputsParams) -> str:
    """A schema as text, with the options of the request in it."""
    options: dict[str, Any] = {}
    if params.disable_any_whitespace:
        options["whitespace_flexible"] = False
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    if options:
        schema = {**schema, "x-guidance": {**schema.get("x-guidance", {}), **options}}
    if params.disable_additional_properties:
        schema = _closed(schema)
    if (together := _most_together(schema)) > _MAX_TOGETHER:
        raise ValueError(_too_many(together))
    return json.dumps(schema, ensure_ascii=False)


# Strings and regexes of a grammar in Lark's notation.
_OPAQUE = re.compile(r'"(?:\\.|[^"\\\n])*"|/(?:\\.|[^/\\\n])+/')


def _too_many(together: int) -> str:
    return (
        f"one string would have to match {together} patterns at once, and {_MAX_TOGETHER} may be; write them"
        " as fewer."
    )


def _most_together(schema: dict[str, Any]) -> int:
    """How many patterns one string must match at most, anywhere in a schema; it may say more than that."""
    known: dict[int, int] = {}
    found, level = 0, [schema]
    while level and found <= _MAX_TOGETHER:
        found = max(found, *(_together(part, schema, known) for part in level))
        level = [part for outer in level for _, part in subschemas(outer)]
    return found


def _together(part: Any, root: dict[str, Any], known: dict[int, int]) -> int:
    """The patterns that a string must match for one part of a schema."""
    if not isinstance(part, dict):
        return 0
    if id(part) not in known:
        known[id(part)] = 0  # A reference back to itself adds nothing.
        count = ("pattern" in part) + ("format" in part)
        members = part.get("allOf")
        if isinstance(members, list):
            count += sum(_together(member, root, known) for member in members)
        for key in ("anyOf", "oneOf"):
            members = part.get(key)
            if isinstance(members, list):
                count += max((_together(member, root, known) for member in members), default=0)
        if isinstance(part.get("$ref"), str):
            count += _together(_pointed_at(part["$ref"], root), root, known)
        known[id(part)] = count
    return known[id(part)]


def _pointed_at(reference: str, root: dict[str, Any]) -> Any:
    """What a reference within the same schema names; None for any other."""
    target: Any = root if reference.startswith("#") else None
    for name in reference.split("/")[1:]:
        name = unquote(name).replace("~1", "/").replace("~0", "~")
        target = target.get(name) if isinstance(target, dict) else None
    return target


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """A schema whose objects hold no other properties than those listed, unless it speaks of others."""
    schema = copy.deepcopy(schema)
    level = [schema]
    while level:
        for part in level:
            if part.keys() & {"properties", "patternProperties"}:
                part.setdefault("additionalProperties", False)
        level = [part for outer in level for _, part in subschemas(outer)]
    return schema


def subschemas(schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas directly within one, each with its JSON pointer from there."""
    for key in _ONE:
        if isinstance(schema.get(key), dict):
            yield f"/{key}", schema[key]
    for key in _SEVERAL:
        if isinstance(schema.get(key), list):
            yield from ((f"/{key}/{i}", s) for i, s in enumerate(schema[key]) if isinstance(s, dict))
    for key in _NAMED:
        if isinstance(schema.get(key), dict):
            for name, part in schema[key].items():
                if isinstance(part, dict):
                    yield f"/{key}/{name.replace('~', '~0').replace('/', '~1')}", part


def locate(schema: dict[str, Any], message: str, limits: llguidance.LLParserLimits) -> str:
    """JSON pointer to the innermost part of a schema that fails with this message; "" is the whole.

    llguidance says what it cannot do, not where; so the parts are tried one by one.
    """
    shared: dict[str, Any] = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    pointer, tried = "", 0
    parts = subschemas(schema)
    while tried < _MAX_TRIED and (found := next(parts, None)) is not None:
        tried += 1
        step, part = found
        grammar = llguidance.LLMatcher.grammar_from_json_schema({**shared, **part})
        if llguidance.LLMatcher.validate_grammar(grammar, limits=limits) == message:
            pointer += step
            parts = subschemas(part)
    return pointer

"""Structural tags: free text in which parts of fixed form stand, as a grammar for llguidance.

The formats are xgrammar's (its "structural tag" documentation), which vLLM takes as they are.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from jaxllm.structured_outputs import MAX_GRAMMAR_CHARACTERS

FORMATS: dict[str, tuple[str, ...]] = {
    "const_string": ("value",),
    "json_schema": ("json_schema",),
    "regex": ("pattern",),
    "grammar": ("grammar",),
    "any_text": (),
    "sequence": ("elements",),
    "or": ("elements",),
    "tag": ("begin", "content", "end"),
    "triggered_tags": ("triggers", "tags", "at_least_one", "stop_after_first"),
    "tags_with_separator": ("tags", "separator", "at_least_one", "stop_after_first"),
}
"""Formats, and the fields that each has beside its type."""

_ANY_TEXT = r"/(.|\n)*/"


def structural_tag_grammar(
    spec: dict[str, Any], json_schema: Callable[[dict[str, Any]], str], special_tokens: Collection[str]
) -> str:
    """The grammar of a structural tag, in llguidance's Lark.

    Args:
        spec: `{"format": {...}}`, or the older `{"triggers": [...], "structures": [...]}`.
        json_schema: writes a schema, with the options of the request, as JSON.
        special_tokens: tokens that text never spells out, such as `<|python_tag|>`.

    Raises:
        ValueError: saying which part of it is wrong, and what is allowed there.
    """
    fields = {key: value for key, value in spec.items() if key != "type"}
    if spec.get("type", "structural_tag") != "structural_tag":
        raise ValueError(f"type must be 'structural_tag'; got {spec['type']!r}")
    if fields.keys() == {"format"}:
        where, format_ = "format", fields["format"]
    elif fields.keys() == {"triggers", "structures"}:
        where, format_ = "structures", _of_structures(fields)
    else:
        raise ValueError(f"it holds either 'format', or 'triggers' and 'structures'; got {sorted(fields)}")
    builder = _Builder(json_schema, special_tokens)
    start = builder.expression(format_, where)
    return builder.grammar(start)


def quoted(text: str) -> str:
    """A text as a string of Lark."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _of_structures(fields: dict[str, Any]) -> dict[str, Any]:
    """The older form in terms of the newer one."""
    tags = []
    for i, structure in enumerate(_list(fields["structures"], "structures")):
        where = f"structures[{i}]"
        if not isinstance(structure, dict) or structure.keys() != {"begin", "schema", "end"}:
            raise ValueError(f"{where} must hold 'begin', 'schema' and 'end'")
        content = {"type": "json_schema", "json_schema": structure["schema"]}
        tags.append({"begin": structure["begin"], "content": content, "end": structure["end"]})
    return {"type": "triggered_tags", "triggers": fields["triggers"], "tags": tags}


class _Builder:
    """Writes rules. An expression is what may stand on the right of one."""

    def __init__(self, json_schema: Callable[[dict[str, Any]], str], special_tokens: Collection[str]) -> None:
        self._json_schema = json_schema
        self._special = frozenset(special_tokens)
        self._split = re.compile("(" + "|".join(map(re.escape, sorted(self._special))) + ")")
        self._rules: list[str] = []
        self._grammars: list[dict[str, str]] = []

    def grammar(self, start: str) -> str:
        """All of it, from the expression of the whole."""
        lark = "\n".join(["%llguidance {}", f"start: {start}", *self._rules]) + "\n"
        if not self._grammars:
            return lark
        return json.dumps({"grammars": [{"name": "tags", "lark_grammar": lark}, *self._grammars]})

    def _rule(self, body: str, options: str = "") -> str:
        name = f"rule_{len(self._rules)}"
        self._rules.append(f"{name}{options}: {body}")
        return name

    def _literal(self, text: str) -> str:
        """A text, in which special tokens are named."""
        parts = self._split.split(text) if self._special else [text]
        return " ".join(p if p in self._special else quoted(p) for p in parts if p) or '""'

    def _text_until(self, end: str) -> str:
        """Any text up to the first `end`, and that."""
        if end in self._special:
            return f"{_ANY_TEXT} {end}"
        return self._rule(f"{_ANY_TEXT} {quoted(end)}", "[lazy]")

    def expression(self, spec: Any, where: str) -> str:
        """The expression of a format."""
        kind = spec.get("type") if isinstance(spec, dict) else None
        if kind not in FORMATS:
            raise ValueError(f"{where}.type must be one of {', '.join(FORMATS)}; got {kind!r}")
        _check_fields(spec, kind, where)
        match kind:
            case "const_string":
                return self._literal(_string(spec, "value", where))
            case "json_schema":
                schema = _field(spec, "json_schema", where)
                if not isinstance(schema, dict):
                    raise ValueError(f"{where}.json_schema must be an object")
                return self._rule(f"%json {self._json_schema(schema)}")
            case "regex":
                return f"/{llguidance.regex_to_lark(_string(spec, 'pattern', where), '')}/"
            case "grammar":
                name = f"grammar_{len(self._grammars)}"
                text = _string(spec, "grammar", where)
                if len(text) > MAX_GRAMMAR_CHARACTERS:
                    raise ValueError(
                        f"{where}.grammar has {len(text)} characters; at most {MAX_GRAMMAR_CHARACTERS}"
                    )
                lark = any_to_lark(text)
                self._grammars.append({"name": name, "lark_grammar": lark})
                return f"@{name}"
            case "any_text":
                return _ANY_TEXT
            case "sequence" | "or":
                elements = _list(_field(spec, "elements", where), f"{where}.elements")
                parts = [self.expression(e, f"{where}.elements[{i}]") for i, e in enumerate(elements)]
                return "(" + (" " if kind == "sequence" else " | ").join(parts) + ")"
            case "tag":
                return self._tag(spec, "", where)
            case "triggered_tags":
                return self._triggered_tags(spec, where)
            case _:
                return self._separated_tags(spec, where)

    def _tag(self, tag: Any, trigger: str, where: str) -> str:
        """Begin, content and end, without the trigger that the beginning begins with."""
        _check_fields(tag, "tag", where)
        begin, end = _string(tag, "begin", where), _string(tag, "end", where)
        content = _field(tag, "content", where)
        begin = self._literal(begin.removeprefix(trigger))
        if isinstance(content, dict) and content.get("type") == "any_text" and end:
            return self._rule(f"{begin} {self._text_until(end)}")
        return self._rule(f"{begin} {self.expression(content, f'{where}.content')} {self._literal(end)}")

    def _triggered_tags(self, spec: dict[str, Any], where: str) -> str:
        triggers = _list(_field(spec, "triggers", where), f"{where}.triggers")
        if not all(isinstance(trigger, str) and trigger for trigger in triggers):
            raise ValueError(f"{where}.triggers must be non-empty strings")
        by_trigger: dict[str, list[str]] = {}
        for i, tag in enumerate(_list(_field(spec, "tags", where), f"{where}.tags")):
            begin = _string(tag, "begin", f"{where}.tags[{i}]")
            trigger = next((t for t in triggers if begin.startswith(t)), None)
            if trigger is None:
                raise ValueError(f"{where}.tags[{i}].begin {begin!r} begins with none of {triggers}")
            by_trigger.setdefault(trigger, []).append(self._tag(tag, trigger, f"{where}.tags[{i}]"))
        options = [f"{self._text_until(t)} ({' | '.join(tags)})" for t, tags in by_trigger.items()]
        one = self._rule(" | ".join(options))
        at_least_one, only_one = _flags(spec, where)
        if only_one:
            return one if at_least_one else f"({one} | {_ANY_TEXT})"
        return f"({one}{'+' if at_least_one else '*'} {_ANY_TEXT})"

    def _separated_tags(self, spec: dict[str, Any], where: str) -> str:
        tags = _list(_field(spec, "tags", where), f"{where}.tags")
        one = " | ".join(self._tag(tag, "", f"{where}.tags[{i}]") for i, tag in enumerate(tags))
        tag = self._rule(one)
        separator = self._literal(_string(spec, "separator", where))
        at_least_one, only_one = _flags(spec, where)
        several = tag if only_one else f"{tag} ({separator} {tag})*"
        return f"({several})" if at_least_one else f"({several})?"


def _check_fields(spec: Any, kind: str, where: str) -> None:
    """Refuse fields that a format does not have; what is missing is found when it is read."""
    unknown = sorted(spec.keys() - {"type", *FORMATS[kind]}) if isinstance(spec, dict) else []
    if unknown:
        raise ValueError(
            f"{where} holds {', '.join(unknown)}; {kind} has {', '.join(FORMATS[kind]) or 'nothing'}"
        )


def _field(spec: Any, name: str, where: str) -> Any:
    if not isinstance(spec, dict) or name not in spec:
        raise ValueError(f"{where}.{name} is missing")
    return spec[name]


def _string(spec: Any, name: str, where: str) -> str:
    value = _field(spec, name, where)
    if not isinstance(value, str):
        raise ValueError(f"{where}.{name} must be a string; got {value!r}")
    return value


def _list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{where} must be a list that is not empty")
    return value


def _flags(spec: dict[str, Any], where: str) -> tuple[bool, bool]:
    """`at_least_one` and `stop_after_first`."""
    values = (spec.get("at_least_one", False), spec.get("stop_after_first", False))
    if not all(isinstance(value, bool) for value in values):
        raise ValueError(f"{where}: at_least_one and stop_after_first must be true or false")
    return values

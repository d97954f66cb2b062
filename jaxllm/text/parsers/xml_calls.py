"""Calls in tags: a name, and parameters whose values stand there as plain text."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from jaxllm.text.parsers.events import Arguments, CallStart, Content, Steps
from jaxllm.text.parsers.json_calls import MAX_HEADER
from jaxllm.text.parsers.reader import Reader
from jaxllm.text.parsers.sections import is_name
from jaxllm.text.parsers.tools import Tools

_WORDS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}

_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int, float),
    "number": (int, float),
    "boolean": (bool,),
    "object": (dict,),
    "array": (list,),
    "null": (type(None),),
}


@dataclass(frozen=True, slots=True)
class TaggedArguments:
    """The tags of a call. Values of string parameters are told as they come, others when complete.

    Attributes:
        open: before the name.
        name_ends: marks of which the first ends the name; the name's own end is read, the others not.
        own_end: that of `name_ends` which belongs to the name, if any.
        parameter: before a parameter's key.
        key_end: behind the key.
        value: before the value, after white space, if any.
        value_end: behind the value.
        close: behind the last parameter; read unless it is `section_end`.
        section_end: ends the section that the call stands in, and a call that was not closed.
    """

    open: str
    name_ends: tuple[str, ...]
    own_end: str | None
    parameter: str
    key_end: str
    value: str | None
    value_end: str
    close: str
    section_end: str

    def __call__(self, reader: Reader, tools: Tools, names: Collection[str] | None) -> Steps[bool]:
        """Read one call."""
        if self.open and not (yield from reader.accept(self.open)):
            return False
        text = yield from reader.collect(self.name_ends, MAX_HEADER)
        name = (text or "").strip()
        if not is_name(name, names):
            return False
        if self.own_end is not None:
            yield from reader.accept(self.own_end)
        yield from reader.skip_space()
        if (yield from reader.at((self.parameter, self.close))) is None:
            return False
        yield CallStart(name)
        yield Arguments("{")
        properties = tools.get(name, {}).get("properties")
        yield from self._parameters(reader, properties if isinstance(properties, Mapping) else {})
        return True

    def _parameters(self, reader: Reader, schemas: Mapping[str, Any]) -> Steps[None]:
        comma = ""
        ends = (self.parameter, self.close, self.section_end)
        while True:
            yield from reader.skip_space()
            mark = yield from reader.at(ends)
            if mark is None:
                if (yield from reader.close(*ends)):
                    return
                # Text where a parameter should be is content; without any end the call stays unfinished.
                mark = yield from reader.until(ends, Content)
            if mark != self.parameter:
                if mark is not None:
                    yield Arguments("}")
                    if mark != self.section_end:
                        yield from reader.accept(mark)
                return
            begin = reader.position
            reader.take(len(mark))
            key = yield from reader.collect((self.key_end,), MAX_HEADER)
            if key is None:
                if reader.position - begin <= MAX_HEADER:
                    return  # All text ends inside the tag.
                reader.rewind(begin)
                yield Content(reader.take(len(mark)))
                continue
            yield from reader.accept(self.key_end)
            if self.value is not None:
                yield from reader.skip_space()
                yield from reader.accept(self.value)
            yield Arguments(f"{comma}{json.dumps(key.strip(), ensure_ascii=False)}: ")
            yield from self._value(reader, types_of(schemas.get(key.strip())))
            comma = ", "

    def _value(self, reader: Reader, types: frozenset[str]) -> Steps[None]:
        """One value, without a line break at either end, which belongs to the tags."""
        ends = (f"\n{self.value_end}", self.value_end)
        yield from reader.accept("\n")
        if types == {"string"}:
            yield Arguments('"')
            mark = yield from reader.until(ends, _escaped)
            if mark is not None:
                yield Arguments('"')
        else:
            begin = reader.position
            raw = yield from reader.collect(ends)
            mark = yield from reader.at(ends)
            yield Arguments(reader.since(begin) if raw is None else json_value(raw, types))
        reader.take(len(mark or ""))


def types_of(schema: Any) -> frozenset[str]:
    """The JSON types that a schema admits; empty where it does not say."""
    if not isinstance(schema, Mapping):
        return frozenset()
    own = schema.get("type")
    if isinstance(own, str):
        return frozenset({own})
    if isinstance(own, list):
        return frozenset(kind for kind in own if isinstance(kind, str))
    for key in ("anyOf", "oneOf"):
        if isinstance(schema.get(key), list):
            members = [types_of(member) for member in schema[key]]
            return frozenset().union(*members) if all(members) else frozenset()
    values = schema.get("enum")
    if isinstance(values, list) and values and all(isinstance(value, str) for value in values):
        return frozenset({"string"})
    return frozenset()


def json_value(text: str, types: frozenset[str]) -> str:
    """The JSON of a value that was written as plain text: what the types admit, else a string.

    JSON and Python's literals are understood. Where nothing is known of the types, so is what reads as JSON.
    """
    value = _read(text.strip())
    admitted = tuple(kind for name in types for kind in _TYPES.get(name, ()))
    if admitted and (not isinstance(value, admitted) or (isinstance(value, bool) and bool not in admitted)):
        value = text
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return json.dumps(text, ensure_ascii=False)


def _read(text: str) -> Any:
    if text in _WORDS:
        return _WORDS[text]
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    if not text.startswith(("{", "[")):
        return text
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.literal_eval(text)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return text


def _escaped(piece: str) -> Arguments:
    return Arguments(json.dumps(piece, ensure_ascii=False)[1:-1])

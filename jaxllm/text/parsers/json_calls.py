"""Calls in JSON: `{"name": ..., "arguments": {...}}`, lists of those, and arguments behind a name."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass

from jaxllm.text.parsers.events import Arguments, CallStart, Steps
from jaxllm.text.parsers.reader import NAME_CHARACTERS, Reader
from jaxllm.text.parsers.sections import is_name
from jaxllm.text.parsers.tools import Tools

ARGUMENT_KEYS = ("arguments", "parameters")

# Characters that may stand between a mark and the arguments that belong to it.
MAX_HEADER = 512

_SCALAR_ENDS = frozenset(",}] \t\r\n")


def call_object(reader: Reader, tools: Tools, names: Collection[str] | None) -> Steps[bool]:
    """`{"name": ..., "arguments": {...}}` with the keys in any order; "parameters" is "arguments".

    The arguments are told as they come once the name is known; a call without any has `{}`.
    """
    begin = reader.position
    name: str | None = None
    held: str | None = None
    started = False
    more = yield from reader.accept("{")
    while more:
        yield from reader.skip_space()
        if (yield from reader.accept("}")):
            break
        key = yield from _value(reader)
        yield from reader.skip_space()
        if not isinstance(key, str) or not (yield from reader.accept(":")):
            more = False
            break
        yield from reader.skip_space()
        if key in ARGUMENT_KEYS and name and not started and (yield from reader.peek()) == "{":
            yield CallStart(name)
            started = True
            more = yield from reader.balanced('"', Arguments)
        else:
            value = yield from _raw_value(reader)
            more = value is not None
            if key == "name":
                named = _decoded(value)
                name = named if isinstance(named, str) and is_name(named, names) else None
                more = name is not None
            elif key in ARGUMENT_KEYS:
                held = value
        if more:
            yield from reader.skip_space()
            if (yield from reader.accept("}")):
                break
            more = yield from reader.accept(",")
    if started:
        # A bracket that is missing behind the arguments changes nothing about them.
        return True
    arguments = _arguments_text(held)
    if not more or name is None or arguments is None:
        reader.rewind(begin)
        return False
    yield CallStart(name)
    yield Arguments(arguments)
    return True


def call_list(reader: Reader, tools: Tools, names: Collection[str] | None) -> Steps[bool]:
    """`[{"name": ..., "arguments": {...}}, ...]`."""
    if not (yield from reader.accept("[")):
        return False
    here = reader.position
    found = False
    while True:
        yield from reader.skip_space()
        if not (yield from call_object(reader, tools, names)):
            break
        found = True
        here = reader.position
        yield from reader.skip_space()
        if not (yield from reader.accept(",")):
            break
    reader.rewind(here)
    return found and (yield from end_of_list(reader))


def end_of_list(reader: Reader) -> Steps[bool]:
    """Read the end of a list of calls, where it is there; true in any case."""
    here = reader.position
    yield from reader.skip_space()
    if not (yield from reader.accept("]")):
        reader.rewind(here)
    return True


def call_object_or_list(reader: Reader, tools: Tools, names: Collection[str] | None) -> Steps[bool]:
    """Either of the two."""
    item = call_list if (yield from reader.peek()) == "[" else call_object
    return (yield from item(reader, tools, names))


def call_object_list_or_named(reader: Reader, tools: Tools, names: Collection[str] | None) -> Steps[bool]:
    """The forms of Mistral: JSON, or since its tokenizer's version 11 `NAME[CALL_ID]ID[ARGS]{...}`.

    The marks in brackets, and the id, need not be there.
    """
    if (yield from reader.peek()) in ("[", "{"):
        return (yield from call_object_or_list(reader, tools, names))
    name = yield from reader.take_while(NAME_CHARACTERS)
    call_id = None
    if (yield from reader.accept("[CALL_ID]")):
        call_id = yield from reader.take_while(NAME_CHARACTERS)
    yield from reader.accept("[ARGS]")
    yield from reader.skip_space()
    if not is_name(name, names) or (yield from reader.peek()) != "{":
        return False
    yield CallStart(name, call_id or None)
    yield from reader.balanced('"', Arguments)
    return True


@dataclass(frozen=True, slots=True)
class NamedArguments:
    """Calls whose name stands before their arguments, which alone are JSON.

    Attributes:
        header: matches all between `open` and the arguments; its groups are `name` and perhaps `id`.
        open: mark before the header.
        middle: mark that ends the header.
        close: marks behind the arguments, in this order, each of which may be missing.
    """

    header: re.Pattern[str]
    open: str
    middle: str
    close: tuple[str, ...]

    def __call__(self, reader: Reader, tools: Tools, names: Collection[str] | None) -> Steps[bool]:
        """Read one call."""
        if not (yield from reader.accept(self.open)):
            return False
        text = yield from reader.collect((self.middle,), MAX_HEADER)
        match = None if text is None else self.header.fullmatch(text)
        if match is None or not is_name(match["name"], names):
            return False
        yield from reader.accept(self.middle)
        yield from reader.skip_space()
        if (yield from reader.peek()) != "{":
            return False
        yield CallStart(match["name"], match.groupdict().get("id"))
        yield from reader.balanced('"', Arguments)
        for mark in self.close:
            here = reader.position
            yield from reader.skip_space()
            if not (yield from reader.close(mark)):
                reader.rewind(here)
        return True


def _raw_value(reader: Reader) -> Steps[str | None]:
    """The text of the JSON value that comes next; None where none comes, or not all of it."""
    begin = reader.position
    first = yield from reader.peek()
    if first and first in "{[":
        if not (yield from reader.balanced('"')):
            return None
    elif first == '"':
        reader.take(1)
        protected = False
        while character := (yield from reader.peek()):
            reader.take(1)
            if character == '"' and not protected:
                break
            protected = character == "\\" and not protected
        else:
            return None
    else:
        while (character := (yield from reader.peek())) and character not in _SCALAR_ENDS:
            reader.take(1)
        if not character:
            return None
    return reader.since(begin)


def _value(reader: Reader) -> Steps[object]:
    return _decoded((yield from _raw_value(reader)))


def _decoded(raw: str | None) -> object:
    try:
        return None if raw is None else json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _arguments_text(held: str | None) -> str | None:
    """What arguments that are not told as they come amount to; None where they are no object.

    Some models write the object as a string, which holds its JSON.
    """
    value = _decoded(held)
    if isinstance(value, str):
        held, value = value, _decoded(value)
    if isinstance(value, dict):
        return held
    return "{}" if held is None or held.strip() == "null" else None

"""Calls as Python: `[get_weather(city="Paris"), add(a=1, b=2)]`."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Collection

from jaxllm.text.parsers.events import Arguments, CallStart, Steps
from jaxllm.text.parsers.json_calls import end_of_list
from jaxllm.text.parsers.reader import NAME_CHARACTERS, Reader
from jaxllm.text.parsers.sections import is_name
from jaxllm.text.parsers.tools import Tools

_JSON_NAMES = {"true": True, "false": False, "null": None}


def python_list(reader: Reader, tools: Tools, names: Collection[str] | None) -> Steps[bool]:
    """A list of calls. Each is told when it is complete: only then is it known to be Python."""
    if not (yield from reader.accept("[")):
        return False
    here = reader.position
    found = False
    while True:
        yield from reader.skip_space()
        name = yield from reader.take_while(NAME_CHARACTERS)
        if (yield from reader.peek()) != "(" or not is_name(name, names):
            break
        begin = reader.position
        if not (yield from reader.balanced("'\"")):
            break
        arguments = _keywords(reader.since(begin))
        if arguments is None:
            break
        yield CallStart(name)
        yield Arguments(arguments)
        found = True
        here = reader.position
        yield from reader.skip_space()
        if not (yield from reader.accept(",")):
            break
    reader.rewind(here)
    return found and (yield from end_of_list(reader))


def _keywords(brackets: str) -> str | None:
    """The JSON object that `(a=1, b=[True])` means; None where these are not keyword literals."""
    try:
        with warnings.catch_warnings():
            # A regular expression in a string is none of Python's business.
            warnings.simplefilter("ignore")
            tree = ast.parse(f"f{brackets}", mode="eval")
        call = tree.body
        if not isinstance(call, ast.Call) or call.args:
            return None
        values = {}
        for keyword in call.keywords:
            if keyword.arg is None:
                return None
            values[keyword.arg] = ast.literal_eval(_JsonNames().visit(keyword.value))
        return json.dumps(values, ensure_ascii=False, allow_nan=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


class _JsonNames(ast.NodeTransformer):
    """Takes JSON's names for Python's."""

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return ast.Constant(_JSON_NAMES[node.id]) if node.id in _JSON_NAMES else node

"""The tools that a request offers, as parsers need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# JSON schema of the parameters, by the name of the function.
Tools = Mapping[str, Mapping[str, Any]]


def tools_of(definitions: Sequence[Mapping[str, Any]]) -> Tools:
    """The tools of OpenAI's definitions, `{"type": "function", "function": {"name", "parameters"}}`."""
    functions = [definition["function"] for definition in definitions]
    return {function["name"]: function.get("parameters") or {} for function in functions}

"""What form an output must have: `StructuredOutputsParams`, with vLLM's names and meanings."""

from __future__ import annotations

import json as json_lib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

from jaxllm.errors import ConfigError, InvalidRequestError
from jaxllm.validation import refuse

CONSTRAINTS = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
"""The fields of which exactly one is set."""

MAX_CHARACTERS = 1_000_000
"""Longest constraint, written out."""

MAX_GRAMMAR_CHARACTERS = 16_000
"""Longest regex or grammar: terminals that are made of each other take quadratic time to compile."""

MAX_NESTING = 64
"""Deepest nesting of objects and arrays in a schema or structural tag; parsers further down recurse."""


@dataclass
class StructuredOutputsParams:
    """A constraint on the form of the output; exactly one of the first six fields is set.

    Attributes:
        json: a JSON schema (draft 2020-12), as a dict or as text. Keywords that cannot be enforced are
            refused, and so are formats that are not known.
        regex: what the whole output matches, in Rust's syntax (no look-around, no back references).
        choice: the output is one of these strings.
        grammar: a context-free grammar: Lark (`start: ...`), or GBNF, the EBNF of llama.cpp (`root ::= ...`).
        json_object: True for any JSON object.
        structural_tag: free text with parts of fixed form: JSON that says
            `{"triggers": [...], "structures": [{"begin", "schema", "end"}, ...]}`. Wherever the text runs
            into a trigger, one of the structures that begin with it follows. Or xgrammar's newer
            `{"format": {"type": "triggered_tags" | "sequence" | "tag" | ...}}`.
        disable_any_whitespace: no whitespace in the JSON but within strings.
        disable_additional_properties: objects hold only the properties that the schema lists.
        whitespace_pattern: a regex for the whitespace between the tokens of the JSON.

    Raises:
        InvalidRequestError: a field is wrong, or not exactly one constraint is given.
    """

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    def __post_init__(self) -> None:
        self.verify()

    def verify(self) -> None:
        """Check every field; what is wrong inside a schema or grammar is found when it is compiled.

        Raises:
            InvalidRequestError: naming the field, its value, and what is allowed.
        """
        given = [name for name in CONSTRAINTS if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidRequestError(
                f"structured_outputs needs exactly one of {', '.join(CONSTRAINTS)}; got "
                f"{' and '.join(given) or 'none'}.",
                param="structured_outputs",
            )
        kind = given[0]
        value = getattr(self, kind)
        if kind == "json_object":
            if value is not True:
                _refuse(kind, value, "True, or left out")
        elif kind == "choice":
            _check_choice(value)
        elif kind in ("json", "structural_tag"):
            _check_json(kind, value)
        elif not isinstance(value, str) or (kind == "grammar" and not value.strip()):
            _refuse(kind, value, "a string" if kind == "regex" else "a non-empty string")
        elif "\0" in value:
            _refuse(kind, value, "free of NUL characters")
        limit = MAX_GRAMMAR_CHARACTERS if kind in ("regex", "grammar") else MAX_CHARACTERS
        if len(self.text()) > limit:
            _refuse(kind, value, f"at most {limit} characters long")
        self._check_options(kind)

    def _check_options(self, kind: str) -> None:
        """Refuse options of a wrong type, and those that would change nothing."""
        for name in ("disable_any_whitespace", "disable_additional_properties"):
            if not isinstance(getattr(self, name), bool):
                _refuse(name, getattr(self, name), "True or False")
        pattern = self.whitespace_pattern
        if pattern is not None and (not isinstance(pattern, str) or "\0" in pattern):
            _refuse("whitespace_pattern", pattern, "a regex")
        if pattern is not None and self.disable_any_whitespace:
            _refuse("whitespace_pattern", pattern, "left out where disable_any_whitespace is True")
        takes = {
            "disable_any_whitespace": ("json", "json_object", "structural_tag"),
            "whitespace_pattern": ("json", "json_object", "structural_tag"),
            "disable_additional_properties": ("json", "structural_tag"),
        }
        for name, kinds in takes.items():
            value = getattr(self, name)
            if value and kind not in kinds:
                _refuse(name, value, f"left out beside {kind}: it is about {' and '.join(kinds)}")

    @property
    def kind(self) -> str:
        """The constraint that is set, one of `CONSTRAINTS`."""
        return next(name for name in CONSTRAINTS if getattr(self, name) is not None)

    def text(self) -> str:
        """The constraint written out: JSON where it is an object or a list, else as it is."""
        value = getattr(self, self.kind)
        return value if isinstance(value, str) else json_lib.dumps(value, ensure_ascii=False)


GuidedDecodingParams = StructuredOutputsParams
"""The name that older releases of vLLM used."""


@dataclass(frozen=True, slots=True)
class StructuredOutputsConfig:
    """What holds for all constraints of an engine: its `structured_outputs_config`.

    Attributes:
        backend: "auto" or "guidance", which is what there is.
        disable_any_whitespace, disable_additional_properties: as in `StructuredOutputsParams`, for every
            request. One that brings a whitespace pattern of its own keeps that.
    """

    backend: str = "auto"
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> StructuredOutputsConfig:
        """From an argument of the engine.

        Raises:
            ConfigError: a key is unknown, or a value is not allowed.
        """
        allowed: dict[str, tuple[Any, ...]] = {f.name: (True, False) for f in fields(cls)}
        allowed["backend"] = ("auto", "guidance")
        for name, value in mapping.items():
            if name not in allowed or not any(value == a and type(value) is type(a) for a in allowed[name]):
                takes = "; ".join(
                    f"{key}: {' or '.join(map(repr, values))}" for key, values in allowed.items()
                )
                raise ConfigError(
                    f"structured_outputs_config holds {name}={value!r}; it takes {takes}.",
                    param="structured_outputs_config",
                )
        return cls(**mapping)

    def apply(self, params: StructuredOutputsParams) -> StructuredOutputsParams:
        """A constraint under these rules."""
        compact = self.disable_any_whitespace and params.whitespace_pattern is None
        is_json = params.kind in ("json", "json_object", "structural_tag")
        closed = self.disable_additional_properties and params.kind in ("json", "structural_tag")
        return replace(
            params,
            disable_any_whitespace=params.disable_any_whitespace or (compact and is_json),
            disable_additional_properties=params.disable_additional_properties or closed,
        )


def _check_choice(value: Any) -> None:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(v, str) for v in value):
        _refuse("choice", value, "a list of at least one string")


def _check_json(kind: str, value: Any) -> None:
    """Refuse what is no JSON object, saying where its text goes wrong."""
    try:
        if isinstance(value, str):
            parsed = json_lib.loads(value)
        else:
            parsed, value = value, json_lib.dumps(value, allow_nan=False)
    except json_lib.JSONDecodeError as error:
        _refuse(kind, value, f"JSON ({error.msg} at line {error.lineno}, column {error.colno})")
    except RecursionError:
        _refuse(kind, "a deeper one", f"nested at most {MAX_NESTING} levels deep")
    except (TypeError, ValueError) as error:
        _refuse(kind, value, f"JSON ({error})")
    if not isinstance(parsed, dict):
        _refuse(kind, value, "a JSON object")
    if _nesting(parsed) > MAX_NESTING:
        _refuse(kind, value, f"nested at most {MAX_NESTING} levels deep")


def _nesting(value: Any) -> int:
    """Levels of objects and arrays, counted without recursion."""
    depth, level = 0, [value]
    while level := [v for v in level if isinstance(v, dict | list | tuple)]:
        depth += 1
        level = [v for outer in level for v in (outer.values() if isinstance(outer, dict) else outer)]
    return depth


def _refuse(name: str, value: object, allowed: str) -> NoReturn:
    refuse(f"structured_outputs.{name}", value, allowed)

"""JSON schemas to draw from: what they say is enforced, by grammars as by validators."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

SUPPORTED_FORMATS = ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"]

_NAMES = st.sampled_from(["name", "age", "x", "a b", 'quo"te', "ü", "", "back\\slash"])
_PATTERNS = ["^[a-c]{2,4}$", r"^[0-9]+-[0-9]+$", "^(ab|cd)*$"]
_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-1000, 1000),
    st.sampled_from(["", "red", "gr\nün", '"', "\\", "😀"]),
)


def _bounds(low: str, high: str, most: int) -> st.SearchStrategy[dict[str, int]]:
    pairs = st.tuples(st.integers(0, most), st.integers(0, most)).map(sorted)
    return st.one_of(
        st.just({}),
        pairs.map(lambda p: {low: p[0], high: p[1]}),
        pairs.map(lambda p: {high: p[1]}),
        pairs.map(lambda p: {low: p[0]}),
    )


def _with(
    base: dict[str, Any], *extras: st.SearchStrategy[dict[str, Any]]
) -> st.SearchStrategy[dict[str, Any]]:
    return st.tuples(*extras).map(lambda parts: {k: v for part in (base, *parts) for k, v in part.items()})


_LEAVES = st.one_of(
    st.sampled_from([{"type": "boolean"}, {"type": "null"}]),
    _with({"type": "integer"}, _bounds("minimum", "maximum", 1000)),
    st.integers(-500, 500).map(lambda low: {"type": "integer", "exclusiveMinimum": low, "maximum": low + 40}),
    _with({"type": "number"}, _bounds("minimum", "maximum", 50)),
    _with({"type": "string"}, _bounds("minLength", "maxLength", 12)),
    st.sampled_from(_PATTERNS).map(lambda pattern: {"type": "string", "pattern": pattern}),
    st.lists(_SCALARS, min_size=1, max_size=4).map(lambda values: {"enum": values}),
    _SCALARS.map(lambda value: {"const": value}),
    st.just({"type": ["string", "null"], "maxLength": 5}),
)


def _objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    def build(properties: dict[str, Any], mask: list[bool], extra: Any) -> dict[str, Any]:
        required = [name for name, kept in zip(properties, mask, strict=False) if kept]
        return {
            "type": "object",
            "properties": properties,
            **({"required": required} if required else {}),
            "additionalProperties": extra,
        }

    return st.builds(
        build,
        st.dictionaries(_NAMES, values, max_size=4),
        st.lists(st.booleans(), min_size=4, max_size=4),
        st.sampled_from([False, False, {"type": "integer"}]),
    )


def _arrays(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(
        lambda items, bounds: {"type": "array", "items": items, **bounds},
        values,
        _bounds("minItems", "maxItems", 4),
    )


SCHEMAS: st.SearchStrategy[dict[str, Any]] = st.recursive(
    _LEAVES,
    lambda inner: st.one_of(
        _objects(inner),
        _arrays(inner),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: {"anyOf": parts}),
    ),
    max_leaves=6,
)

_TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x7f"))


def instances(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """What fits one of `SCHEMAS`, properties in the order in which a grammar wants them."""
    if "anyOf" in schema:
        return st.one_of([instances(part) for part in schema["anyOf"]])
    if "const" in schema:
        return st.just(schema["const"])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    low, high = schema.get("minimum", schema.get("exclusiveMinimum", -999) + 1), schema.get("maximum", 2000)
    match schema["type"]:
        case "boolean":
            return st.booleans()
        case "null":
            return st.none()
        case "integer":
            return st.integers(low, high)
        case "number":
            return st.one_of(st.integers(low, high), st.integers(4 * low, 4 * high).map(lambda n: n / 4))
        case ["string", "null"]:
            return st.one_of(st.none(), st.text("ab ü", max_size=5))
        case "string" if "pattern" in schema:
            return st.from_regex(schema["pattern"].removeprefix("^").removesuffix("$"), fullmatch=True)
        case "string":
            sizes = {"min_size": schema.get("minLength", 0), "max_size": schema.get("maxLength", 14)}
            return st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), **sizes)
        case "array":
            sizes = {"min_size": schema.get("minItems", 0), "max_size": schema.get("maxItems", 5)}
            return st.lists(instances(schema["items"]), **sizes)
        case _:
            return _instances_of_object(schema)


def _instances_of_object(schema: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    properties, required = schema["properties"], set(schema.get("required", ()))
    listed = st.fixed_dictionaries(
        {name: instances(properties[name]) for name in properties if name in required},
        optional={name: instances(properties[name]) for name in properties if name not in required},
    ).map(lambda drawn: {name: drawn[name] for name in properties if name in drawn})
    if schema["additionalProperties"] is False:
        return listed
    others = st.dictionaries(_TEXTS.filter(lambda name: name not in properties), st.integers(), max_size=2)
    return st.tuples(listed, others).map(lambda parts: {**parts[0], **parts[1]})

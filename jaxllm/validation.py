"""Checks of what a user wrote into a field: the value as it is meant, or an error that says what is allowed.

All raise `InvalidRequestError`, with `param` for the API's error object: the part of the name before its
first dot, unless told otherwise.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

from jaxllm.errors import InvalidRequestError


def refuse(name: str, value: object, allowed: str, *, param: str | None = None) -> NoReturn:
    """Raises: the field must be what is `allowed`, and is not."""
    shown = repr(value)
    if len(shown) > 200:
        shown = f"{shown[:200]}..."
    raise InvalidRequestError(
        f"{name} must be {allowed}; got {shown}.", param=param or name.partition(".")[0]
    )


def integer(
    name: str,
    value: Any,
    *,
    low: int,
    high: int | None = None,
    off: str | None = None,
    param: str | None = None,
) -> int:
    """`value` as an int within [low, high]; numpy integers are welcome, bools and floats are not."""
    allowed = f"an integer in [{low}, {high}]" if high is not None else f"an integer of at least {low}"
    if off is not None:
        allowed += f" ({off})"
    if type(value) is not int:
        try:
            if isinstance(value, bool):
                raise TypeError
            value = operator.index(value)
        except TypeError:
            refuse(name, value, allowed, param=param)
    if value < low or (high is not None and value > high):
        refuse(name, value, allowed, param=param)
    return int(value)


def number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    above_low: bool = False,
    param: str | None = None,
) -> float:
    """`value` as a finite float within [low, high], or (low, high] where `above_low`."""
    if isinstance(value, float | int) and not isinstance(value, bool):
        number = value
    elif hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0 and value.dtype.kind in "iuf":
        number = value.item()
    else:
        number = math.nan
    try:
        number = float(number)
    except OverflowError:
        number = math.nan
    if not math.isfinite(number) or not low <= number <= high or (above_low and number == low):
        if math.isinf(high):
            bound = "a finite number" if math.isinf(low) else f"a finite number above {low:g}"
        else:
            bound = f"a number in {'(' if above_low else '['}{low:g}, {high:g}]"
        refuse(name, value, bound, param=param)
    return number


def boolean(name: str, value: object) -> None:
    """Nothing but True and False: 1 may be a slip."""
    if not isinstance(value, bool):
        refuse(name, value, "True or False")


def strings(name: str, value: Any) -> list[str]:
    """A list of strings, each once, in their order; None is no string."""
    if value is None:
        return []
    allowed = "a list of non-empty strings" if name != "stop" else "a non-empty string or a list of them"
    if isinstance(value, str) or not isinstance(value, Collection) or isinstance(value, Mapping):
        refuse(name, value, allowed)
    if not all(isinstance(s, str) and s for s in value):
        refuse(name, list(value), allowed)
    return list(dict.fromkeys(value))


def token_ids(name: str, value: Any) -> list[int]:
    """A list of token ids, each once, in their order; None is no token."""
    if value is None:
        return []
    is_list = isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes)
    if not is_list and getattr(value, "ndim", None) != 1:
        refuse(name, value, "a list of token ids")
    return list(dict.fromkeys(integer(f"{name}[{i}]", v, low=0, param=name) for i, v in enumerate(value)))

"""What a parser finds in a model's output, in the order in which it was written."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeVar


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of what the model thought before it answered."""

    text: str


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A tool call begins; its arguments follow.

    Attributes:
        id: the model's own for the call, where its format has one.
    """

    name: str
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Arguments:
    """A piece of the JSON text that is the arguments of the call begun last."""

    text: str


Event = Reasoning | Content | CallStart | Arguments

T = TypeVar("T")

# A parser is a generator: it yields events, and None where it cannot go on without more text.
Steps = Generator[Event | None, None, T]

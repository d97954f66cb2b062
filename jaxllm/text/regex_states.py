"""Where a text stands in a regular expression, so that texts that stand at the same place share a mask.

Thompson's construction and simulation (K. Thompson, Regular expression search algorithm, CACM 11(6), 1968):
two texts that leave the same positions of an expression open go on alike. Nothing else is asked of this; the
masks are llguidance's. Expressions beyond the common part of the syntax are not followed, and no text beyond
ASCII is: those have masks of their own.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np

# Of an expression, and of it open at once.
_MAX_POSITIONS = 8_000
_MAX_OPEN = 256
_MAX_STATES = 500
# From state to state by a token, remembered for the next text.
_MAX_STEPS = 10_000
# Of the masks that are kept for an expression: half a megabyte.
_MAX_WORDS = 128 * 1024

_ASCII = frozenset(map(chr, range(128)))
_DIGITS = frozenset(string.digits)
_WORD = frozenset(string.ascii_letters + string.digits + "_")
_SPACE = frozenset(" \t\n\r\v\f")
_CLASSES = {"d": _DIGITS, "w": _WORD, "s": _SPACE} | {
    "D": _ASCII - _DIGITS,
    "W": _ASCII - _WORD,
    "S": _ASCII - _SPACE,
}
_CONTROLS = {"n": "\n", "t": "\t", "r": "\r"}
# Behind a backslash < and > are the bounds of a word.
_PLAIN_WHEN_ESCAPED = frozenset(string.punctuation) - {"<", ">"}
_COUNT = re.compile(r"\{(\d+)(,?)(\d*)\}")


class _NotFollowedError(Exception):
    """The expression has something that is not followed here, or is too large."""


class State:
    """A set of positions that a text may have reached, and the masks of texts that have reached it.

    Attributes:
        matches: whether a text that stands here matches as it is.
        is_forced: whether at most one character can follow. Then the mask goes by the last token, too:
            what follows is written in the tokens that the tokenizer would use behind it.
    """

    __slots__ = ("_automaton", "_masks", "_next", "_positions", "is_forced", "matches")

    def __init__(self, automaton: _Automaton, positions: frozenset[int]) -> None:
        self._automaton = automaton
        self._positions = positions
        self._next: dict[int, State | None] = {}
        # By that token: words that are not zero, and where they stand; None is a place for all of them.
        self._masks: dict[int | None, tuple[np.ndarray | None, np.ndarray]] = {}
        self.matches = automaton.final in positions
        self.is_forced = not self.matches and len(automaton.following(positions)) < 2

    def recall(self, last_token: int | None, mask: np.ndarray) -> bool:
        """Writes the mask that was kept; False where there is none.

        Args:
            last_token: of the text, if it counts.
        """
        kept = self._masks.get(last_token)
        if kept is None:
            return False
        where, words = kept
        if where is None:
            mask[:] = words
        else:
            mask[:] = 0
            mask[where] = words
        return True

    def keep(self, last_token: int | None, mask: np.ndarray) -> None:
        """Keeps a mask for others, unless there is no more room."""
        where: np.ndarray | None = np.flatnonzero(mask)
        words = mask[where]
        if 4 * len(words) > len(mask):
            where, words = None, mask.copy()
        size = len(words) if where is None else 3 * len(words)
        if size <= self._automaton.words_left:
            self._automaton.words_left -= size
            self._masks[last_token] = (where, words)

    def after(self, token_id: int, text_of: Callable[[int], bytes | None]) -> State | None:
        """The state behind a further token; None where that is not followed."""
        if token_id in self._next:
            return self._next[token_id]
        state = self._automaton.after(self._positions, text_of(token_id))
        if self._automaton.steps_left > 0:
            self._automaton.steps_left -= 1
            self._next[token_id] = state
        return state


def regex_states(pattern: str) -> State | None:
    """The state of the empty text in an expression in Rust's syntax; None where it is not followed."""
    automaton = _Automaton()
    try:
        return automaton.start(*_Parser(pattern, automaton).whole())
    except (_NotFollowedError, RecursionError):
        return None


def choice_states(choices: Sequence[str]) -> State | None:
    """The state of the empty text where one of several texts is to be written; None if they are too long."""
    automaton = _Automaton()
    try:
        return automaton.start(*automaton.either([automaton.text(choice) for choice in choices]))
    except _NotFollowedError:
        return None


# The first and the last position of a part; whatever it matches lies between.
_Part = tuple[int, int]


class _Automaton:
    """Positions, with what leads from one to the next: a character of a set, or nothing."""

    def __init__(self) -> None:
        self._takes: list[tuple[frozenset[str], int] | None] = []
        self._free: list[list[int]] = []
        self._states: dict[frozenset[int], State] = {}
        self.words_left = _MAX_WORDS
        self.steps_left = _MAX_STEPS
        self.final = -1

    def position(self) -> int:
        if len(self._free) == _MAX_POSITIONS:
            raise _NotFollowedError
        self._takes.append(None)
        self._free.append([])
        return len(self._free) - 1

    def character(self, allowed: frozenset[str]) -> _Part:
        first, last = self.position(), self.position()
        self._takes[first] = (allowed, last)
        return first, last

    def text(self, text: str) -> _Part:
        return self.row([self.character(frozenset(character) & _ASCII) for character in text])

    def row(self, parts: Sequence[_Part]) -> _Part:
        if not parts:
            only = self.position()
            return only, only
        for (_, last), (first, _) in pairwise(parts):
            self._free[last].append(first)
        return parts[0][0], parts[-1][1]

    def either(self, parts: Sequence[_Part]) -> _Part:
        first, last = self.position(), self.position()
        for begin, end in parts:
            self._free[first].append(begin)
            self._free[end].append(last)
        return first, last

    def repeated(self, part: Callable[[], _Part], least: int, most: int | None) -> _Part:
        """So many copies of a part; the last of them may come again where `most` is None."""
        # Each copy has an entry of its own: to where it begins, a part may come back by itself.
        entries: list[int] = []
        lasts: list[int] = []
        for _ in range(max(least, 1) if most is None else most):
            first, last = part()
            entries.append(self.position())
            self._free[entries[-1]].append(first)
            lasts.append(last)
        if not entries:
            return self.row([])
        end = self.position()
        for last, entry in zip(lasts, [*entries[1:], end], strict=True):
            self._free[last].append(entry)
        for entry in entries[least:]:
            self._free[entry].append(end)
        if most is None:
            self._free[lasts[-1]].append(entries[-1])
        return entries[0], end

    def start(self, first: int, last: int) -> State | None:
        self.final = last
        return self._state({first})

    def after(self, positions: frozenset[int], text: bytes | None) -> State | None:
        if text is None or not text.isascii():
            return None
        reached: Iterable[int] = positions
        for character in text.decode("ascii"):
            steps = (self._takes[position] for position in reached)
            reached = self._with_free([step[1] for step in steps if step and character in step[0]])
        return self._state(reached) if reached else None

    def following(self, positions: Iterable[int]) -> set[str]:
        """The ASCII characters that may come next."""
        return {c for position in positions if (step := self._takes[position]) for c in step[0]}

    def _state(self, positions: Iterable[int]) -> State | None:
        # Positions that only lead on for free say nothing that those behind them do not.
        reached = self._with_free(positions)
        key = frozenset(p for p in reached if self._takes[p] is not None or p == self.final)
        state = self._states.get(key)
        if state is None and len(self._states) < _MAX_STATES and len(key) <= _MAX_OPEN:
            state = self._states.setdefault(key, State(self, key))
        return state

    def _with_free(self, positions: Iterable[int]) -> set[int]:
        """These and all that lie behind them for free."""
        left = list(positions)
        reached = set(left)
        while left:
            further = [p for p in self._free[left.pop()] if p not in reached]
            reached.update(further)
            left += further
        return reached


class _Parser:
    """Reads the common part of Rust's syntax; a part is built anew for each of its repetitions."""

    def __init__(self, pattern: str, automaton: _Automaton) -> None:
        self._pattern = pattern
        self._at = 0
        self._automaton = automaton

    def whole(self) -> _Part:
        part = self._either()
        if self._at < len(self._pattern):
            raise _NotFollowedError  # A bracket that nothing opened.
        return part

    def _peek(self) -> str:
        return self._pattern[self._at : self._at + 1]

    def _take(self) -> str:
        if not (character := self._peek()):
            raise _NotFollowedError
        self._at += 1
        return character

    def _either(self) -> _Part:
        parts = [self._row()]
        while self._peek() == "|":
            self._take()
            parts.append(self._row())
        return parts[0] if len(parts) == 1 else self._automaton.either(parts)

    def _row(self) -> _Part:
        parts = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._repeated())
        return self._automaton.row(parts)

    def _repeated(self) -> _Part:
        begin = self._at
        part = self._atom()
        bounds = self._bounds()
        if bounds is None:
            return part
        end = self._at

        def again() -> _Part:
            self._at = begin
            return self._atom()

        repeated = self._automaton.repeated(again, *bounds)
        self._at = end
        if self._peek() in ("*", "+", "?", "{"):
            raise _NotFollowedError  # A lazy or a doubled repetition.
        return repeated

    def _bounds(self) -> tuple[int, int | None] | None:
        match self._peek():
            case "*":
                bounds: tuple[int, int | None] = (0, None)
            case "+":
                bounds = (1, None)
            case "?":
                bounds = (0, 1)
            case "{":
                count = _COUNT.match(self._pattern, self._at)
                if count is None:
                    raise _NotFollowedError
                least = int(count[1])
                most = int(count[3]) if count[3] else None if count[2] else least
                self._at = count.end()
                return least, most
            case _:
                return None
        self._take()
        return bounds

    def _atom(self) -> _Part:
        character = self._take()
        if character == "(":
            if self._peek() == "?":
                if not self._pattern.startswith("?:", self._at):
                    raise _NotFollowedError
                self._at += 2
            part = self._either()
            if self._take() != ")":
                raise _NotFollowedError
            return part
        if character == "[":
            return self._automaton.character(self._class())
        if character == ".":
            return self._automaton.character(_ASCII - {"\n"})
        if character == "\\":
            return self._automaton.character(self._escaped())
        if character in "^$*+?{":
            raise _NotFollowedError
        return self._automaton.character(frozenset(character) & _ASCII)

    def _escaped(self) -> frozenset[str]:
        character = self._take()
        if character in _CLASSES:
            return _CLASSES[character]
        if character in _CONTROLS:
            return frozenset(_CONTROLS[character])
        if character not in _PLAIN_WHEN_ESCAPED:
            raise _NotFollowedError
        return frozenset(character)

    def _class(self) -> frozenset[str]:
        if negated := self._peek() == "^":
            self._take()
        if self._peek() == "]":
            raise _NotFollowedError
        allowed: set[str] = set()
        while (character := self._take()) != "]":
            if character == "[" or character + self._peek() in ("&&", "--", "~~"):
                raise _NotFollowedError  # Classes within classes, and what is done with them.
            items = self._escaped() if character == "\\" else frozenset(character)
            if self._peek() == "-" and self._pattern[self._at + 1 : self._at + 2] != "]":
                self._take()
                last = self._take()
                if last in "[\\-" or len(items) > 1:
                    raise _NotFollowedError
                items = frozenset(c for c in _ASCII if min(items) <= c <= last)
            allowed |= items
        return _ASCII - allowed if negated else _ASCII & allowed

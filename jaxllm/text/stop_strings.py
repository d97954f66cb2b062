"""Stop strings in a text that arrives in pieces.

Each stop string is followed by its Knuth-Morris-Pratt automaton (Knuth, Morris and Pratt, 1977, "Fast
pattern matching in strings"): how much of it the text ends with is all that has to be remembered, so
a piece costs its own length, wherever the stop string lies and however the text was cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple


class Released(NamedTuple):
    """What a piece of text led to.

    Attributes:
        text: what can be shown now.
        stop: the stop string that ended the text, or None. After one, nothing more may be pushed.
    """

    text: str
    stop: str | None


class StopStringMatcher:
    """Looks for stop strings, and holds back what may turn out to begin one.

    The stop string that ends first wins, as if the text came character by character; of several that
    end at the same place, the longest. So the result does not depend on how tokens cut the text.

    Args:
        stop: stop strings, none of them empty.
        include_in_output: keep the stop string in the text; nothing has to be held back then.
    """

    __slots__ = ("_fallbacks", "_held", "_include", "_matched", "_stops")

    def __init__(self, stop: Sequence[str], *, include_in_output: bool = False) -> None:
        self._stops = tuple(sorted(set(stop), key=len, reverse=True))
        self._fallbacks = tuple(_fallbacks(string) for string in self._stops)
        self._matched = [0] * len(self._stops)
        self._include = include_in_output
        self._held = ""

    def push(self, text: str, *, search: bool = True) -> Released:
        """Adds text. With `search` off a stop string that ends within it does not count."""
        end, found = len(text) + 1, None
        for i, string in enumerate(self._stops):
            match_end = self._follow(i, text, search)
            if match_end is not None and match_end < end:
                end, found = match_end, string
        buffer = self._held + text
        if found is not None:
            cut = len(self._held) + end - (0 if self._include else len(found))
            self._held = ""
            return Released(buffer[:cut], found)
        if self._include:
            return Released(text, None)
        cut = len(buffer) - max(self._matched)
        self._held = buffer[cut:]
        return Released(buffer[:cut], None)

    def flush(self) -> str:
        """The text held back, once it is certain that no more comes."""
        held, self._held = self._held, ""
        return held

    def _follow(self, i: int, text: str, search: bool) -> int | None:
        """Runs text through the automaton of stop string i: where a match ended, or None."""
        string, fallbacks, matched = self._stops[i], self._fallbacks[i], self._matched[i]
        position, last = 0, len(string) - 1
        while position < len(text):
            if matched == 0:
                # The common case, at the speed of str.find: nothing begins here.
                position = text.find(string[0], position)
                if position < 0:
                    break
            character = text[position]
            while matched and string[matched] != character:
                matched = fallbacks[matched - 1]
            if string[matched] == character:
                matched += 1
            position += 1
            if matched > last:
                if search:
                    return position
                matched = fallbacks[last]
        self._matched[i] = matched
        return None


@lru_cache(maxsize=256)
def _fallbacks(string: str) -> tuple[int, ...]:
    """For each prefix of a string, the length of its longest proper suffix that begins the string."""
    table = [0] * len(string)
    matched = 0
    for i in range(1, len(string)):
        while matched and string[i] != string[matched]:
            matched = table[matched - 1]
        if string[i] == string[matched]:
            matched += 1
        table[i] = matched
    return tuple(table)

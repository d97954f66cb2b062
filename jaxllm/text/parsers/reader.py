"""Text that arrives in pieces, read as if it were all there.

Parsers are generators that read from a `Reader`; where they need text that has not come yet, they yield
None and go on from there later. What they decide depends on the text alone, never on where it was cut:
each step waits until the text decides it, so that a stream and the whole parse alike.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence

from jaxllm.text.parsers.events import Event, Steps

Emit = Callable[[str], Event]

WHITE_SPACE = frozenset(" \t\r\n")
NAME_CHARACTERS = frozenset(f"{string.ascii_letters}{string.digits}_.-")


class Reader:
    """The text so far, and how far it has been read.

    Text stays until an event has been made of it: up to there a parser may `rewind`, as it must to give
    back as content what looked like a call and is none.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0  # index into _text of what is read next
        self._base = 0  # position of _text[0] in all text
        self._ended = False

    def add(self, text: str) -> None:
        """Append what came."""
        self._text += text

    def end(self) -> None:
        """Say that nothing comes any more."""
        self._ended = True

    @property
    def position(self) -> int:
        """Characters read so far."""
        return self._base + self._at

    def rewind(self, position: int) -> None:
        """Read again from an earlier position, which must not lie before the last event."""
        assert self._base <= position <= self.position
        self._at = position - self._base

    def _said(self, count: int, emit: Emit) -> Event:
        """The next characters as an event; what lies before their end is forgotten."""
        end = self._at + count
        piece = self._text[self._at : end]
        self._text, self._base, self._at = self._text[end:], self._base + end, 0
        return emit(piece)

    def peek(self) -> Steps[str]:
        """The next character, without reading it; empty at the end of all text."""
        while self._at == len(self._text) and not self._ended:
            yield None
        return self._text[self._at : self._at + 1]

    def at(self, marks: Sequence[str]) -> Steps[str | None]:
        """Which of the marks the text goes on with, without reading it; the first that fits counts."""
        for mark in marks:
            while True:
                ahead = self._text[self._at : self._at + len(mark)]
                if ahead == mark:
                    return mark
                if self._ended or not mark.startswith(ahead):
                    break
                yield None
        return None

    def accept(self, *marks: str) -> Steps[bool]:
        """Read one of the marks, if the text goes on with it."""
        mark = yield from self.at(marks)
        self._at += len(mark or "")
        return mark is not None

    def close(self, *marks: str) -> Steps[bool]:
        """Read one of the marks, or what there is of it where all text ends inside it."""
        if (yield from self.accept(*marks)):
            return True
        # A mark that might still come has been waited for.
        rest = self._text[self._at :]
        if not self._ended or not any(mark.startswith(rest) for mark in marks):
            return False
        self._at = len(self._text)
        return True

    def take_while(self, characters: frozenset[str]) -> Steps[str]:
        """Read characters of a set, as far as they go."""
        start = self.position
        while (character := (yield from self.peek())) and character in characters:
            self._at += 1
        return self.since(start)

    def skip_space(self) -> Steps[str]:
        """Read white space, as far as it goes."""
        return (yield from self.take_while(WHITE_SPACE))

    def until(self, marks: Sequence[str], emit: Emit) -> Steps[str | None]:
        """Tell the text up to the first mark; returns that mark, unread, or None at the end of all text.

        No beginning of a mark is told before it is clear that it is none.
        """
        while True:
            found = self._find(marks, self._at)
            if found is not None:
                index, mark = found
                if index > self._at:
                    yield self._said(index - self._at, emit)
                return mark
            held = 0 if self._ended else self._longest_beginning(marks)
            if (safe := len(self._text) - held - self._at) > 0:
                yield self._said(safe, emit)
            if self._ended:
                return None
            yield None

    def rest(self, emit: Emit) -> Steps[None]:
        """Tell all text that is left."""
        yield from self.until((), emit)

    def collect(self, marks: Sequence[str], limit: int | None = None) -> Steps[str | None]:
        """Read and return the text up to the first mark, which stays unread.

        None where no mark comes, within `limit` characters if given; then all there is has been read.
        """
        start = self.position
        searched = self._at
        overlap = max(map(len, marks)) - 1
        while True:
            found = self._find(marks, searched)
            if found is not None and (limit is None or found[0] - (start - self._base) <= limit):
                self._at = found[0]
                return self._text[start - self._base : self._at]
            too_long = limit is not None and len(self._text) - (start - self._base) > limit + overlap
            if self._ended or found is not None or too_long:
                self._at = len(self._text)
                return None
            searched = max(self._at, len(self._text) - overlap)
            yield None

    def take(self, count: int) -> str:
        """Read characters that are known to be there."""
        piece = self._text[self._at : self._at + count]
        assert len(piece) == count
        self._at += count
        return piece

    def since(self, position: int) -> str:
        """What has been read since a position."""
        return self._text[position - self._base : self._at]

    def balanced(self, quotes: str, emit: Emit | None = None) -> Steps[bool]:
        """Read from an opening bracket to the one that closes it, passing over strings.

        Args:
            quotes: characters that begin and end a string, in which a backslash protects the next one.
            emit: makes events of the text as it comes; None reads it in silence, for `since`.

        Returns:
            Whether the closing bracket came.
        """
        depth, quote, protected = 0, "", False
        seen = self._at
        while True:
            for index in range(seen, len(self._text)):
                character = self._text[index]
                if protected:
                    protected = False
                elif quote:
                    protected = character == "\\"
                    if character == quote:
                        quote = ""
                elif character in quotes:
                    quote = character
                elif character in "{[(":
                    depth += 1
                elif character in "}])":
                    depth -= 1
                    if depth <= 0:
                        if emit is None:
                            self._at = index + 1
                        else:
                            yield self._said(index + 1 - self._at, emit)
                        return True
            seen = len(self._text)
            if emit is None:
                if self._ended:
                    self._at = seen
            elif seen > self._at:
                yield self._said(seen - self._at, emit)
                seen = 0
            if self._ended:
                return False
            yield None

    def _find(self, marks: Sequence[str], start: int) -> tuple[int, str] | None:
        """Where the first mark after `start` is, and which; of several in one place the first named."""
        found = [(index, mark) for mark in marks if (index := self._text.find(mark, start)) >= 0]
        return min(found, key=lambda one: one[0], default=None)

    def _longest_beginning(self, marks: Sequence[str]) -> int:
        """Length of the longest end of the unread text that a mark begins with."""
        reach = max(map(len, marks), default=0) - 1
        firsts = {mark[0] for mark in marks}
        for index in range(max(self._at, len(self._text) - reach), len(self._text)):
            # Nearly always no mark begins here, which its first character tells at once.
            if self._text[index] in firsts:
                ending = self._text[index:]
                if any(mark.startswith(ending) for mark in marks if len(mark) > len(ending)):
                    return len(ending)
        return 0


class Incremental:
    """Runs a parser over text that comes in pieces."""

    def __init__(self, parse: Callable[[Reader], Steps[None]]) -> None:
        self._reader = Reader()
        self._steps = parse(self._reader)

    def feed(self, text: str) -> list[Event]:
        """The events that more text decides."""
        self._reader.add(text)
        return self._advance()

    def finish(self) -> list[Event]:
        """The remaining events, once all text has been fed."""
        self._reader.end()
        return self._advance()

    def _advance(self) -> list[Event]:
        events: list[Event] = []
        for event in self._steps:
            if event is None:
                break
            events.append(event)
        return events

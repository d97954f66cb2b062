"""Text with tool calls in it: where calls begin and end, whatever their form."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from jaxllm.text.parsers.events import Content, Steps
from jaxllm.text.parsers.reader import WHITE_SPACE, Reader
from jaxllm.text.parsers.tools import Tools

# Reads one call, or several that belong together. False where there is none; then the caller rewinds.
Item = Callable[[Reader, Tools, Collection[str] | None], Steps[bool]]

_BRACKETS = ("{", "[")

NAME = re.compile(r"[\w.:/\-]+")


@dataclass(frozen=True, slots=True)
class Section:
    """How calls are marked out in text.

    Attributes:
        item: reads a call inside.
        opens: marks that begin a section of calls, any of them.
        close: mark that ends it; a section whose end is missing is taken all the same.
        bare: beginnings of a call that may stand without a section. Behind a mere bracket, only a call of
            a tool that the request offers counts as one.
        separators: characters between calls, beside white space.
    """

    item: Item
    opens: tuple[str, ...] = ()
    close: str | None = None
    bare: tuple[str, ...] = ()
    separators: str = ""

    @property
    def marks(self) -> tuple[str, ...]:
        """Every mark of the section."""
        return self.opens if self.close is None else (*self.opens, self.close)

    def parse(self, reader: Reader, tools: Tools) -> Steps[None]:
        """Tell content and calls, to the end of the text.

        What begins like a call and is none comes out as content. White space is dropped where nothing
        else stands before, between or behind calls.
        """
        starts = (*self.opens, *self.bare)
        space, called = "", False
        while True:
            space += yield from reader.skip_space()
            mark = yield from reader.at(starts)
            if mark is None and (yield from reader.peek()):
                if space:
                    yield Content(space)
                    space = ""
                mark = yield from reader.until(starts, Content)
            if mark is None:
                if space and not called:
                    yield Content(space)
                return
            begin = reader.position
            if (yield from self._calls(reader, tools, mark)):
                space, called = "", True
                continue
            reader.rewind(begin)
            if space:
                yield Content(space)
                space = ""
            if mark == "{" and (yield from _opens_json(reader)):
                # A call inside other JSON is a part of that.
                yield from reader.balanced('"', Content)
            else:
                yield Content(reader.take(len(mark)))

    def _calls(self, reader: Reader, tools: Tools, mark: str) -> Steps[bool]:
        """One section. False where no call is in it."""
        sectioned = mark in self.opens
        names = tools.keys() if tools and mark in _BRACKETS else None
        if sectioned:
            reader.take(len(mark))
        between = WHITE_SPACE | set(self.separators)
        found = False
        while True:
            here = reader.position
            yield from reader.take_while(between)
            if not (yield from self.item(reader, tools, names)):
                reader.rewind(here)
                break
            found = True
        if found and self.close is not None:
            here = reader.position
            yield from reader.skip_space()
            if (yield from reader.close(self.close)):
                return True
            reader.rewind(here)
            if sectioned:
                # Whatever else the model put before the end is content.
                yield from reader.until((self.close, *self.opens, *self.bare), Content)
                yield from reader.accept(self.close)
        return found


def _opens_json(reader: Reader) -> Steps[bool]:
    """Whether the brace that comes next is that of a JSON object with something in it."""
    here = reader.position
    reader.take(1)
    yield from reader.skip_space()
    is_json = (yield from reader.peek()) == '"'
    reader.rewind(here)
    return is_json


def is_name(name: str, names: Collection[str] | None) -> bool:
    """Whether a call may go to this name: one of `names`, or anything that looks like a name."""
    return NAME.fullmatch(name) is not None if names is None else name in names

"""The parts of a chat message, from the text of a completion as it grows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from jaxllm.text.parsers.events import Arguments, CallStart, Content, Event, Reasoning, Steps
from jaxllm.text.parsers.harmony import parse_harmony
from jaxllm.text.parsers.reader import Incremental, Reader
from jaxllm.text.parsers.reasoning import ReasoningFormat
from jaxllm.text.parsers.tool_parsers import ToolParser, random_call_id
from jaxllm.text.parsers.tools import Tools


@dataclass(slots=True)
class ToolCallDelta:
    """What is new of a tool call; id and name come with its first delta."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class MessageDelta:
    """What is new of a message."""

    reasoning: str = ""
    content: str = ""
    tool_calls: list[ToolCallDelta] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.tool_calls)


@dataclass(frozen=True, slots=True)
class MessageFormat:
    """How a completion is to be read.

    Attributes:
        reasoning: how reasoning is marked, or None where it is not told apart.
        calls: tells content and calls of what is not reasoning, or None where all of it is content.
        inside_reasoning: the completion begins within the reasoning.
        tools: what the request offers.
        max_calls: calls beyond these are dropped, as a client asks that wants no parallel ones.
    """

    reasoning: ReasoningFormat | None = None
    calls: ToolParser | None = None
    inside_reasoning: bool = False
    tools: Tools = field(default_factory=dict)
    max_calls: int | None = None


class MessageParser:
    """Takes a completion's text in pieces of any size and gives the parts of its message.

    What comes out in all does not depend on the pieces.
    """

    def __init__(self, how: MessageFormat) -> None:
        self._make_id = random_call_id if how.calls is None else how.calls.make_id
        self._max_calls = how.max_calls
        self._stages = [Incremental(stage) for stage in _stages(how)]
        self.num_calls = 0

    def feed(self, text: str, *, finished: bool = False) -> MessageDelta:
        """What the next piece of text brings; `finished` says that it is the last."""
        delta = MessageDelta()
        for event in self._events(text, finished):
            self._add(delta, event)
        return delta

    def _events(self, text: str, finished: bool) -> list[Event]:
        events: list[Event] = [Content(text)] if text else []
        for stage in self._stages:
            # Each stage reads the content that the one before it has left.
            pieces, events = events, []
            for piece in pieces:
                events += stage.feed(piece.text) if isinstance(piece, Content) else [piece]
            if finished:
                events += stage.finish()
        return events

    def _add(self, delta: MessageDelta, event: Event) -> None:
        match event:
            case Reasoning(text):
                delta.reasoning += text
            case Content(text):
                delta.content += text
            case CallStart(name, own_id):
                self.num_calls += 1
                if self._wanted:
                    delta.tool_calls.append(
                        ToolCallDelta(self.num_calls - 1, own_id or self._make_id(), name)
                    )
            case Arguments(text) if self._wanted:
                if not delta.tool_calls:
                    delta.tool_calls.append(ToolCallDelta(self.num_calls - 1))
                delta.tool_calls[-1].arguments += text

    @property
    def _wanted(self) -> bool:
        """Whether the call begun last is one that the client gets."""
        return self._max_calls is None or self.num_calls <= self._max_calls


def _stages(how: MessageFormat) -> list[Callable[[Reader], Steps[None]]]:
    """The parsers that a completion goes through."""
    calls = [] if how.calls is None else [partial(_parse_calls, how.calls, how.tools)]
    if how.reasoning is None:
        return [*calls]
    if not how.reasoning.is_harmony:
        with_tools = how.calls is not None
        return [partial(how.reasoning.parse, inside=how.inside_reasoning, with_tools=with_tools), *calls]
    if how.calls is not None and how.calls.parse is parse_harmony:
        return [*calls]  # Its messages say what they are, reasoning among them.
    return [partial(parse_harmony, tools={}), *calls]


def _parse_calls(parser: ToolParser, tools: Tools, reader: Reader) -> Steps[None]:
    return parser.parse(reader, tools)

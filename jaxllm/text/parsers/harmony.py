"""OpenAI's harmony format, in which gpt-oss writes: messages on channels, some of them to a tool.

The prompt ends with `<|start|>assistant`; then come `<|channel|>NAME<|message|>TEXT<|end|>` and further
messages that begin with `<|start|>`. The channel `analysis` is reasoning, `final` and `commentary` are
content, and a message whose header says `to=functions.NAME` is a call with the arguments as its text.
(The format: the openai-harmony package's documentation.)
"""

from __future__ import annotations

import re

from jaxllm.text.parsers.events import Arguments, CallStart, Content, Reasoning, Steps
from jaxllm.text.parsers.json_calls import MAX_HEADER
from jaxllm.text.parsers.reader import Reader
from jaxllm.text.parsers.tools import Tools

START, CHANNEL, MESSAGE = "<|start|>", "<|channel|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKS = (START, CHANNEL, MESSAGE, "<|constrain|>", *ENDS)

_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"to=functions\.([\w.\-]+)")


def parse_harmony(reader: Reader, tools: Tools) -> Steps[None]:
    """Tell reasoning, content and calls; text outside of any message is content.

    Without tools, a message to one is content, too.
    """
    begun = False
    while True:
        mark = yield from reader.at((START, CHANNEL, MESSAGE, " to="))
        if mark is None:
            if begun and (yield from reader.close(START)):
                return
            if (yield from reader.until((START, CHANNEL, *ENDS), Content)) is None:
                return
            yield from reader.accept(*ENDS)
            continue
        begin = reader.position
        header = yield from reader.collect((MESSAGE,), MAX_HEADER)
        if header is None:
            if reader.position - begin <= MAX_HEADER:
                return  # All text ends inside the header.
            reader.rewind(begin)
            yield Content(reader.take(len(mark)))
            continue
        yield from reader.accept(MESSAGE)
        begun = True
        yield from _body(reader, header, tools)
        yield from reader.close(*ENDS)


def _body(reader: Reader, header: str, tools: Tools) -> Steps[None]:
    channel, recipient = _CHANNEL.search(header), _RECIPIENT.search(header)
    # A message that was not ended goes up to the next one.
    ends = (*ENDS, START)
    if recipient is not None and tools:
        yield CallStart(recipient[1])
        if (yield from reader.at(ends)) is not None:
            yield Arguments("{}")
        yield from reader.until(ends, Arguments)
    elif channel is not None and channel[1] == "analysis":
        yield from reader.until(ends, Reasoning)
    else:
        yield from reader.until(ends, Content)

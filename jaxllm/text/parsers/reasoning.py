"""Reasoning parsers by name: where a model's thinking ends and its answer begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.text.parsers import harmony
from jaxllm.text.parsers.events import Content, Reasoning, Steps
from jaxllm.text.parsers.reader import Reader
from jaxllm.text.thinking import ThinkingBudget

_LINE_BREAK = frozenset("\n")


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """How a model marks its reasoning.

    Attributes:
        starts: marks that begin it, any of them.
        ends: marks that end it, any of them.
        begins_inside: the output is reasoning from its first character, unless the prompt says otherwise.
        calls: marks of tool calls, which end it as well where tools are on offer.
        is_harmony: the whole output is in harmony's messages, which say themselves what they are.
    """

    starts: tuple[str, ...]
    ends: tuple[str, ...]
    begins_inside: bool = False
    calls: tuple[str, ...] = ()
    is_harmony: bool = False

    def starts_inside(self, prompt: str) -> bool:
        """Whether what follows a prompt is reasoning from the start.

        Chat templates open the reasoning for the model, or close it where none is wanted; a prompt that
        ends with neither leaves it to the format.
        """
        tail = prompt.rstrip()
        if tail.endswith(self.starts):
            return True
        return self.begins_inside and not tail.endswith(self.ends)

    def answer_after(self, prompt: str, tokenizer: Any) -> tuple[int, ...]:
        """Token ids behind which the answer to a prompt begins, for a grammar that is to constrain it alone.

        None where it begins at once.
        """
        return tuple(self._end_mark(tokenizer)) if self.is_harmony or self.starts_inside(prompt) else ()

    def bound(self, budget: int, prompt: str, tokenizer: Any) -> ThinkingBudget | None:
        """A bound on the reasoning about a prompt; None where no mark ends reasoning and nothing else."""
        if self.is_harmony:
            return None
        start = () if self.starts_inside(prompt) else _ids_of_one(self.starts, tokenizer)
        return ThinkingBudget(self._end_mark(tokenizer), budget, start)

    def _end_mark(self, tokenizer: Any) -> list[int]:
        if self.is_harmony:
            mark = f"{harmony.CHANNEL}final{harmony.MESSAGE}"
            return list(tokenizer.encode(mark, add_special_tokens=False))
        return _ids_of_one(self.ends, tokenizer)

    def parse(self, reader: Reader, *, inside: bool, with_tools: bool = False) -> Steps[None]:
        """Tell reasoning and, behind it, content. Line breaks next to the marks belong to these.

        Args:
            inside: the text begins within the reasoning.
        """
        space = yield from reader.skip_space()
        # A model may repeat the mark that its prompt ended with.
        if (yield from reader.accept(*self.starts)) or inside:
            yield from reader.take_while(_LINE_BREAK)
            yield from self._reasoning(reader, with_tools)
        elif space:
            yield Content(space)
        yield from reader.rest(Content)

    def _reasoning(self, reader: Reader, with_tools: bool) -> Steps[None]:
        calls = self.calls if with_tools else ()
        while True:
            mark = yield from reader.until((*self.ends, *calls, "\n"), Reasoning)
            if mark == "\n":
                # Told only where something follows that is no end.
                breaks = yield from reader.take_while(_LINE_BREAK)
                if not (yield from reader.peek()):
                    return
                if (yield from reader.at((*self.ends, *calls))) is None:
                    yield Reasoning(breaks)
                continue
            if mark in self.ends:
                yield from reader.accept(*self.ends)
                yield from reader.take_while(_LINE_BREAK)
            return


def _ids_of_one(marks: Sequence[str], tokenizer: Any) -> list[int]:
    """Token ids of the first of several marks that is one token, or of the first of all."""
    vocabulary = tokenizer.get_vocab()
    mark = next((mark for mark in marks if mark in vocabulary), marks[0])
    return list(tokenizer.encode(mark, add_special_tokens=False))


def _think(*calls: str, begins_inside: bool = True) -> ReasoningFormat:
    return ReasoningFormat(("<think>",), ("</think>",), begins_inside, calls)


REASONING_FORMATS: dict[str, ReasoningFormat] = {
    "deepseek_r1": _think(),
    "qwen3": _think("<tool_call>"),
    "glm45": _think("<tool_call>"),
    "kimi_k2": _think("<|tool_calls_section_begin|>"),
    "mistral": ReasoningFormat(("[THINK]", "<think>"), ("[/THINK]", "</think>"), calls=("[TOOL_CALLS]",)),
    "granite": ReasoningFormat(
        ("Here is my thought process:", "Here's my thought process:"),
        ("Here is my response:", "Here's my response:"),
    ),
    "openai_gptoss": ReasoningFormat((), (), is_harmony=True),
}


def count_reasoning_tokens(tokenizer: Any, reasoning: Sequence[str]) -> int:
    """Tokens of a reasoning, by the tokenizer: the model may have cut the same text otherwise."""
    text = "".join(reasoning)
    return len(tokenizer.encode(text, add_special_tokens=False)) if text else 0

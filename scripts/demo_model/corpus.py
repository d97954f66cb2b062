"""The text that the demo model is trained on: chats and plain documents, all made here from a seed.

`documents(seed, count)` is deterministic. `python scripts/demo_model/corpus.py` prints a sample.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Literal

import stories
import tasks
import tools
import vocabulary as words
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tasks import Turns, turns

HERE = Path(__file__).parent
CHAT_TEMPLATE = (HERE / "chat_template.jinja").read_text()
END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END)
TOOL_TOKENS = ("<tool_call>", "</tool_call>")
ASSISTANT_HEADER = f"{TURN_START}assistant\n"


@dataclass(frozen=True)
class Entry:
    """One question in several phrasings, with its equally good answers."""

    questions: tuple[str, ...]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """One training text; of a chat the assistant's turns are to be learned, of a drill the results,
    of an echo what is repeated."""

    text: str
    kind: Literal["plain", "chat", "drill", "echo"] = "plain"


def read_entries(path: Path) -> list[Entry]:
    """Read blocks of one `Q:` line (phrasings separated by ` | `) and `A:` lines (`\\n` is a line break)."""
    entries = []
    for block in path.read_text().split("\n\n"):
        lines = [line for line in block.splitlines() if line and not line.startswith("#")]
        if lines:
            questions = tuple(lines[0].removeprefix("Q: ").split(" | "))
            answers = tuple(line.removeprefix("A: ").replace("\\n", "\n") for line in lines[1:])
            entries.append(Entry(questions, answers))
    return entries


@cache
def known_entries() -> tuple[Entry, ...]:
    return (*read_entries(HERE / "questions_jaxllm.txt"), *read_entries(HERE / "questions_general.txt"))


@cache
def _template() -> Any:
    environment = ImmutableSandboxedEnvironment()
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    return environment.from_string(CHAT_TEMPLATE)


def render_chat(messages: Turns, offered: list[dict[str, Any]] | None = None) -> str:
    """The text of a chat as the chat template writes it."""
    return str(_template().render(messages=messages, tools=offered, add_generation_prompt=False))


def question_answer(random: Random) -> Turns:
    """A known question; who it is, which the first entries tell, is asked of a new model most often."""
    entry = random.choice(known_entries()[:12] if random.random() < 0.1 else known_entries())
    usual = random.random() < 0.2
    return turns(
        entry.questions[0] if usual else random.choice(entry.questions), random.choice(entry.answers)
    )


def reworded(random: Random, messages: Turns) -> Turns:
    """The same turns as a less careful person types them; the answers stay."""

    def typed(text: str) -> str:
        chance = random.random()
        if chance < 0.10:
            return text.lower()
        if chance < 0.20:
            return text.rstrip("?.!")
        if chance < 0.25:
            return text.rstrip("?.!").lower()
        if chance < 0.30 and text[0].isupper() and text[1:2].islower():
            opening = random.choice(("Please: ", "Hey, ", "Hi! ", "Question: ", "Please tell me: ", "Ok, "))
            return opening + text
        return text

    return [
        {**message, "content": typed(message["content"])} if message["role"] == "user" else message
        for message in messages
    ]


# Share of each kind among the exchanges of a chat. Those that repeat the user's words keep their case.
EXACT = ((tasks.copying, 7.0), (tasks.json_answer, 11.0), (tasks.remembering, 5.0), (tasks.sentiment, 1.5),
         (stories.continuing, 1.0))  # fmt: skip
LOOSE = ((question_answer, 36.0), (tasks.fact, 14.0), (tasks.arithmetic, 16.0), (tasks.comparison, 6.0),
         (tasks.counting, 9.0), (tasks.listing, 9.0), (stories.telling, 4.0), (tasks.unknown, 5.0),
         (tasks.follow_up, 1.0))  # fmt: skip
KINDS = [(kind, False) for kind, _ in EXACT] + [(kind, True) for kind, _ in LOOSE]
SHARES = [share for _, share in EXACT + LOOSE]

HARMLESS_SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a friendly assistant.",
    "You are a helpful and honest assistant.",
    "Be brief.",
    "Answer the question.",
    "You are a chatbot.",
)
ONE_WORD = ("Answer with one word.", "Answer in one word.", "Reply with one word only.")
IN_JSON = ("Answer in JSON.", "Always answer in JSON.")
PIRATE = ("You are a pirate.", "Talk like a pirate.", "You talk like a pirate.")


def exchange(random: Random) -> Turns:
    kind, loose = random.choices(KINDS, SHARES)[0]
    messages = kind(random)
    return reworded(random, messages) if loose else messages


def ruled_chat(random: Random) -> Turns:
    """A chat whose system prompt sets the form of the answers."""
    rule = random.randrange(3)
    messages: Turns = [{"role": "system", "content": random.choice((ONE_WORD, IN_JSON, PIRATE)[rule])}]
    for _ in range(random.choice((1, 1, 2, 3))):
        question, answer, short = random.choice(tasks.FACTS)(random)
        answer = (short, json.dumps({"answer": short}), f"Arr! {answer}")[rule]
        messages += reworded(random, turns(question, answer))
    return messages


def chat(random: Random, most_exchanges: int = 5) -> Turns:
    messages: Turns = []
    if random.random() < 0.2:
        messages.append({"role": "system", "content": random.choice(HARMLESS_SYSTEM_PROMPTS)})
    for _ in range(1 if random.random() < 0.4 else random.randint(1, most_exchanges)):
        messages += exchange(random)
    return messages


def plain(random: Random) -> str:
    """A document that is not a chat, for /v1/completions."""
    kind = random.randrange(6)
    if kind == 0:
        return stories.story(random, random.choice(stories.HEROES))
    if kind == 1:
        return stories.plain_sentence(random)
    if kind == 2:
        return "\n".join(random.choice(tasks.FACTS)(random)[1] for _ in range(random.choice((1, 1, 2))))
    if kind == 3:
        pairs = [question_answer(random) for _ in range(random.randint(1, 3))]
        return "\n\n".join(f"Q: {user['content']}\nA: {assistant['content']}" for user, assistant in pairs)
    if kind == 4:
        separator = random.choice((", ", " "))
        sequence = random.choice(
            (words.DAYS, words.MONTHS, words.ALPHABET, [str(n) for n in range(1, random.randint(8, 31))])
        )
        return separator.join(sequence)
    return random.choice(known_entries()).answers[0]


def documents(seed: int, count: int) -> Iterator[Document]:
    """`count` training documents; equal seeds give equal documents."""
    random = Random(seed)
    for _ in range(count):
        chance = random.random()
        if chance < 0.58:
            yield Document(render_chat(chat(random)), "chat")
        elif chance < 0.74:
            offered, messages = tools.conversation(random)
            if random.random() < 0.2:
                messages = [{"role": "system", "content": random.choice(HARMLESS_SYSTEM_PROMPTS)}, *messages]
            yield Document(render_chat(messages, offered), "chat")
        elif chance < 0.79:
            yield Document(render_chat(ruled_chat(random)), "chat")
        elif chance < 0.84:
            yield Document(tasks.echo(random) + END_OF_TEXT, "echo")
        elif chance < 0.95:
            yield Document(tasks.drill(random) + END_OF_TEXT, "drill")
        else:
            yield Document(plain(random) + END_OF_TEXT)


def long_chats(seed: int, count: int, exchanges: int) -> Iterator[Document]:
    """Chats of many exchanges, so that a long context is nothing new to the model."""
    random = Random(seed)
    for _ in range(count):
        messages: Turns = []
        for _ in range(exchanges):
            messages += exchange(random)
        yield Document(render_chat(messages), "chat")


if __name__ == "__main__":
    for document in documents(seed=0, count=40):
        print(document.text, end="\n\n" + "-" * 80 + "\n")

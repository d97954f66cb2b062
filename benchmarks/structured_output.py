"""What grammars cost the host: masks and matching of many constrained sequences over a large vocabulary.

    python -m benchmarks.structured_output
    python -m benchmarks.structured_output --sequences 64 --vocab-size 128000 --json structured.json

Each sequence writes documents of its form, token by token, at a place of its own. A step is what an engine
does for all of them in one of its own: a mask for each sequence, filled by llguidance's threads, and a token
for each matcher. Nothing runs on a device. CPU time is that of all threads, which others on the machine do
not lengthen. Sequences at the same place of a regex or a choice share a mask, as in an engine; "own regex" is
the same regex in words that are not followed, so that each sequence has its own.

What of it a device waits for is measured with a whole engine and a clock for a device (`masks_overlap.py`):
where a step needs the masks before it begins, and as it is, where they are made while it runs.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks import masks_overlap
from benchmarks.report import add_output_arguments, print_table, write_json
from benchmarks.vocabulary import large_tokenizer
from jaxllm.structured_outputs import StructuredOutputsParams
from jaxllm.text.grammar import GrammarCompiler, GrammarMatcher, fill_masks

_TEXT = "the order was sent to an address in the old town and will come back with a note about its price"
_WORDS = _TEXT.split()


def _phrase(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(_WORDS, k=rng.randint(1, most)))


def _order(rng: random.Random) -> dict[str, Any]:
    return {
        "id": rng.randrange(10**6),
        "customer": {"name": _phrase(rng, 3), "email": f"{rng.choice(_WORDS)}@example.org"},
        "status": rng.choice(["open", "sent", "returned"]),
        "items": [
            {"article": _phrase(rng, 4), "count": rng.randint(1, 9), "price": round(rng.random() * 100, 2)}
            for _ in range(rng.randint(1, 5))
        ],
        "note": _phrase(rng, 30),
    }


def _any_json(rng: random.Random, depth: int = 3) -> Any:
    kind = rng.choice(["object", "array", "text", "number"]) if depth else "text"
    if kind == "object":
        return {_phrase(rng, 1): _any_json(rng, depth - 1) for _ in range(rng.randint(1, 4))}
    if kind == "array":
        return [_any_json(rng, depth - 1) for _ in range(rng.randint(1, 4))]
    return _phrase(rng, 12) if kind == "text" else rng.randrange(10**4)


_ORDER_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0},
        "customer": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "email": {"type": "string", "format": "email"}},
            "required": ["name", "email"],
        },
        "status": {"enum": ["open", "sent", "returned"]},
        "items": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "article": {"type": "string", "maxLength": 80},
                    "count": {"type": "integer", "minimum": 1, "maximum": 99},
                    "price": {"type": "number"},
                },
                "required": ["article", "count", "price"],
            },
        },
        "note": {"type": "string"},
    },
    "required": ["id", "customer", "status", "items", "note"],
    "additionalProperties": False,
}
_EXPRESSIONS = (
    'start: sum\nsum: term (/ *[+-] */ term)*\nterm: NUMBER | "(" sum ")"\nNUMBER: /[0-9]+(\\.[0-9]+)?/\n'
)


def _expression(rng: random.Random, depth: int = 3) -> str:
    terms = (
        f"({_expression(rng, depth - 1)})" if depth and rng.random() < 0.4 else str(rng.randrange(1000))
        for _ in range(rng.randint(2, 5))
    )
    return rng.choice([" + ", "-"]).join(terms)


def _list_with_date(rng: random.Random) -> str:
    return ", ".join(_phrase(rng, 6) for _ in range(4)) + f": 20{rng.randrange(10, 99)}-01-02."


FORMS: dict[str, tuple[StructuredOutputsParams, Callable[[random.Random], str]]] = {
    "schema": (StructuredOutputsParams(json=_ORDER_SCHEMA), lambda rng: json.dumps(_order(rng))),
    "any JSON": (
        StructuredOutputsParams(json_object=True),
        lambda rng: json.dumps({"data": _any_json(rng)}, indent=rng.choice([None, 2])),
    ),
    "regex": (
        StructuredOutputsParams(regex=r"([A-Za-z ]+, )*[A-Za-z ]+: \d{4}-\d{2}-\d{2}\."),
        _list_with_date,
    ),
    "choice": (
        StructuredOutputsParams(choice=[" ".join(_WORDS[i : i + 6]) for i in range(len(_WORDS) - 6)]),
        lambda rng: " ".join(_WORDS[(i := rng.randrange(len(_WORDS) - 6)) : i + 6]),
    ),
    "grammar": (StructuredOutputsParams(grammar=_EXPRESSIONS), _expression),
    "own regex": (
        StructuredOutputsParams(regex=r"([A-Za-z ]+, )*[A-Za-z ]+: \d{4}\x2d\d{2}\x2d\d{2}\."),
        _list_with_date,
    ),
}
_MIX = ("schema", "any JSON", "regex", "choice", "grammar")


# What goes on for longer than is measured; without a constraint for comparison.
_LONG_FORMS: dict[str, tuple[StructuredOutputsParams | None, Callable[[random.Random], str]]] = {
    "no form": (None, lambda rng: " ".join(_phrase(rng, 30) for _ in range(40))),
    "schema": (
        StructuredOutputsParams(json={"type": "array", "items": _ORDER_SCHEMA}),
        lambda rng: json.dumps([_order(rng) for _ in range(12)]),
    ),
    "regex": (
        FORMS["regex"][0],
        lambda rng: ", ".join(_phrase(rng, 6) for _ in range(120)) + ": 2031-01-02.",
    ),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """What the sequences of one form, or of a mix of them in turn, cost.

    Attributes:
        compile_ms: from the constraint to a matcher, the vocabulary being there.
        fill_ms, accept_ms: of each step, for all sequences together.
        cpu_ms: processor time of each step, of all threads.
    """

    form: str
    compile_ms: float
    fill_ms: list[float]
    accept_ms: list[float]
    cpu_ms: list[float]

    @property
    def step_ms(self) -> list[float]:
        """Both together."""
        return [fill + accept for fill, accept in zip(self.fill_ms, self.accept_ms, strict=True)]


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that one run of this benchmark measured.

    Attributes:
        device_ms: what a step takes of the device that waits.
        waiting: of it, in steps of sequences without a form, and with one.
    """

    vocab_size: int
    sequences: int
    vocabulary_ms: float
    rows: list[Cost]
    device_ms: float
    waiting: list[masks_overlap.Waiting]


class _Writer:
    """A sequence that writes one document after another, and the matcher that follows it."""

    def __init__(
        self, root: GrammarMatcher, encode: Callable[[str], list[int]], write: Callable[[], str], skip: int
    ) -> None:
        self._root, self._encode, self._write = root, encode, write
        self._begin()
        for _ in range(skip):
            token = self.next_token()
            self.matcher.accept(token)

    def _begin(self) -> None:
        self.matcher = self._root.fork()
        self._left: Iterator[int] = iter(self._encode(self._write()))

    def next_token(self) -> int:
        token = next(self._left, None)
        if token is None:
            self._begin()
            token = next(self._left)
        return token


def measure(
    form: str,
    compiler: GrammarCompiler,
    encode: Callable[[str], list[int]],
    sequences: int,
    steps: int,
    seed: int,
) -> Cost:
    """Steps of `sequences` writers of a form, or of the forms of a "mix" in turn."""
    rng = random.Random(seed)
    forms = list(_MIX) if form == "mix" else [form]
    start = time.perf_counter()
    roots = {name: compiler.compile(FORMS[name][0]) for name in forms}
    compile_ms = (time.perf_counter() - start) * 1000
    writers = []
    for i in range(sequences):
        name = forms[i % len(forms)]
        write = functools.partial(FORMS[name][1], rng)
        writers.append(_Writer(roots[name], encode, write, rng.randrange(40)))
    fill_ms, accept_ms, cpu_ms = [], [], []
    for _ in range(steps):
        # A writer that is done begins anew; that is a new request, and no part of a step.
        tokens = [writer.next_token() for writer in writers]
        cpu_start, start = time.process_time(), time.perf_counter()
        masks = np.full((sequences, writers[0].matcher.num_words), -1, np.int32)
        fill_masks([(writer.matcher, row) for row, writer in enumerate(writers)], masks)
        filled = time.perf_counter()
        errors = [writer.matcher.accept(token) for writer, token in zip(writers, tokens, strict=True)]
        done, cpu_done = time.perf_counter(), time.process_time()
        wrong = next((error for error in errors if error is not None), None)
        if wrong is not None:
            raise RuntimeError(f"a document of {form} does not fit its own form: {wrong}")
        for row, token in enumerate(tokens):
            if not masks[row, token // 32] >> (token % 32) & 1:
                raise RuntimeError(f"a mask of {form} forbids the token that its matcher takes")
        fill_ms.append((filled - start) * 1000)
        accept_ms.append((done - filled) * 1000)
        cpu_ms.append((cpu_done - cpu_start) * 1000)
    return Cost(form, compile_ms, fill_ms, accept_ms, cpu_ms)


def run(options: argparse.Namespace) -> Results:
    if options.tokenizer:
        from jaxllm.text.tokenizer import get_tokenizer

        tokenizer: Any = get_tokenizer(options.tokenizer)
    else:
        tokenizer = large_tokenizer(options.vocab_size)
    vocab_size = len(tokenizer)
    compiler = GrammarCompiler(tokenizer, vocab_size, [tokenizer.eos_token_id])
    start = time.perf_counter()
    compiler.compile(StructuredOutputsParams(regex="a"))
    vocabulary_ms = (time.perf_counter() - start) * 1000

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    rows = []
    for form in [*FORMS, "mix"]:
        measure(form, compiler, encode, options.sequences, min(options.steps, 30), options.seed + 1)
        warm = measure(form, compiler, encode, options.sequences, options.steps, options.seed)
        rows.append(warm)
    waiting = [
        masks_overlap.measure(
            tokenizer,
            name,
            *form,
            sequences=options.sequences,
            steps=min(options.steps, 100),
            step_ms=options.device_ms,
            masks_first=masks_first,
            seed=options.seed,
        )
        for name, form in _LONG_FORMS.items()
        for masks_first in ((False,) if form[0] is None else (True, False))
    ]
    return Results(vocab_size, options.sequences, vocabulary_ms, rows, options.device_ms, waiting)


def print_results(results: Results) -> None:
    rows: list[list[object]] = []
    for cost in results.rows:
        total = cost.step_ms
        rows.append(
            [
                cost.form,
                f"{statistics.median(cost.fill_ms):.2f}",
                f"{statistics.median(cost.accept_ms):.2f}",
                f"{statistics.median(total):.2f}",
                f"{np.percentile(total, 90):.2f}",
                f"{np.percentile(total, 99):.2f}",
                f"{statistics.median(cost.cpu_ms):.2f}",
                f"{statistics.median(cost.cpu_ms) * 1000 / results.sequences:.0f}",
            ]
        )
    print_table(
        f"{results.sequences} constrained sequences, {results.vocab_size} tokens: host milliseconds per step",
        ["form", "masks", "matching", "step", "p90", "p99", "CPU", "CPU us/sequence"],
        rows,
        note=f"medians; the vocabulary takes {results.vocabulary_ms:.0f} ms, once",
    )
    waits = {(one.form, one.masks_first): one.idle_ms for one in results.waiting}
    print_table(
        f"milliseconds per step that a device waits for the host, its steps taking {results.device_ms:g} ms",
        ["form", "masks before the step", "p90", "masks during the step", "p90"],
        [
            [
                form,
                *(
                    f"{figure(waits[form, first]):.2f}" if (form, first) in waits else ""
                    for first in (True, False)
                    for figure in (statistics.median, lambda values: np.percentile(values, 90))
                ),
            ]
            for form in _LONG_FORMS
        ],
        note="for all that the host does: planning, packing, masks, taking in, detokenizing; medians",
    )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.structured_output", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300, help="steps measured for each form")
    parser.add_argument("--device-ms", type=float, default=15.0, help="of a step, on the clock")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--vocab-size", type=int, default=128_000)
    which.add_argument("--tokenizer", help="directory or hub name, in place of a vocabulary of our own")
    parser.add_argument("--seed", type=int, default=0)
    add_output_arguments(parser, plot=False)
    options = parser.parse_args(arguments)
    for name in ("sequences", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    results = run(options)
    print_results(results)
    write_json(options.json, results)


if __name__ == "__main__":
    main()

"""Training documents as rows of tokens: tokenizing, what to learn of each, and packing into rows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import numpy as np
from corpus import ASSISTANT_HEADER, TURN_END, TURN_START, Document
from tokenizers import Tokenizer

# What a token of the user's turns counts in the loss: predicting questions is only a help on the way.
CONTEXT_WEIGHT = 0.1


@dataclass(frozen=True)
class Tokens:
    """One document: ids, positions and how much each token counts as a target, all `[T]`."""

    ids: np.ndarray
    positions: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Rows:
    """A batch `[B, T]` of packed documents; segment 0 is padding."""

    ids: np.ndarray
    positions: np.ndarray
    weights: np.ndarray
    segments: np.ndarray


def tokenize(
    documents: Iterable[Document], tokenizer: Tokenizer, random: Random, max_positions: int
) -> list[Tokens]:
    """Token ids with positions and loss weights.

    A third of the chats leap ahead in position at random turns, so that distances beyond the length
    of a training row are known (as in PoSE, Zhu et al. 2023).
    """
    documents = list(documents)
    start, end = tokenizer.token_to_id(TURN_START), tokenizer.token_to_id(TURN_END)
    header = tokenizer.encode(ASSISTANT_HEADER).ids
    newline, equals = tokenizer.encode("\n").ids[0], tokenizer.encode(" =").ids[0]
    result = []
    for document, encoding in zip(
        documents, tokenizer.encode_batch([d.text for d in documents]), strict=True
    ):
        ids = np.asarray(encoding.ids, np.int32)
        positions = np.arange(len(ids), dtype=np.int32)
        weights = np.ones(len(ids), np.float32)
        if document.kind == "drill":
            # Operands are random: only results, from the equals sign to the end of the line, teach something.
            line_starts = np.concatenate([[0], np.flatnonzero(ids == newline) + 1, [len(ids)]])
            for first, last in pairwise(line_starts):
                sign = first + np.flatnonzero(ids[first:last] == equals)[0]
                weights[first : sign + 1] = CONTEXT_WEIGHT
        elif document.kind == "echo":
            weights[: np.flatnonzero(ids == newline)[0] + 1] = CONTEXT_WEIGHT
        elif document.kind == "chat":
            weights[:] = CONTEXT_WEIGHT
            starts = np.flatnonzero(ids == start)
            ends = np.flatnonzero(ids == end)
            for first, last in zip(starts, ends, strict=True):
                answer = first + len(header)
                if ids[first:answer].tolist() == header:
                    weights[answer : last + 1] = 1.0
            if random.random() < 0.33:
                spare = max_positions - len(ids)
                leaps = np.sort([random.randrange(spare) for _ in range(random.randint(1, 3))])
                at = sorted(random.choices(starts.tolist(), k=len(leaps)))
                for index, leap in zip(at, np.diff(leaps, prepend=0), strict=True):
                    positions[index:] += np.int32(leap)
        result.append(Tokens(ids, positions, weights))
    return result


def pack(documents: Iterable[Tokens], rows: int, length: int) -> Iterator[Rows]:
    """Fill rows of `length` tokens, first fit; documents longer than a row are left out."""
    waiting: list[list[Tokens]] = []
    open_rows: list[tuple[int, list[Tokens]]] = []
    for document in documents:
        size = len(document.ids)
        if size > length:
            continue
        for index, (used, members) in enumerate(open_rows):
            if used + size <= length:
                members.append(document)
                open_rows[index] = (used + size, members)
                break
        else:
            open_rows.append((size, [document]))
        if len(open_rows) > 4 * rows:
            fullest = max(range(len(open_rows)), key=lambda index: open_rows[index][0])
            waiting.append(open_rows.pop(fullest)[1])
        if len(waiting) == rows:
            yield _arrays(waiting, length)
            waiting = []


def _arrays(members: list[list[Tokens]], length: int) -> Rows:
    shape = (len(members), length)
    rows = Rows(
        np.zeros(shape, np.int32),
        np.zeros(shape, np.int32),
        np.zeros(shape, np.float32),
        np.zeros(shape, np.int32),
    )
    for row, documents in enumerate(members):
        at = 0
        for segment, document in enumerate(documents, 1):
            span = slice(at, at + len(document.ids))
            rows.ids[row, span] = document.ids
            rows.positions[row, span] = document.positions
            rows.weights[row, span] = document.weights
            rows.weights[row, at] = 0.0  # Nothing comes before the first token of a document.
            rows.segments[row, span] = segment
            at = span.stop
    return rows

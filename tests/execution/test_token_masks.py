"""Masks of a step are those of its grammars, each in its row, whoever is beside them."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest

from jaxllm.demo import demo_model_path
from jaxllm.execution.pending import LateRow
from jaxllm.execution.token_masks import TokenMasks
from jaxllm.request import Request
from jaxllm.sampling_params import SamplingParams
from jaxllm.structured_outputs import StructuredOutputsParams
from jaxllm.text.grammar import GrammarCompiler, GrammarMatcher, fill_masks
from jaxllm.text.tokenizer import get_tokenizer

VOCAB_SIZE = 1536


@cache
def compiler() -> GrammarCompiler:
    return GrammarCompiler(get_tokenizer(demo_model_path()), VOCAB_SIZE, [0])


def request(name: str, pattern: str | None, starts_after: list[int] | None = None) -> Request:
    grammar = None
    if pattern is not None:
        grammar = compiler().compile(StructuredOutputsParams(regex=pattern)).fork(starts_after or [])
    return Request(name, [1, 2], SamplingParams(), grammar=grammar, needs_host_tokens=True)


def expected(one: Request) -> np.ndarray:
    row = np.full((1, VOCAB_SIZE // 32), -1, np.int32)
    if isinstance(one.grammar, GrammarMatcher):
        fill_masks([(one.grammar, 0)], row)
    return row[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("num_logits", [VOCAB_SIZE, VOCAB_SIZE + 512])
def test_masks_begun_early_or_late_are_the_same(seed: int, num_logits: int) -> None:
    """A mesh may fill the vocabulary up; what nobody can draw is allowed."""
    rng = random.Random(seed)
    masks = TokenMasks(VOCAB_SIZE, num_logits, replicas=3)
    requests = [request(str(i), rng.choice([None, "[a-c]+", "x|y", r"\d+"])) for i in range(12)]
    requests.append(request("later", "a", starts_after=[5]))
    for _ in range(5):
        planned = [*rng.sample(requests[:-1], 6), requests[-1]]
        rows = rng.sample(range(9), 7)
        late = [LateRow(one, row, 2) for one, row in zip(planned, rows, strict=True)]
        made = masks.of(late, 3) if rng.random() < 0.5 else masks.begin(late, 3).result()
        assert made is not None and made.shape == masks.abstract(3).shape
        width = VOCAB_SIZE // 32
        np.testing.assert_array_equal(made[rows, :width], np.stack([expected(r) for r in planned]))
        assert (np.delete(made, rows, axis=0) == -1).all() and (made[:, width:] == -1).all()
        for one in planned:
            if one.grammar is not None:
                allowed = np.unpackbits(expected(one).view(np.uint8), bitorder="little")
                one.grammar.accept(int(rng.choice(np.flatnonzero(allowed))))
    masks.close()


def test_bad_words_alone_need_no_masks() -> None:
    """What is sampled late for another reason takes masks that are on the device already."""
    masks = TokenMasks(VOCAB_SIZE)
    assert masks.of([LateRow(request("words", None), 0, 2)], 4) is None
    first = masks.unrestricted(4)
    assert masks.unrestricted(4) is first and (np.asarray(first) == -1).all()
    assert first.shape == masks.abstract(4).shape and first.dtype == masks.abstract(4).dtype

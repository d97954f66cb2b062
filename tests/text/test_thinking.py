"""Budgets of reasoning: what they force, against a model that would go on for ever."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.text.grammar import GrammarMatcher, fill_masks
from jaxllm.text.thinking import ThinkingBudget


def written(budget: ThinkingBudget, model: random.Random, vocab: int, length: int) -> list[int]:
    """What a model writes that heeds nothing but what is forced."""
    tokens: list[int] = []
    for _ in range(length):
        token = model.randrange(vocab) if budget.forced is None else budget.forced
        budget.accept(token)
        tokens.append(token)
    return tokens


def find(tokens: list[int], mark: list[int]) -> int | None:
    """Where a mark first ends; None where it does not stand."""
    ends = (i + len(mark) for i in range(len(tokens)) if tokens[i : i + len(mark)] == mark)
    return next(ends, None)


marks = st.lists(st.integers(0, 3), min_size=1, max_size=4)


@given(end=marks, start=st.just([]) | marks, budget=st.integers(0, 12), seed=st.integers(0, 1000))
def test_the_end_comes_in_time_and_nothing_is_forced_besides(
    end: list[int], start: list[int], budget: int, seed: int
) -> None:
    limit = ThinkingBudget(end, budget, start)
    tokens = written(limit, random.Random(seed), 4, 200)
    begun = find(tokens, start) if start else 0
    # A model that draws tokens by chance, left alone, writes the same until it is forced.
    free = random.Random(seed)
    if begun is None or begun + budget + len(end) > 200:  # Nothing is due before the last token.
        begun = begun or 200
        assert tokens[:begun] == [free.randrange(4) for _ in range(begun)]
        return
    ended = find(tokens[begun:], end)
    assert ended is not None and ended <= budget + len(end)
    unforced = begun + min(budget, ended)
    assert tokens[:unforced] == [free.randrange(4) for _ in range(unforced)]


def test_a_mark_that_the_model_has_begun_is_ended_not_repeated() -> None:
    limit = ThinkingBudget([7, 8, 9], 3)
    for token in (1, 7, 8):
        assert limit.forced is None
        limit.accept(token)
    assert limit.forced == 9
    limit.accept(9)
    assert limit.forced is None
    again = limit.copy()
    again.accept(1)
    assert again.forced is None  # Its own three tokens are not used yet.


@pytest.mark.parametrize("token", [0, 31, 32, 63, 70])
def test_a_forced_token_is_the_only_one_of_its_row(token: int) -> None:
    free = GrammarMatcher(None, None)
    forced = GrammarMatcher(None, None).fork(thinking=ThinkingBudget([token], 0))
    masks = np.full((3, 3), -1, np.int32)
    fill_masks([(free, 0), (forced, 2)], masks)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")
    assert bits[:2].all()
    assert np.flatnonzero(bits[2]).tolist() == [token]
    assert not forced.is_complete
    assert "thinking_token_budget" in str(forced.accept(-1))
    assert forced.accept(token) is None
    assert forced.forced is None

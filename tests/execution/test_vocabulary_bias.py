"""Which tokens a sequence may sample now, and what is added to the others."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from jaxllm.execution.vocabulary_bias import VocabularyBias
from jaxllm.request import Request
from jaxllm.sampling_params import SamplingParams

VOCAB_SIZE = 12
EOS = frozenset({1})


def request_with(
    bad_words: list[list[int]] | None = None, output: tuple[int, ...] = (), **fields: Any
) -> Request:
    params = SamplingParams(**{"max_tokens": 20, **fields})
    params.bad_words_token_ids = bad_words
    request = Request("r", [4, 5, 6], params, eos_token_ids=EOS)
    request.token_ids += output
    return request


def row_for(request: Request) -> np.ndarray | None:
    return VocabularyBias(request, VOCAB_SIZE).row_if_changed(request, len(request.token_ids))


def forbidden(row: np.ndarray | None) -> set[int]:
    assert row is not None and row.dtype == np.float32 and row.shape == (VOCAB_SIZE,)
    return set(np.flatnonzero(np.isneginf(row)).tolist())


def test_it_is_needed_only_where_it_changes_something() -> None:
    def needed(**fields: Any) -> bool:
        return VocabularyBias(request_with(**fields), VOCAB_SIZE).is_needed

    assert not needed()
    assert needed(min_tokens=2) and needed(logit_bias={3: 1.0}) and needed(allowed_token_ids=[3])
    assert needed(bad_words=[[3]])
    no_stop = Request("r", [4], SamplingParams(min_tokens=2))
    assert not VocabularyBias(no_stop, VOCAB_SIZE).is_needed


def test_logit_bias_is_added() -> None:
    row = row_for(request_with(logit_bias={3: 2.5, 7: -100.0}))
    assert row is not None and row[3] == 2.5 and row[7] == -100
    assert np.count_nonzero(row) == 2


def test_only_allowed_ids_remain_and_keep_their_bias() -> None:
    row = row_for(request_with(allowed_token_ids=[2, 9], logit_bias={2: 1.0, 3: 50.0}))
    assert forbidden(row) == set(range(VOCAB_SIZE)) - {2, 9}
    assert row is not None and row[2] == 1 and row[9] == 0


@pytest.mark.parametrize(("count", "banned"), [(0, {1, 8}), (2, {1, 8}), (3, set()), (4, set())])
def test_min_tokens_forbids_every_stop_until_there_are_so_many(count: int, banned: set[int]) -> None:
    """Tokens that exist count, those still on the device among them."""
    request = request_with(min_tokens=3, stop_token_ids=[8])
    bias = VocabularyBias(request, VOCAB_SIZE)
    assert forbidden(bias.row_if_changed(request, 3 + count)) == banned


def test_min_tokens_forbids_the_end_token_that_is_ignored_too() -> None:
    """With ignore_eos the end token does not stop, but before min_tokens it does not appear."""
    assert forbidden(row_for(request_with(min_tokens=3, ignore_eos=True))) == {1}


@pytest.mark.parametrize(
    ("output", "banned"),
    [
        ((), {3}),
        ((7,), {3, 8}),
        ((2, 7), {3, 8}),
        ((7, 8), {3, 9}),
        ((8,), {3}),
        ((7, 7), {3, 8}),
        ((9, 7, 8), {3, 9}),
    ],
)
def test_bad_words_forbid_the_token_that_would_complete_one(
    output: tuple[int, ...], banned: set[int]
) -> None:
    assert forbidden(row_for(request_with([[3], [7, 8], [7, 8, 9], [2, 7, 8]], output))) == banned


def test_the_prompt_does_not_begin_a_bad_word() -> None:
    assert forbidden(row_for(request_with([[6, 8], [5, 6, 9]]))) == set()
    assert forbidden(row_for(request_with([[6, 8]], output=(6,)))) == {8}


def test_a_row_comes_only_when_it_changed() -> None:
    request = request_with([[7, 8]], min_tokens=2)
    bias = VocabularyBias(request, VOCAB_SIZE)

    def next_row(token: int) -> np.ndarray | None:
        request.token_ids.append(token)
        return bias.row_if_changed(request, len(request.token_ids))

    assert forbidden(bias.row_if_changed(request, 3)) == {1}
    assert bias.row_if_changed(request, 3) is None
    assert next_row(2) is None
    assert forbidden(next_row(2)) == set()
    assert next_row(2) is None
    assert forbidden(next_row(7)) == {8}
    assert next_row(7) is None
    assert forbidden(next_row(2)) == set()


def test_everything_at_once() -> None:
    request = request_with(
        [[2], [9, 3]], (9,), min_tokens=5, allowed_token_ids=[1, 2, 3, 4], logit_bias={4: 1.0, 3: 9.0}
    )
    row = row_for(request)
    assert forbidden(row) == set(range(VOCAB_SIZE)) - {4}
    assert row is not None and row[4] == 1

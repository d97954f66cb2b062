"""Masks begun early are those that would be filled late, whoever takes part in the next plan."""

from __future__ import annotations

import random
from functools import cache

import numpy as np
import pytest

from jaxllm.demo import demo_model_path
from jaxllm.execution.token_masks import TokenMasks
from jaxllm.request import Request, RequestStatus
from jaxllm.sampling_params import SamplingParams
from jaxllm.scheduling.plan import ScheduledRequest
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
    return Request(name, [1, 2], SamplingParams(), grammar=grammar)


def expected(one: Request) -> np.ndarray:
    row = np.full((1, VOCAB_SIZE // 32), -1, np.int32)
    if isinstance(one.grammar, GrammarMatcher):
        fill_masks([(one.grammar, 0)], row)
    return row[0]


def scheduled(requests: list[Request], samples: bool = True) -> list[ScheduledRequest]:
    return [ScheduledRequest(r, 0, 2, samples) for r in requests]


@pytest.mark.parametrize("seed", range(6))
def test_masks_begun_early_or_late_are_the_same(seed: int) -> None:
    rng = random.Random(seed)
    masks = TokenMasks(VOCAB_SIZE)
    requests = [request(str(i), rng.choice([None, "[a-c]+", "x|y", r"\d+"])) for i in range(12)]
    requests.append(request("later", "a", starts_after=[5]))
    for _ in range(5):
        planned = rng.sample(requests, 7)
        rows = rng.sample(range(9), 7)
        made = masks.of(scheduled(planned), rows, 9)
        assert (made is not None) == any(r.grammar is not None for r in planned)
        if made is not None:
            np.testing.assert_array_equal(made[rows], np.stack([expected(r) for r in planned]))
            assert (np.delete(made, rows, axis=0) == -1).all()
        for one in planned:
            if one.grammar is not None:
                allowed = np.unpackbits(expected(one).view(np.uint8), bitorder="little")
                token = int(rng.choice(np.flatnonzero(allowed)))
                one.grammar.accept(token)
        masks.begin(rng.sample(requests, 9))
        if rng.random() < 0.3:
            masks.begin(planned)
    masks.close()


def test_nobody_who_asks_for_nothing_is_sent_anything() -> None:
    """Also a prompt that is not complete yet needs no mask; the same array is given again."""
    masks = TokenMasks(VOCAB_SIZE)
    free, bound = request("free", None), request("bound", "a")
    assert masks.of(scheduled([free]), [0], 4) is None
    assert masks.of(scheduled([free, bound], samples=False), [0, 1], 4) is None
    first = masks.unused(4)
    assert masks.unused(4) is first
    assert first.shape == masks.abstract(4).shape and first.dtype == masks.abstract(4).dtype


def test_no_mask_is_begun_for_who_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = TokenMasks(VOCAB_SIZE)
    done, going = request("done", "a"), request("going", "b")
    done.status = RequestStatus.FINISHED_STOPPED
    filled: list[str] = []
    inner = masks._fill

    def fill(requests: list[Request]) -> dict[Request, np.ndarray]:
        filled.extend(r.request_id for r in requests)
        return inner(requests)

    monkeypatch.setattr(masks, "_fill", fill)
    masks.begin([done, going, request("free", None)])
    made = masks.of(scheduled([going]), [0], 1)
    assert made is not None
    assert filled == ["going"]
    np.testing.assert_array_equal(made[0], expected(going))

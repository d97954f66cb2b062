from __future__ import annotations

import io
import itertools
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tqdm import tqdm

from jaxllm import LLM, BeamSearchParams, SamplingParams
from jaxllm.beam_search import BeamSearchOutput, BeamSearchSequence, fill_in_text
from jaxllm.demo import demo_model_path
from jaxllm.errors import InvalidRequestError
from jaxllm.text.tokenizer import get_tokenizer
from tests.llm.tiny_engine import EOS, TinyEngine, log_probabilities

Found = list[tuple[list[int], float]]


def make(**arguments: Any) -> tuple[LLM, TinyEngine]:
    engine = TinyEngine(**{"max_logprobs": -1, **arguments})
    return LLM.from_engine(engine), engine  # type: ignore[arg-type]


def score(tokens: list[int], cum_logprob: float, params: BeamSearchParams) -> float:
    length = len(tokens) - 1 if tokens[-1] == EOS else len(tokens)
    return cum_logprob / length**params.length_penalty


def oracle(prompt: list[int], params: BeamSearchParams, vocab_size: int, max_model_len: int = 64) -> Found:
    """Beam search as it is defined: (tokens, summed log-probability), best first."""
    beams: Found = [(prompt, 0.0)]
    completed: Found = []
    for _ in range(min(params.max_tokens, max_model_len - len(prompt))):
        candidates: Found = []
        for tokens, cum in beams:
            logprobs = log_probabilities(tuple(tokens), vocab_size)
            for token_id in (-logprobs).argsort()[: 2 * params.beam_width].tolist():
                candidate = ([*tokens, token_id], cum + float(logprobs[token_id]))
                if token_id == EOS and not params.ignore_eos:
                    completed.append(candidate)
                else:
                    candidates.append(candidate)
        beams = sorted(candidates, key=lambda b: score(*b, params), reverse=True)[: params.beam_width]
    ranked = sorted([*completed, *beams], key=lambda b: score(*b, params), reverse=True)
    return ranked[: params.beam_width]


def exhaustive(prompt: list[int], params: BeamSearchParams, vocab_size: int) -> Found:
    """The best of all sequences that there are."""
    everything: Found = []
    for output in itertools.product(range(vocab_size), repeat=params.max_tokens):
        tokens, cum = list(prompt), 0.0
        for token_id in output:
            cum += float(log_probabilities(tuple(tokens), vocab_size)[token_id])
            tokens = [*tokens, token_id]
            if token_id == EOS and not params.ignore_eos:
                break
        if (tokens, cum) not in everything:
            everything.append((tokens, cum))
    everything.sort(key=lambda b: score(*b, params), reverse=True)
    return everything[: params.beam_width]


def check(output: BeamSearchOutput, expected: Found, prompt: list[int], params: BeamSearchParams) -> None:
    assert [s.tokens for s in output.sequences] == [tokens for tokens, _ in expected]
    for sequence, (tokens, cum) in zip(output.sequences, expected, strict=True):
        assert sequence.cum_logprob == pytest.approx(cum)
        assert sequence.score == pytest.approx(score(tokens, cum, params))
        assert len(sequence.logprobs) == len(tokens) - len(prompt)
        ended = tokens[-1] == EOS and not params.ignore_eos
        assert sequence.finish_reason == ("stop" if ended else "length")
        assert sequence.stop_reason == (EOS if ended else None)
        chosen = [
            position[t].logprob for position, t in zip(sequence.logprobs, tokens[len(prompt) :], strict=True)
        ]
        assert sum(chosen) == pytest.approx(cum)


@settings(max_examples=150)
@given(
    prompts=st.lists(st.lists(st.integers(2, 7), min_size=1, max_size=6), min_size=1, max_size=4),
    width=st.integers(1, 5),
    max_tokens=st.integers(1, 7),
    vocab_size=st.integers(8, 12),
    length_penalty=st.sampled_from([1.0, 0.0, 0.5, 2.0, 5.0, -1.0]),
    ignore_eos=st.booleans(),
    concurrency_limit=st.sampled_from([None, 1, 2]),
    num_pages=st.sampled_from([10, 64]),
)
def test_against_the_definition(
    prompts: list[list[int]],
    width: int,
    max_tokens: int,
    vocab_size: int,
    length_penalty: float,
    ignore_eos: bool,
    concurrency_limit: int | None,
    num_pages: int,
) -> None:
    params = BeamSearchParams(width, max_tokens, ignore_eos=ignore_eos, length_penalty=length_penalty)
    llm, _ = make(vocab_size=vocab_size, num_pages=num_pages)
    outputs = llm.beam_search(prompts, params, concurrency_limit=concurrency_limit)
    assert len(outputs) == len(prompts)
    for prompt, output in zip(prompts, outputs, strict=True):
        check(output, oracle(prompt, params, vocab_size), prompt, params)


@pytest.mark.parametrize("ignore_eos", [True, False])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_a_wide_beam_finds_the_best_of_everything(ignore_eos: bool, length_penalty: float) -> None:
    params = BeamSearchParams(64, 3, ignore_eos=ignore_eos, length_penalty=length_penalty)
    llm, _ = make(vocab_size=4)
    (output,) = llm.beam_search([2, 3], params)
    check(output, exhaustive([2, 3], params, 4), [2, 3], params)


def test_a_beam_of_one_is_greedy() -> None:
    llm, _ = make()
    greedy = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    for prompt in ([2], [3, 4, 5], [9, 8]):
        (output,) = llm.beam_search(prompt, BeamSearchParams(1, 9, ignore_eos=True))
        expected = llm.generate(prompt, greedy, use_tqdm=False)
        assert output.sequences[0].tokens == [*prompt, *expected[0].outputs[0].token_ids]


def test_sequences_end_where_the_context_does() -> None:
    llm, engine = make(max_model_len=8)
    params = BeamSearchParams(2, 50, ignore_eos=True)
    short, long = llm.beam_search([[2, 3], [4] * 7], params)
    assert {len(s.tokens) for s in short.sequences} == {8}
    assert {len(s.tokens) for s in long.sequences} == {8}
    check(short, oracle([2, 3], params, 12, max_model_len=8), [2, 3], params)
    with pytest.raises(InvalidRequestError, match="has 8 tokens"):
        llm.beam_search([[2] * 8], params)
    assert not engine.has_unfinished_requests()


def test_a_search_stops_when_nothing_can_change() -> None:
    llm, engine = make(vocab_size=2)
    # With two tokens, one of which ends, the best sequence is soon known.
    llm.beam_search([[0]], BeamSearchParams(1, 60, length_penalty=0.0))
    assert engine.num_steps < 60


def test_beams_share_pages() -> None:
    llm, engine = make()
    prompt = [2, 3, 4, 5] * 4 + [6]
    llm.beam_search(prompt, BeamSearchParams(3, 6, ignore_eos=True))
    # Each beam computes the page that it is in, and not the prompt again.
    hits = engine.scheduler.prefix_cache_hits
    queries = engine.scheduler.prefix_cache_queries
    assert hits > queries / 2


def test_salts_are_kept() -> None:
    llm, engine = make()
    salts = set()
    submit = engine.submit

    def watched(requests: Any, prompt: str | None) -> None:
        salts.update(request.cache_salt for request in requests)
        submit(requests, prompt)

    engine.submit = watched  # type: ignore[method-assign]
    llm.beam_search({"prompt_token_ids": [2, 3], "cache_salt": "s"}, BeamSearchParams(2, 3))
    assert salts == {"s"}


def test_text_is_of_the_whole_sequence() -> None:
    tokenizer = get_tokenizer(demo_model_path())
    llm, _ = make(tokenizer=tokenizer, vocab_size=1536, eos_token_ids=())
    (output,) = llm.beam_search("The", BeamSearchParams(4, 3, skip_special_tokens=False))
    for sequence in output.sequences:
        assert sequence.text == tokenizer.decode(sequence.tokens)
        assert sequence.text.startswith("The")
    assert make()[0].beam_search([2], BeamSearchParams(1, 1))[0].sequences[0].text is None


@pytest.mark.parametrize("include", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_the_token_that_ended_it_is_shown_only_when_asked_for(include: bool, skip: bool) -> None:
    tokenizer = get_tokenizer(demo_model_path())
    tokens = [*tokenizer.encode("yes"), tokenizer.eos_token_id]
    ended = BeamSearchSequence(list(tokens), finish_reason="stop")
    going_on = BeamSearchSequence(list(tokens), finish_reason="length")
    params = BeamSearchParams(1, 1, include_stop_str_in_output=include, skip_special_tokens=skip)
    fill_in_text([BeamSearchOutput([ended, going_on])], params, tokenizer)
    assert ended.text == ("yes<|im_end|>" if include and not skip else "yes")
    assert going_on.text == ("yes" if skip else "yes<|im_end|>")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"max_logprobs": 20}, "beam_width=6 needs 12 log-probabilities"),
        ({"logprobs_mode": "raw_logits"}, "sums log-probabilities"),
    ],
)
def test_what_the_engine_cannot_do_is_refused(arguments: dict[str, Any], match: str) -> None:
    llm, engine = make(
        **{"vocab_size": 30, **arguments, **({"max_logprobs": 10} if "max_logprobs" in arguments else {})}
    )
    with pytest.raises(InvalidRequestError, match=match):
        llm.beam_search([[2]], BeamSearchParams(6, 4))
    assert engine.submitted == []


def test_bad_arguments_are_refused() -> None:
    llm, engine = make()
    params = BeamSearchParams(2, 2)
    for limit in (0, -1, 1.5, True):
        with pytest.raises(InvalidRequestError, match="concurrency_limit"):
            llm.beam_search([[2]], params, concurrency_limit=limit)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequestError, match="must be a BeamSearchParams"):
        llm.beam_search([[2]], SamplingParams())  # type: ignore[arg-type]
    params.beam_width = 0
    with pytest.raises(InvalidRequestError, match="beam_width"):
        llm.beam_search([[2]], params)
    with pytest.raises(InvalidRequestError, match="vocabulary"):
        llm.beam_search([[2], [99]], BeamSearchParams(2, 2))
    assert engine.submitted == []
    assert llm.beam_search([], BeamSearchParams(2, 2)) == []


def test_progress() -> None:
    llm, _ = make()
    written = io.StringIO()
    bar = partial(tqdm, file=written, mininterval=0)
    llm.beam_search([[2], [3]], BeamSearchParams(2, 5, ignore_eos=True), use_tqdm=bar)
    assert "Beam search: 100%" in written.getvalue()
    assert "5/5" in written.getvalue()

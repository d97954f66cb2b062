"""What users get for the tokens of the engine, for every kind of output."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from jaxllm.errors import InvalidRequestError
from jaxllm.output_processor import OutputProcessor
from jaxllm.outputs import Logprob, RequestOutput
from jaxllm.request import Request, RequestStatus
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.scheduling.plan import RequestUpdate, TokenLogprobs

KINDS = list(RequestOutputKind)
DELTA, CUMULATIVE, FINAL = RequestOutputKind.DELTA, RequestOutputKind.CUMULATIVE, RequestOutputKind.FINAL_ONLY


@cache
def tokenizer() -> Any:
    """A token per byte, ids 0 to 255 in the order of the bytes, then `</s>` 256 and `stop` 257."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    rest = iter(range(256, 512))
    vocabulary = {chr(byte if byte in printable else next(rest)): byte for byte in range(256)}
    assert sorted(vocabulary) == alphabet
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    backend.add_tokens(["stop"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


EOS, STOP = 256, 257


class Engine:
    """Feeds tokens to requests in the way that a scheduler does."""

    def __init__(
        self, params: SamplingParams, *, n: int = 1, prompt: bytes = b"Q:", with_tokenizer: bool = True
    ):
        self.processor = OutputProcessor(tokenizer() if with_tokenizer else None)
        self.requests = [
            Request(f"user-{i}" if n > 1 else "user", list(prompt), params, arrival_time=1.0)
            for i in range(n)
        ]
        self.processor.add(self.requests, prompt.decode(), params, "user")
        self.outputs: list[RequestOutput] = []
        self.stopped: list[tuple[Request, str]] = []
        self.now = 1.0

    def step(self, *updates: RequestUpdate) -> list[RequestOutput]:
        self.now += 1
        outputs, stopped = self.processor.process(updates, self.now)
        self.outputs += outputs
        self.stopped += stopped
        return outputs

    def update(
        self,
        tokens: Sequence[int],
        index: int = 0,
        status: RequestStatus = RequestStatus.RUNNING,
        stop_reason: int | None = None,
        **fields: Any,
    ) -> RequestUpdate:
        request = self.requests[index]
        request.token_ids += tokens
        request.status, request.stop_reason = status, stop_reason
        return RequestUpdate(request, list(tokens), **fields)

    def feed(
        self, chunks: Sequence[Sequence[int]], last: RequestStatus = RequestStatus.FINISHED_LENGTH
    ) -> None:
        for i, chunk in enumerate(chunks):
            if not self.processor.has("user"):
                break
            self.step(self.update(chunk, status=last if i == len(chunks) - 1 else RequestStatus.RUNNING))

    def final(self) -> tuple[str, list[int]]:
        """Text and token ids that the outputs amount to, by their kind."""
        kind = self.requests[0].sampling_params.output_kind
        if kind is not DELTA:
            last = self.outputs[-1].outputs[0]
            return last.text, last.token_ids
        completions = [output.outputs[0] for output in self.outputs]
        return "".join(c.text for c in completions), [t for c in completions for t in c.token_ids]


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 1000, **fields})


chunked = st.lists(st.lists(st.integers(0, 257), min_size=1, max_size=4), min_size=1, max_size=12)


@given(chunks=chunked, kind=st.sampled_from(KINDS), skip=st.booleans())
def test_text_and_tokens_are_the_same_for_every_kind(
    chunks: list[list[int]], kind: RequestOutputKind, skip: bool
) -> None:
    engine = Engine(params(output_kind=kind, skip_special_tokens=skip))
    engine.feed(chunks)
    ids = [i for chunk in chunks for i in chunk]
    assert engine.final() == (tokenizer().decode(ids, skip_special_tokens=skip), ids)
    last = engine.outputs[-1]
    assert (last.finished, last.outputs[0].finish_reason) == (True, "length")
    assert [output.finished for output in engine.outputs[:-1]] == [False] * (len(engine.outputs) - 1)
    assert len(engine.outputs) == (1 if kind is FINAL else len(chunks))
    assert not engine.processor.has("user")
    assert engine.processor.unfinished_request_ids == []


@given(
    text=st.text(alphabet="abc", min_size=1, max_size=30),
    stops=st.lists(st.text(alphabet="ab", min_size=1, max_size=3), min_size=1, max_size=3),
    sizes=st.lists(st.integers(1, 4), min_size=30, max_size=30),
    kind=st.sampled_from(KINDS),
    include=st.booleans(),
    min_tokens=st.integers(0, 10),
)
def test_stop_strings(
    text: str, stops: list[str], sizes: list[int], kind: RequestOutputKind, include: bool, min_tokens: int
) -> None:
    """One character a token, in steps of several: neither steps nor kinds change the result."""
    expected, reason, count = text, None, len(text)
    for end in range(min_tokens + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            reason, count = max(ending, key=len), end
            expected = text[: end if include else end - len(reason)]
            break
    options: dict[str, Any] = {"include_stop_str_in_output": include, "min_tokens": min_tokens}
    engine = Engine(params(stop=stops, output_kind=kind, **options))
    chunks: list[list[int]] = []
    rest = list(text.encode())
    for size in sizes:
        chunks, rest = [*chunks, rest[:size]] if rest else chunks, rest[size:]
    engine.feed(chunks)
    assert engine.final() == (expected, list(text.encode())[:count])
    last = engine.outputs[-1].outputs[0]
    assert (last.finish_reason, last.stop_reason) == (("stop", reason) if reason else ("length", None))
    # The engine is told only of requests that the scheduler still runs.
    scheduler_was_done = engine.requests[0].status.is_finished
    assert engine.stopped == ([(engine.requests[0], reason)] if reason and not scheduler_was_done else [])


def test_steps_in_flight_after_a_stop_string_are_ignored() -> None:
    for kind in KINDS:
        engine = Engine(params(stop="b", output_kind=kind))
        engine.step(engine.update(b"ab"))
        outputs = list(engine.outputs)
        assert outputs[-1].finished
        assert engine.stopped == [(engine.requests[0], "b")]
        assert engine.step(engine.update(b"c")) == []
        assert engine.final() == ("a", list(b"ab")), "and nothing is added to what was given out"


def test_text_that_may_begin_a_stop_string_is_held_back() -> None:
    engine = Engine(params(stop=["END"], output_kind=DELTA))
    engine.feed([b"a", b"E", b"N", b"x", b"E"])
    assert [output.outputs[0].text for output in engine.outputs] == ["a", "", "", "ENx", "E"]
    assert [output.outputs[0].token_ids for output in engine.outputs] == [[c] for c in b"aENxE"]


def test_the_token_that_ends_a_sequence_is_not_part_of_the_text() -> None:
    stopped = RequestStatus.FINISHED_STOPPED
    for include, expected in ((False, "a"), (True, "astop")):
        engine = Engine(params(stop_token_ids=[STOP], include_stop_str_in_output=include))
        engine.step(engine.update([97, STOP], status=stopped, stop_reason=STOP))
        completion = engine.outputs[-1].outputs[0]
        assert (completion.text, completion.token_ids) == (expected, [97, STOP])
        assert (completion.finish_reason, completion.stop_reason) == ("stop", STOP)
    engine = Engine(params(skip_special_tokens=False))
    engine.step(engine.update([97, EOS], status=stopped))
    assert engine.outputs[-1].outputs[0].text == "a"
    assert engine.outputs[-1].outputs[0].stop_reason is None


def test_an_incomplete_character_at_the_end_is_shown_as_such() -> None:
    half = "é".encode()[:1]
    engine = Engine(params(output_kind=DELTA))
    engine.feed([b"a", half])
    assert [output.outputs[0].text for output in engine.outputs] == ["a", "\ufffd"]
    engine = Engine(params(output_kind=DELTA, stop=["\ufffd"]))
    engine.feed([b"a", half])
    assert engine.outputs[-1].outputs[0].stop_reason == "\ufffd"


@pytest.mark.parametrize("fields", [{"detokenize": False}, {"with_tokenizer": False}])
def test_token_ids_only(fields: dict[str, bool]) -> None:
    engine = Engine(
        params(logprobs=1, detokenize=fields.get("detokenize", True)),
        with_tokenizer=fields.get("with_tokenizer", True),
    )
    engine.step(engine.update(b"a", status=RequestStatus.FINISHED_LENGTH, logprobs=[entry(97, [97])]))
    completion = engine.outputs[-1].outputs[0]
    assert (completion.text, completion.token_ids) == ("", [97])
    assert completion.logprobs == [{97: Logprob(-1.0, 1, None)}]


def entry(token: int, top: Sequence[int], logprob: float = -1.0) -> TokenLogprobs:
    top_logprobs = np.array([logprob - i for i in range(len(top))], np.float32)
    rank = list(top).index(token) + 1 if token in top else len(top) + 5
    return TokenLogprobs(
        float(logprob) if token not in top else float(top_logprobs[rank - 1]),
        rank,
        np.array(top, np.int32),
        top_logprobs,
    )


class TestLogprobs:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_position_once(self, kind: RequestOutputKind) -> None:
        engine = Engine(params(logprobs=2, output_kind=kind))
        engine.step(engine.update(b"a", logprobs=[entry(97, [97, 98, 99])]))
        engine.step(engine.update(b"bc", logprobs=[entry(98, [97, 98, 99]), entry(99, [97, 98], -3.0)]))
        engine.step(
            engine.update(b"d", status=RequestStatus.FINISHED_LENGTH, logprobs=[entry(100, [100, 97])])
        )
        expected = [
            {97: Logprob(-1.0, 1, "a"), 98: Logprob(-2.0, 2, "b")},
            {98: Logprob(-2.0, 2, "b"), 97: Logprob(-1.0, 1, "a")},
            {99: Logprob(-3.0, 7, "c"), 97: Logprob(-3.0, 1, "a"), 98: Logprob(-4.0, 2, "b")},
            {100: Logprob(-1.0, 1, "d"), 97: Logprob(-2.0, 2, "a")},
        ]
        completions = [output.outputs[0] for output in engine.outputs]
        if kind is DELTA:
            assert [c.logprobs for c in completions] == [expected[:1], expected[1:3], expected[3:]]
        else:
            assert completions[-1].logprobs == expected
        assert completions[-1].cumulative_logprob == -1.0 - 2.0 - 3.0 - 1.0
        sampled = [next(iter(position)) for position in expected]
        assert sampled == [97, 98, 99, 100], "the sampled token comes first"
        for position in completions[-1].logprobs or []:
            assert all(type(i) is int and type(p.logprob) is float for i, p in position.items())

    def test_none_unless_asked_for(self) -> None:
        engine = Engine(params())
        engine.feed([b"a"])
        completion = engine.outputs[-1].outputs[0]
        assert completion.logprobs is None
        assert completion.cumulative_logprob is None

    def test_only_the_sampled_token_or_all(self) -> None:
        for count, expected in ((0, [97]), (-1, [97, 98, 99])):
            engine = Engine(params(logprobs=count))
            update = engine.update(
                b"a", status=RequestStatus.FINISHED_LENGTH, logprobs=[entry(97, [97, 98, 99])]
            )
            engine.step(update)
            logprobs = engine.outputs[-1].outputs[0].logprobs
            assert logprobs is not None
            assert list(logprobs[0]) == expected

    def test_a_character_of_several_tokens_is_shown_with_its_last(self) -> None:
        tokens = list("é".encode())
        engine = Engine(params(logprobs=0))
        for i, token in enumerate(tokens):
            status = RequestStatus.FINISHED_LENGTH if i else RequestStatus.RUNNING
            engine.step(engine.update([token], status=status, logprobs=[entry(token, [])]))
        logprobs = engine.outputs[-1].outputs[0].logprobs
        assert logprobs is not None
        assert [p[t].decoded_token for p, t in zip(logprobs, tokens, strict=True)] == ["", "é"]

    def test_tokens_behind_a_stop_string_have_none(self) -> None:
        engine = Engine(params(logprobs=0, stop="b"))
        engine.step(engine.update(b"abc", logprobs=[entry(t, []) for t in b"abc"]))
        completion = engine.outputs[-1].outputs[0]
        assert completion.logprobs is not None
        assert (len(completion.logprobs), completion.token_ids) == (2, [97, 98])
        assert completion.cumulative_logprob == -2.0

    @pytest.mark.parametrize("kind", KINDS)
    def test_prompt(self, kind: RequestOutputKind) -> None:
        engine = Engine(params(prompt_logprobs=1, output_kind=kind), prompt=b"wxyz")
        # Two chunks of the prompt, then tokens.
        assert engine.step(engine.update([], prompt_logprobs=[entry(ord("x"), [97])])) == []
        rest = [entry(ord("y"), [ord("y")]), entry(ord("z"), [98], -7.0)]
        engine.step(engine.update(b"a", prompt_logprobs=rest))
        engine.feed([b"b"])
        expected = [
            None,
            {ord("x"): Logprob(-1.0, 6, "x"), 97: Logprob(-1.0, 1, "a")},
            {ord("y"): Logprob(-1.0, 1, "y")},
            {ord("z"): Logprob(-7.0, 6, "z"), 98: Logprob(-7.0, 1, "b")},
        ]
        seen = [output.prompt_logprobs for output in engine.outputs]
        assert seen == {DELTA: [expected, None], CUMULATIVE: [expected, expected], FINAL: [expected]}[kind]


class TestSeveralSequences:
    def test_final_only_waits_for_all(self) -> None:
        engine = Engine(params(n=2, output_kind=FINAL), n=2)
        assert (
            engine.step(engine.update(b"a", 1, RequestStatus.FINISHED_LENGTH), engine.update(b"b", 0)) == []
        )
        assert engine.processor.requests("user") == [engine.requests[0]]
        (output,) = engine.step(engine.update(b"c", 0, RequestStatus.FINISHED_STOPPED))
        assert output.finished
        assert output.request_id == "user"
        assert [(c.index, c.text, c.finish_reason) for c in output.outputs] == [
            (0, "b", "stop"),
            (1, "a", "length"),
        ]
        assert not engine.processor.has("user")

    def test_delta_reports_those_that_advanced(self) -> None:
        engine = Engine(params(n=3, output_kind=DELTA), n=3)
        (first,) = engine.step(engine.update(b"a", 2), engine.update(b"b", 0))
        assert [(c.index, c.text) for c in first.outputs] == [(0, "b"), (2, "a")]
        (second,) = engine.step(engine.update(b"c", 1, RequestStatus.FINISHED_LENGTH))
        assert [(c.index, c.text, c.finish_reason) for c in second.outputs] == [(1, "c", "length")]
        assert not second.finished
        ended = RequestStatus.FINISHED_LENGTH
        (third,) = engine.step(engine.update(b"d", 0, ended), engine.update(b"e", 2, ended))
        assert third.finished

    def test_cumulative_reports_all(self) -> None:
        engine = Engine(params(n=2, output_kind=CUMULATIVE), n=2)
        engine.step(engine.update(b"a", 0), engine.update(b"x", 1))
        (output,) = engine.step(engine.update(b"b", 0))
        assert [c.text for c in output.outputs] == ["ab", "x"]

    def test_a_stop_string_ends_its_own_sequence_only(self) -> None:
        engine = Engine(params(n=2, stop="a", output_kind=CUMULATIVE), n=2)
        engine.step(engine.update(b"a", 0), engine.update(b"x", 1))
        assert engine.stopped == [(engine.requests[0], "a")]
        assert engine.processor.has("user")
        (output,) = engine.step(engine.update(b"!", 0), engine.update(b"y", 1))
        assert [(c.text, c.finish_reason) for c in output.outputs] == [("", "stop"), ("xy", None)]

    def test_delta_gives_prompt_logprobs_when_they_are_complete(self) -> None:
        engine = Engine(params(n=2, prompt_logprobs=0, output_kind=DELTA), n=2)
        (first,) = engine.step(engine.update(b"a", 1))
        assert first.prompt_logprobs is None
        (second,) = engine.step(engine.update(b"a", 0, prompt_logprobs=[entry(ord(":"), [])]))
        assert second.prompt_logprobs == [None, {ord(":"): Logprob(-1.0, 5, ":")}]


class TestEnds:
    @pytest.mark.parametrize("kind", KINDS)
    def test_abort(self, kind: RequestOutputKind) -> None:
        engine = Engine(params(stop="END", n=2, output_kind=kind), n=2)
        engine.step(engine.update(b"aEN", 0), engine.update(b"xEND", 1))
        (output,) = engine.processor.abort(["user", "unknown"])
        assert output.finished
        completions = {c.index: c for c in output.outputs}
        assert completions[0].finish_reason == "abort"
        assert completions[0].text == ("EN" if kind is DELTA else "aEN")
        if kind is not DELTA:
            assert (completions[1].finish_reason, completions[1].text) == ("stop", "x")
        assert output.metrics is not None
        assert output.metrics.finished_time is not None
        assert engine.processor.abort(["user"]) == []
        assert engine.step(engine.update(b"b", 0)) == []

    def test_abort_of_the_scheduler(self) -> None:
        engine = Engine(params(output_kind=DELTA))
        (output,) = engine.step(engine.update([], status=RequestStatus.FINISHED_ABORTED))
        assert (output.finished, output.outputs[0].finish_reason) == (True, "abort")

    def test_fail(self) -> None:
        engine = Engine(params(n=2, output_kind=FINAL), n=2)
        engine.step(engine.update(b"a", 0), engine.update(b"b", 1))
        assert engine.processor.fail([engine.requests[1]], "out of memory") == []
        (output,) = engine.step(engine.update(b"c", 0, RequestStatus.FINISHED_LENGTH))
        assert [(c.text, c.finish_reason) for c in output.outputs] == [("ac", "length"), ("b", "error")]
        assert (output.finished, output.error) == (True, "out of memory")
        assert engine.processor.fail(engine.requests, "again") == []

    def test_an_id_is_free_again_after_the_end(self) -> None:
        engine = Engine(params())
        with pytest.raises(InvalidRequestError, match="'user' is in use") as caught:
            engine.processor.add(engine.requests, None, params(), "user")
        assert caught.value.param == "request_id"
        engine.feed([b"a"])
        engine.processor.add([Request("user", [1], params())], None, params(), "user")
        assert engine.processor.unfinished_request_ids == ["user"]

    def test_stop_strings_need_a_tokenizer(self) -> None:
        with pytest.raises(InvalidRequestError, match="skip_tokenizer_init"):
            Engine(params(stop="a"), with_tokenizer=False)


def test_metrics_and_what_was_cached() -> None:
    engine = Engine(params(output_kind=CUMULATIVE))
    engine.requests[0].num_cached_tokens = 1
    engine.requests[0].first_scheduled_time = 1.5
    engine.step(engine.update(b"a"))
    engine.requests[0].num_preemptions = 2
    engine.feed([b"b"])
    output = engine.outputs[-1]
    assert output.num_cached_tokens == 1
    assert (output.prompt, output.prompt_token_ids) == ("Q:", list(b"Q:"))
    metrics = output.metrics
    assert metrics is not None
    assert (metrics.arrival_time, metrics.first_scheduled_time, metrics.first_token_time) == (1.0, 1.5, 2.0)
    assert (metrics.last_token_time, metrics.finished_time, metrics.num_preemptions) == (3.0, 3.0, 2)

"""Beam search over ordinary requests: each beam asks for one token and its most probable alternatives.

Beams share the pages of what they have in common through the prefix cache. Candidates and scores are
vLLM's, which follows Hugging Face: at each step the `2 * beam_width` most probable tokens of every
beam compete, a beam that meets the end of sequence is set aside, and sequences are ranked by their
summed log-probability over their length (prompt included) to the power of `length_penalty`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, TypeVar

from jaxllm.config import EngineConfig
from jaxllm.errors import InvalidRequestError
from jaxllm.outputs import Logprob, RequestOutput
from jaxllm.sampling_params import BeamSearchParams, SamplingParams

Candidates = dict[int, Logprob]
"""What may follow a beam: token ids with their log-probabilities, most probable first."""


@dataclass(slots=True)
class BeamSearchSequence:
    """One sequence that a beam search found.

    Attributes:
        tokens: of prompt and output; the end-of-sequence token that ended it stands last.
        logprobs: at each output position the candidates that competed there.
        cum_logprob: sum of the log-probabilities of the output tokens.
        score: what the sequences are ranked by.
        text: of all `tokens`; None where the engine runs without a tokenizer.
        finish_reason: "stop" where the end of sequence ended it, "length" otherwise.
        stop_reason: the end-of-sequence id that ended it.
    """

    tokens: list[int]
    logprobs: list[Candidates] = field(default_factory=list)
    cum_logprob: float = 0.0
    score: float = 0.0
    text: str | None = None
    finish_reason: str | None = None
    stop_reason: int | None = None


@dataclass(slots=True)
class BeamSearchOutput:
    """The sequences found for one prompt, best first; at most `beam_width` of them."""

    sequences: list[BeamSearchSequence]


@dataclass(slots=True)
class _Continuation:
    """A beam and one token that may follow it, not yet joined: most of them come to nothing."""

    score: float
    cum_logprob: float
    beam: BeamSearchSequence
    token_id: int
    candidates: Candidates

    def join(self) -> BeamSearchSequence:
        tokens = [*self.beam.tokens, self.token_id]
        return BeamSearchSequence(
            tokens, [*self.beam.logprobs, self.candidates], self.cum_logprob, self.score
        )


_Scored = TypeVar("_Scored", _Continuation, BeamSearchSequence)


class _Search:
    """The search for one prompt.

    Attributes:
        beams: sequences that go on, best first, all of the same length.
        completed: the best of the sequences that met the end of sequence, best first.
    """

    def __init__(
        self, prompt: list[int], params: BeamSearchParams, eos_token_ids: frozenset[int], max_model_len: int
    ) -> None:
        self._params = params
        self._eos_token_ids = eos_token_ids
        self._max_length = min(len(prompt) + params.max_tokens, max_model_len)
        self.beams = [BeamSearchSequence(list(prompt))]
        self.completed: list[BeamSearchSequence] = []

    @property
    def is_open(self) -> bool:
        if not self.beams or len(self.beams[0].tokens) >= self._max_length:
            return False
        return not self._is_decided()

    def extend(self, candidates: list[Candidates]) -> None:
        """Replace the beams by the best of their continuations, and set those aside that have ended."""
        going_on: list[_Continuation] = []
        ended: list[_Continuation] = []
        length = len(self.beams[0].tokens) + 1
        for beam, following in zip(self.beams, candidates, strict=True):
            for token_id, logprob in following.items():
                is_eos = token_id in self._eos_token_ids
                cum_logprob = beam.cum_logprob + logprob.logprob
                score = self._score(cum_logprob, length - is_eos)
                continuation = _Continuation(score, cum_logprob, beam, token_id, following)
                (ended if is_eos and not self._params.ignore_eos else going_on).append(continuation)
        self.beams = [continuation.join() for continuation in self._best(going_on)]
        for continuation in self._best(ended):
            sequence = continuation.join()
            sequence.finish_reason, sequence.stop_reason = "stop", continuation.token_id
            self.completed.append(sequence)
        self.completed = self._best(self.completed)

    def result(self) -> BeamSearchOutput:
        for beam in self.beams:
            beam.finish_reason = "length"
        return BeamSearchOutput(self._best([*self.completed, *self.beams]))

    def _is_decided(self) -> bool:
        """Whether no beam can come to score better than the `beam_width` sequences that are complete."""
        if len(self.completed) < self._params.beam_width:
            return False
        # A summed log-probability only falls, and its score is monotonic in the length.
        cum_logprob = max(beam.cum_logprob for beam in self.beams)
        lengths = (len(self.beams[0].tokens) - 1, self._max_length)
        return self.completed[-1].score >= max(self._score(cum_logprob, length) for length in lengths)

    def _score(self, cum_logprob: float, length: int) -> float:
        return float(cum_logprob / max(length, 1) ** self._params.length_penalty)

    def _best(self, items: list[_Scored]) -> list[_Scored]:
        # A stable sort: among equals, the better beam's more probable token stays ahead.
        return sorted(items, key=attrgetter("score"), reverse=True)[: self._params.beam_width]


def beam_search(
    prompts: Sequence[list[int]],
    params: BeamSearchParams,
    *,
    eos_token_ids: frozenset[int],
    max_model_len: int,
    next_tokens: Callable[[list[tuple[int, list[int]]]], list[Candidates]],
    on_step: Callable[[], object] = lambda: None,
) -> list[BeamSearchOutput]:
    """Search for the best continuations of each prompt.

    Args:
        prompts: token ids of each prompt.
        eos_token_ids: ids that end a sequence, unless `params.ignore_eos`.
        max_model_len: a sequence ends when it has this many tokens.
        next_tokens: gives the candidates of every (index of its prompt, tokens) of a batch of beams, in
            order; up to `2 * beam_width` for each.
        on_step: called after each token.

    Returns:
        One output for each prompt, in order, with `text` not filled in.
    """
    searches = [_Search(prompt, params, eos_token_ids, max_model_len) for prompt in prompts]
    while open_searches := [(i, search) for i, search in enumerate(searches) if search.is_open]:
        beams = [(i, beam.tokens) for i, search in open_searches for beam in search.beams]
        candidates = iter(next_tokens(beams))
        for _, search in open_searches:
            search.extend([next(candidates) for _ in search.beams])
        on_step()
    return [search.result() for search in searches]


def one_token_params(params: BeamSearchParams, config: EngineConfig, vocab_size: int) -> SamplingParams:
    """What the request for a beam's next token asks for.

    Raises:
        InvalidRequestError: the engine does not return as many log-probabilities as the beams need.
    """
    if not isinstance(params, BeamSearchParams):
        raise InvalidRequestError(
            f"params must be a BeamSearchParams; got {type(params).__name__}.", param="params"
        )
    params.verify()
    needed = min(2 * params.beam_width, vocab_size)
    if config.max_logprobs != -1 and needed > config.max_logprobs:
        raise InvalidRequestError(
            f"beam_width={params.beam_width} needs {needed} log-probabilities a token, and this engine "
            f"returns {config.max_logprobs}; narrow the beam, or start it with max_logprobs={needed}.",
            param="beam_width",
        )
    if config.logprobs_mode.endswith("logits"):
        raise InvalidRequestError(
            f"beam search sums log-probabilities, and logprobs_mode={config.logprobs_mode!r} returns logits; "
            'start the engine with logprobs_mode="raw_logprobs".'
        )
    return SamplingParams(max_tokens=1, logprobs=needed, temperature=params.temperature, detokenize=False)


def candidates_of(output: RequestOutput, params: SamplingParams) -> Candidates:
    """What may follow the beam whose next token was asked for, without a sampled token further down."""
    if output.error is not None or not output.outputs[0].logprobs:
        raise RuntimeError(
            f"A step of the beam search failed: {output.error or output.outputs[0].finish_reason}"
        )
    ranked = sorted(output.outputs[0].logprobs[0].items(), key=lambda item: item[1].logprob, reverse=True)
    return dict(ranked[: params.logprobs])


def fill_in_text(outputs: Sequence[BeamSearchOutput], params: BeamSearchParams, tokenizer: Any) -> None:
    """Decode the sequences found."""
    if tokenizer is None:
        return
    for sequence in (sequence for output in outputs for sequence in output.sequences):
        drop_last = sequence.finish_reason == "stop" and not params.include_stop_str_in_output
        sequence.text = tokenizer.decode(
            sequence.tokens[:-1] if drop_last else sequence.tokens,
            skip_special_tokens=params.skip_special_tokens,
        )

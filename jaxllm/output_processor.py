"""From the engine's tokens to what a user gets: text, stop strings, logprobs, merged completions."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

from jaxllm.errors import InvalidRequestError
from jaxllm.outputs import (
    CompletionOutput,
    Logprob,
    PromptLogprobs,
    RequestMetrics,
    RequestOutput,
    SampleLogprobs,
)
from jaxllm.request import Request
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.scheduling.plan import RequestUpdate, TokenLogprobs
from jaxllm.text.detokenizer import Detokenizer, DetokenizerFactory
from jaxllm.text.logprobs import LogprobFormatter
from jaxllm.text.stop_strings import StopStringMatcher


class OutputProcessor:
    """Keeps, for every unfinished request, its text so far, and reports what its user asked to see.

    A user's request is known here by its `request_id`; the n sequences that complete it are engine
    `Request`s, known by theirs. Runs on one thread, beside the device.

    Args:
        tokenizer: of Hugging Face; None where users work with token ids only.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._detokenizers = None if tokenizer is None else DetokenizerFactory(tokenizer)
        self._groups: dict[str, _Group] = {}
        self._sequences: dict[str, _Sequence] = {}

    def add(
        self,
        requests: Sequence[Request],
        prompt: str | None,
        sampling_params: SamplingParams,
        request_id: str,
    ) -> None:
        """Registers the n sequences of a user's request, in the order of their index.

        Raises:
            InvalidRequestError: the id is in use, or stop strings are asked for without a tokenizer.
        """
        if request_id in self._groups:
            raise InvalidRequestError(
                f"request_id {request_id!r} is in use by an unfinished request; every request needs its own.",
                param="request_id",
            )
        if sampling_params.stop and self._detokenizers is None:
            raise InvalidRequestError(
                f"stop={sampling_params.stop!r} needs a tokenizer, and this engine runs without one "
                "(skip_tokenizer_init=True). Use stop_token_ids.",
                param="stop",
            )
        group = _Group(request_id, prompt, requests[0], sampling_params, self._detokenizers)
        for index, request in enumerate(requests):
            sequence = _Sequence(request, index, group, sampling_params, self._detokenizers)
            group.sequences.append(sequence)
            self._sequences[request.request_id] = sequence
        self._groups[request_id] = group

    def process(
        self, updates: Sequence[RequestUpdate], now: float
    ) -> tuple[list[RequestOutput], list[tuple[Request, str]]]:
        """Takes in what one step brought.

        Args:
            updates: of the scheduler; those of requests that have ended here are ignored.
            now: time of the step, `time.monotonic()` seconds.

        Returns:
            What users get now, one output per user's request at most, and the requests that a stop
            string ended while the scheduler still runs them, each with that string.
        """
        advanced: dict[str, _Group] = {}
        stopped: list[tuple[Request, str]] = []
        for update in updates:
            request = update.request
            sequence = self._sequences.get(request.request_id)
            if sequence is None:
                continue
            group = sequence.group
            if update.prompt_logprobs and sequence.index == 0:
                group.add_prompt_logprobs(update.prompt_logprobs)
            stop = sequence.advance(update)
            if update.new_token_ids:
                group.saw_token(now)
            elif sequence.finish_reason is None:
                continue
            if sequence.finish_reason is not None:
                self._end(sequence, now)
                group.error = group.error or request.error
                if stop is not None and not request.status.is_finished:
                    stopped.append((request, stop))
            if not group.final_only or not group.num_running:
                advanced[group.request_id] = group
        return [group.output() for group in advanced.values()], stopped

    def abort(self, request_ids: Iterable[str], now: float | None = None) -> list[RequestOutput]:
        """Ends users' requests with finish reason "abort"; ids that are not here are ignored.

        Each gives one last output, with what was generated. `now` is the time, `time.monotonic()` if None.
        """
        groups = [self._groups[request_id] for request_id in request_ids if request_id in self._groups]
        return self._end_all([s for group in groups for s in group.sequences], "abort", None, now)

    def fail(
        self, requests: Sequence[Request], message: str, now: float | None = None
    ) -> list[RequestOutput]:
        """Ends sequences with finish reason "error" and the message, for users' eyes."""
        sequences = [self._sequences[r.request_id] for r in requests if r.request_id in self._sequences]
        return self._end_all(sequences, "error", message, now)

    def has(self, request_id: str) -> bool:
        """Whether a user's request of this id is unfinished."""
        return request_id in self._groups

    def requests(self, request_id: str) -> list[Request]:
        """The sequences of a user's request that have not ended; none for an unknown id."""
        group = self._groups.get(request_id)
        return [] if group is None else [s.request for s in group.sequences if s.finish_reason is None]

    @property
    def unfinished_request_ids(self) -> list[str]:
        """Ids of users' requests, oldest first."""
        return list(self._groups)

    def _end(self, sequence: _Sequence, now: float) -> None:
        del self._sequences[sequence.request.request_id]
        group = sequence.group
        group.num_running -= 1
        if not group.num_running:
            group.metrics.finished_time = now
            del self._groups[group.request_id]

    def _end_all(
        self, sequences: list[_Sequence], reason: str, message: str | None, now: float | None
    ) -> list[RequestOutput]:
        now = time.monotonic() if now is None else now
        groups: dict[str, _Group] = {}
        for sequence in sequences:
            if sequence.finish_reason is None:
                sequence.end(reason)
                self._end(sequence, now)
                sequence.group.error = message or sequence.group.error
                groups[sequence.group.request_id] = sequence.group
        return [group.output() for group in groups.values() if not group.final_only or not group.num_running]


class _Group:
    """A user's request: its sequences, and what they have in common."""

    __slots__ = (
        "_formatter",
        "_kind",
        "_prompt_logprobs",
        "error",
        "final_only",
        "metrics",
        "num_running",
        "prompt",
        "prompt_token_ids",
        "request_id",
        "sequences",
    )

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        request: Request,
        params: SamplingParams,
        detokenizers: DetokenizerFactory | None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = request.prompt_token_ids
        self.sequences: list[_Sequence] = []
        self.num_running = 0
        self.final_only = params.output_kind is RequestOutputKind.FINAL_ONLY
        self.metrics = RequestMetrics(request.arrival_time)
        self.error: str | None = None
        self._kind = params.output_kind
        self._prompt_logprobs: PromptLogprobs | None = None
        self._formatter: LogprobFormatter | None = None
        if params.prompt_logprobs is not None:
            # Nothing predicts the first token.
            first = self.prompt_token_ids[:1]
            texts = detokenizers.token_texts(first) if detokenizers and params.detokenize else None
            self._formatter = LogprobFormatter(texts, params.prompt_logprobs)
            self._prompt_logprobs = [None]

    def add_prompt_logprobs(self, new: list[TokenLogprobs]) -> None:
        """Takes in the entries of the next prompt positions."""
        if self._formatter is None or self._prompt_logprobs is None:
            return
        ids = self.prompt_token_ids
        start = len(self._prompt_logprobs)
        for token_id, entry in zip(ids[start : start + len(new)], new, strict=False):
            self._prompt_logprobs.append(_position(self._formatter, token_id, entry))

    def saw_token(self, now: float) -> None:
        metrics = self.metrics
        if metrics.first_token_time is None:
            metrics.first_token_time = now
        metrics.last_token_time = now

    def output(self) -> RequestOutput:
        """What the user gets now: all of it, or with DELTA what is new since the last output."""
        first = self.sequences[0].request
        delta = self._kind is RequestOutputKind.DELTA
        if delta:
            outputs = [s.take_new() for s in self.sequences if s.has_news]
            prompt_logprobs = self._take_prompt_logprobs()
        else:
            outputs = [s.everything() for s in self.sequences]
            prompt_logprobs = self._prompt_logprobs
        metrics = self.metrics
        metrics.first_scheduled_time = first.first_scheduled_time
        finished = not self.num_running
        if finished:
            metrics.num_preemptions = sum(s.request.num_preemptions for s in self.sequences)
        return RequestOutput(
            self.request_id,
            self.prompt,
            self.prompt_token_ids,
            prompt_logprobs,
            outputs,
            finished,
            metrics,
            None,
            first.num_cached_tokens,
            self.error,
        )

    def _take_prompt_logprobs(self) -> PromptLogprobs | None:
        """All of them, once: with the first output for which they are complete."""
        logprobs = self._prompt_logprobs
        if logprobs is None or (len(logprobs) < len(self.prompt_token_ids) and self.num_running):
            return None
        self._prompt_logprobs = None
        return logprobs


class _Sequence:
    """One completion as it grows."""

    __slots__ = (
        "_cumulative_logprob",
        "_detokenizer",
        "_formatter",
        "_include_stop",
        "_logprobs",
        "_matcher",
        "_min_tokens",
        "_num_reported",
        "_text",
        "_token_ids",
        "finish_reason",
        "group",
        "has_news",
        "index",
        "request",
        "stop_reason",
    )

    def __init__(
        self,
        request: Request,
        index: int,
        group: _Group,
        params: SamplingParams,
        detokenizers: DetokenizerFactory | None,
    ) -> None:
        self.request = request
        self.index = index
        self.group = group
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None
        self.has_news = False
        group.num_running += 1

        self._text: list[str] = []
        self._token_ids: list[int] = []
        self._num_reported = 0
        self._include_stop = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._detokenizer: Detokenizer | None = None
        self._matcher: StopStringMatcher | None = None
        if detokenizers is not None and params.detokenize:
            self._detokenizer = detokenizers.detokenizer(
                request.prompt_token_ids,
                skip_special_tokens=params.skip_special_tokens,
                spaces_between_special_tokens=params.spaces_between_special_tokens,
            )
            if params.stop:
                self._matcher = StopStringMatcher(params.stop, include_in_output=self._include_stop)
        self._cumulative_logprob: float | None = None
        self._logprobs: SampleLogprobs | None = None
        self._formatter: LogprobFormatter | None = None
        if params.logprobs is not None:
            texts = None
            if detokenizers is not None and params.detokenize:
                texts = detokenizers.token_texts(request.prompt_token_ids)
            self._formatter = LogprobFormatter(texts, params.logprobs)
            self._logprobs = []
            self._cumulative_logprob = 0.0

    def advance(self, update: RequestUpdate) -> str | None:
        """Takes in new tokens; returns the stop string that they completed, if any."""
        self.has_news = True
        request = update.request
        reason = request.status.finish_reason
        new = update.new_token_ids
        # The token that ended the sequence, EOS or one of stop_token_ids, is not part of its text; the last
        # one of a grammar is.
        silent = -1
        if reason == "stop" and not self._include_stop:
            is_sign = request.grammar is None or request.stop_reason is not None
            silent = len(new) - 1 if is_sign or new[-1] in request.eos_token_ids else -1
        for i, token_id in enumerate(new):
            self._token_ids.append(token_id)
            if self._formatter is not None and update.logprobs:
                self._add_logprobs(token_id, update.logprobs[i])
            if self._detokenizer is None or i == silent:
                continue
            stop = self._show(self._detokenizer.step(token_id))
            if stop is not None:
                self.finish_reason, self.stop_reason = "stop", stop
                return stop
        if reason is not None:
            stop = self.end(reason)
            if stop is None:
                self.stop_reason = request.stop_reason
            return stop
        return None

    def end(self, reason: str) -> str | None:
        """Finishes the sequence and shows what was held back, unless a stop string turns up in that."""
        self.has_news = True
        self.finish_reason = reason
        if self._detokenizer is not None and (tail := self._detokenizer.flush()):
            stop = self._show(tail)
            if stop is not None:
                self.finish_reason, self.stop_reason = "stop", stop
                return stop
        if self._matcher is not None:
            self._text.append(self._matcher.flush())
        return None

    def _show(self, text: str) -> str | None:
        """Adds text that tokens gave, up to a stop string, which is returned."""
        if not text:
            return None
        if self._matcher is None:
            self._text.append(text)
            return None
        shown, stop = self._matcher.push(text, search=len(self._token_ids) > self._min_tokens)
        self._text.append(shown)
        return stop

    def _add_logprobs(self, token_id: int, entry: TokenLogprobs) -> None:
        if self._formatter is None or self._logprobs is None or self._cumulative_logprob is None:
            return
        self._logprobs.append(_position(self._formatter, token_id, entry))
        self._cumulative_logprob += float(entry.logprob)

    def everything(self) -> CompletionOutput:
        """All of the completion so far."""
        if len(self._text) > 1:
            self._text = ["".join(self._text)]
        return CompletionOutput(
            self.index,
            self._text[0] if self._text else "",
            list(self._token_ids),
            self._cumulative_logprob,
            None if self._logprobs is None else list(self._logprobs),
            self.finish_reason,
            self.stop_reason,
        )

    def take_new(self) -> CompletionOutput:
        """What came since the last call."""
        self.has_news = False
        text, self._text = "".join(self._text), []
        new_ids = self._token_ids[self._num_reported :]
        self._num_reported = len(self._token_ids)
        logprobs = self._logprobs
        if logprobs is not None:
            self._logprobs = []
        return CompletionOutput(
            self.index,
            text,
            new_ids,
            self._cumulative_logprob,
            logprobs,
            self.finish_reason,
            self.stop_reason,
        )


def _position(formatter: LogprobFormatter, token_id: int, entry: TokenLogprobs) -> dict[int, Logprob]:
    return formatter.position(
        token_id, float(entry.logprob), int(entry.rank), entry.top_ids.tolist(), entry.top_logprobs.tolist()
    )

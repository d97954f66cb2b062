"""Whether the newest token of a request ends it."""

from __future__ import annotations

from jaxllm.request import Request, RequestStatus
from jaxllm.sampling_params import RepetitionDetectionParams


class StopChecker:
    """The rules that end one request, in vLLM's order and meaning.

    Args:
        request: the request; its token ids are read at each check.
        max_length: prompt and output tokens at which the request ends.
    """

    __slots__ = ("_eos", "_max_length", "_min_length", "_repetition", "_request", "_stops")

    def __init__(self, request: Request, max_length: int) -> None:
        params = request.sampling_params
        self._request = request
        self._max_length = max_length
        self._min_length = request.num_prompt_tokens + params.min_tokens
        self._eos: frozenset[int] = frozenset() if params.ignore_eos else request.eos_token_ids
        self._stops = frozenset(params.stop_token_ids or ())
        detection = params.repetition_detection
        self._repetition = (
            _RepetitionDetector(detection, request.num_prompt_tokens)
            if detection is not None and detection.max_pattern_size > 0
            else None
        )

    def check(self) -> tuple[RequestStatus, int | None] | None:
        """Status and stop reason if the last token ends the request. To be called once per token."""
        token_ids = self._request.token_ids
        length, token = len(token_ids), token_ids[-1]
        # Kept up to date from the first token on, also where it may not stop anything yet.
        repeats = self._repetition is not None and self._repetition.extend(token_ids)
        if length >= self._min_length:
            if token in self._eos:
                return RequestStatus.FINISHED_STOPPED, None
            if token in self._stops:
                return RequestStatus.FINISHED_STOPPED, token
        grammar = self._request.grammar
        if grammar is not None and grammar.is_complete:
            # Also before min_tokens: there is no token that could follow.
            return RequestStatus.FINISHED_STOPPED, None
        if length >= self._max_length:
            return RequestStatus.FINISHED_LENGTH, None
        if repeats and length >= self._min_length:
            return RequestStatus.FINISHED_REPETITION, None
        return None


class _RepetitionDetector:
    """Finds that the output ends in one pattern of tokens, standing several times in a row.

    For each pattern size p it counts for how many tokens in a row the output has equalled itself p
    tokens before; c patterns in a row are (c - 1) * p such tokens. O(max_pattern_size) per token.
    """

    __slots__ = ("_matches", "_min_count", "_start")

    def __init__(self, params: RepetitionDetectionParams, num_prompt_tokens: int) -> None:
        smallest = max(params.min_pattern_size, 1)
        self._matches = dict.fromkeys(range(smallest, params.max_pattern_size + 1), 0)
        self._min_count = params.min_count
        self._start = num_prompt_tokens

    def extend(self, token_ids: list[int]) -> bool:
        """Take the last token into account; True if the output now ends in a repetition."""
        num_outputs, token = len(token_ids) - self._start, token_ids[-1]
        found = False
        for size in self._matches:
            if num_outputs > size and token == token_ids[-1 - size]:
                self._matches[size] += 1
                found = found or self._matches[size] >= size * (self._min_count - 1)
            else:
                self._matches[size] = 0
        return found

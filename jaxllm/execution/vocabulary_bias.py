"""What a sequence's parameters add to its logits: logit_bias, and tokens it may not sample now."""

from __future__ import annotations

import numpy as np

from jaxllm.request import Request


class VocabularyBias:
    """The row that is added to a sequence's logits; -inf forbids a token.

    It depends on the parameters, and over time on whether `min_tokens` has been reached and which
    bad words the newest tokens would complete.
    """

    def __init__(self, request: Request, vocab_size: int) -> None:
        params = request.sampling_params
        self._vocab_size = vocab_size
        self._min_tokens = params.min_tokens
        self._stop_ids = sorted(request.eos_token_ids | set(params.stop_token_ids or ()))
        self._bad_words = params.bad_words_token_ids or []
        self._logit_bias = params.logit_bias or {}
        self._allowed = params.allowed_token_ids
        self._forbidden: frozenset[int] | None = None
        self.is_needed = bool(
            self._logit_bias
            or self._allowed is not None
            or self._bad_words
            or (self._min_tokens > 0 and self._stop_ids)
        )

    def row_if_changed(self, request: Request, length: int) -> np.ndarray | None:
        """float32[V] for the token sampled after `length` tokens, or None if it is the last one again."""
        forbidden = self._forbidden_now(request, length)
        if forbidden == self._forbidden:
            return None
        self._forbidden = forbidden
        row = np.zeros(self._vocab_size, np.float32)
        if self._allowed is not None:
            row[:] = -np.inf
            row[list(self._allowed)] = 0
        for token, bias in self._logit_bias.items():
            row[int(token)] += bias
        row[sorted(forbidden)] = -np.inf
        return row

    def _forbidden_now(self, request: Request, length: int) -> frozenset[int]:
        forbidden = {
            word[-1]
            for word in self._bad_words
            if _ends_with(request.token_ids, request.num_prompt_tokens, word[:-1])
        }
        if length - request.num_prompt_tokens < self._min_tokens:
            forbidden.update(self._stop_ids)
        return frozenset(forbidden)


def _ends_with(token_ids: list[int], num_prompt_tokens: int, suffix: list[int]) -> bool:
    """Whether the output ends with `suffix`; a prompt's tokens do not count."""
    count = len(suffix)
    return len(token_ids) - num_prompt_tokens >= count and token_ids[len(token_ids) - count :] == suffix

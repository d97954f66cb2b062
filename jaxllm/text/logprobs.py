"""Log-probabilities as a user reads them: one dict per position, with the text of each token."""

from __future__ import annotations

from collections.abc import Iterable

from jaxllm.outputs import Logprob
from jaxllm.text.detokenizer import TokenTexts


class LogprobFormatter:
    """Makes the dicts of one sequence, position by position.

    Args:
        texts: texts of single tokens, at the first position; None leaves `decoded_token` None.
        num_candidates: most probable tokens to show beside the token itself; -1 is all there are.
    """

    __slots__ = ("_count", "_texts")

    def __init__(self, texts: TokenTexts | None, num_candidates: int) -> None:
        self._texts = texts
        self._count = None if num_candidates < 0 else num_candidates

    def position(
        self, token_id: int, logprob: float, rank: int, top_ids: Iterable[int], top_logprobs: Iterable[float]
    ) -> dict[int, Logprob]:
        """The entry of the next position.

        Args:
            token_id: the token that stands there; it comes first in the dict.
            logprob: of that token.
            rank: of that token among the vocabulary, from 1.
            top_ids: most probable ids first.
            top_logprobs: theirs.
        """
        texts = self._texts
        entry = {token_id: Logprob(logprob, rank, texts.text(token_id) if texts else None)}
        candidates = zip(top_ids, top_logprobs, strict=True)
        for place, (candidate, candidate_logprob) in enumerate(candidates, start=1):
            if self._count is not None and place > self._count:
                break
            if candidate != token_id:
                entry[candidate] = Logprob(candidate_logprob, place, texts.text(candidate) if texts else None)
        if texts:
            texts.advance(token_id)
        return entry

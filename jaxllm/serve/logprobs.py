"""Log-probabilities in the forms of OpenAI's two APIs and of vLLM's `prompt_logprobs`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.outputs import Logprob, PromptLogprobs

# JSON has no minus infinity; OpenAI writes this for "impossible".
MIN_LOGPROB = -9999.0


def _token(token_id: int, logprob: Logprob | None, tokenizer: Any, as_ids: bool) -> str:
    if not as_ids:
        if logprob is not None and logprob.decoded_token is not None:
            return logprob.decoded_token
        if tokenizer is not None:
            return str(tokenizer.decode([token_id]))
    return f"token_id:{token_id}"


def completion_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[Mapping[int, Logprob] | None],
    *,
    tokenizer: Any,
    as_ids: bool,
    text_offset: int = 0,
) -> tuple[dict[str, Any], int]:
    """The `logprobs` object of a completion, and the text offset after its last token.

    Args:
        positions: per token its candidates, the token itself among them; None where nothing is known.
        as_ids: show tokens as "token_id:N".
        text_offset: characters of the completion's text before the first of these tokens.
    """
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    top_logprobs: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for token_id, candidates in zip(token_ids, positions, strict=True):
        own = None if candidates is None else candidates[token_id]
        token = _token(token_id, own, tokenizer, as_ids)
        tokens.append(token)
        offsets.append(text_offset)
        text_offset += len(token)
        if candidates is None or own is None:
            token_logprobs.append(None)
            top_logprobs.append(None)
            continue
        token_logprobs.append(max(own.logprob, MIN_LOGPROB))
        top: dict[str, float] = {}
        for candidate_id, candidate in candidates.items():
            # Two ids can read the same; the more probable one, or the token itself, comes first.
            top.setdefault(
                _token(candidate_id, candidate, tokenizer, as_ids), max(candidate.logprob, MIN_LOGPROB)
            )
        top_logprobs.append(top)
    logprobs = {
        "text_offset": offsets,
        "token_logprobs": token_logprobs,
        "tokens": tokens,
        "top_logprobs": top_logprobs,
    }
    return logprobs, text_offset


def chat_logprobs(
    token_ids: Sequence[int],
    positions: Sequence[Mapping[int, Logprob]],
    num_top: int,
    *,
    tokenizer: Any,
    as_ids: bool,
) -> dict[str, Any]:
    """The `logprobs` object of a chat choice.

    Args:
        num_top: how many of the most probable tokens stand in `top_logprobs`; -1 is all that are known.
    """

    def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
        token = _token(token_id, logprob, tokenizer, as_ids)
        return {
            "token": token,
            "logprob": max(logprob.logprob, MIN_LOGPROB),
            "bytes": list(token.encode("utf-8", errors="replace")),
        }

    content = []
    for token_id, candidates in zip(token_ids, positions, strict=True):
        ranked = sorted(candidates.items(), key=lambda item: -item[1].logprob)
        best = ranked if num_top == -1 else ranked[:num_top]
        top = [entry(candidate_id, candidate) for candidate_id, candidate in best]
        content.append({**entry(token_id, candidates[token_id]), "top_logprobs": top})
    return {"content": content}


def prompt_logprobs_json(prompt_logprobs: PromptLogprobs | None) -> list[dict[str, Any] | None] | None:
    """vLLM's `prompt_logprobs`: per position a dict from token id to its figures, None for the first."""
    if prompt_logprobs is None:
        return None
    return [
        None
        if position is None
        else {
            str(token_id): {
                "logprob": max(p.logprob, MIN_LOGPROB),
                "rank": p.rank,
                "decoded_token": p.decoded_token,
            }
            for token_id, p in position.items()
        }
        for position in prompt_logprobs
    ]

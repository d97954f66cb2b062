"""How well two texts fit: pairs of them as prompts of a cross-encoder, or as embeddings to compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxllm.errors import InvalidRequestError
from jaxllm.models.config import ModelConfig
from jaxllm.pooling_processor import pooler_of

Texts = str | Sequence[str]


def pair_up(
    data_1: Texts, data_2: Texts, names: tuple[str, str] = ("data_1", "data_2")
) -> tuple[list[str], list[str]]:
    """The two sides, as many texts on the first as it was given (1 or N), and N on the second.

    Raises:
        InvalidRequestError: there is no text, or neither 1 to N nor N to N of them.
    """
    sides = []
    for name, given in zip(names, (data_1, data_2), strict=True):
        texts = [given] if isinstance(given, str) else list(given)
        wrong = next((t for t in texts if not isinstance(t, str)), None)
        if not texts or wrong is not None:
            got = "none" if wrong is None else type(wrong).__name__
            raise InvalidRequestError(f"{name} must be a text or a list of texts; got {got}.", param=name)
        sides.append(texts)
    first, second = sides
    if len(first) not in (1, len(second)):
        raise InvalidRequestError(
            f"{names[0]} has {len(first)} texts and {names[1]} has {len(second)}: one against many, or as "
            "many on either side, can be scored.",
            param=names[0],
        )
    return first, second


def is_cross_encoder(model: ModelConfig) -> bool:
    """Whether a model reads both texts at once; otherwise it embeds each by itself.

    Raises:
        InvalidRequestError: it classifies, and not into one label.
    """
    labels = pooler_of(model).labels
    if len(labels) > 1:
        raise InvalidRequestError(
            f"This model has {len(labels)} labels ({', '.join(labels[:3])}, ...), so none of them is a "
            "score; use classify."
        )
    return bool(labels)


def pair_prompt(
    tokenizer: Any, model: ModelConfig, first: str, second: str, max_tokens: int | None = None
) -> dict[str, Any]:
    """Two texts as one prompt: as an encoder was trained with them, or one behind the other.

    Args:
        max_tokens: the longer of the two is cut until both fit into so many tokens.
    """
    if tokenizer is None:
        raise InvalidRequestError(
            "scoring needs a tokenizer, and this engine runs without one (skip_tokenizer_init)."
        )
    texts = (first, second) if model.bidirectional else (first + second, None)
    encoded = tokenizer(
        texts[0],
        text_pair=texts[1],
        truncation=max_tokens is not None,
        max_length=max_tokens,
        return_token_type_ids=model.num_token_types > 1,
        verbose=False,
    )
    prompt: dict[str, Any] = {"prompt_token_ids": list(encoded["input_ids"])}
    if model.num_token_types > 1:
        prompt["token_type_ids"] = list(encoded["token_type_ids"])
    return prompt


def cosines(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> list[float]:
    """The cosine of each pair; a single vector on the first side goes with every one of the second."""
    each = list(first) * len(second) if len(first) == 1 else first
    return [_cosine(a, b) for a, b in zip(each, second, strict=True)]


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a.astype(np.float64), b.astype(np.float64)
    lengths = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / lengths) if lengths else 0.0

"""How long an output will be, guessed before it is there."""

from __future__ import annotations

from typing import Protocol

from jaxllm.scheduling.views import RequestView


class LengthPredictor(Protocol):
    """Guesses the length of outputs."""

    def predict(self, request: RequestView) -> float:
        """Output tokens that are still to come."""
        ...

    def learn(self, request: RequestView) -> None:
        """Takes note of a request that ended."""
        ...


class MaxTokens:
    """What the request allows is what it will need; true of benchmarks, which ignore the end of sequence."""

    def predict(self, request: RequestView) -> float:
        """Output tokens that are allowed and not there yet."""
        return request.max_tokens - request.num_output_tokens

    def learn(self, request: RequestView) -> None:
        """There is nothing to learn."""


class History:
    """The running mean over ended requests whose prompts were about as long.

    Args:
        rate: weight of the newest request.
        first_guess: output tokens, until the first request of a size has ended.
    """

    def __init__(self, rate: float = 0.05, first_guess: float = 256.0) -> None:
        self._rate = rate
        self._first_guess = first_guess
        self._means: dict[int, float] = {}

    def predict(self, request: RequestView) -> float:
        """The mean of its size, within what it allows; a request past it is as far from its end again."""
        mean = self._means.get(request.num_prompt_tokens.bit_length(), self._first_guess)
        left = mean - request.num_output_tokens
        if left <= 0:
            left = mean
        return min(left, request.max_tokens - request.num_output_tokens)

    def learn(self, request: RequestView) -> None:
        """Moves the mean of its size."""
        size, length = request.num_prompt_tokens.bit_length(), float(request.num_output_tokens)
        mean = self._means.get(size, length)
        self._means[size] = mean + self._rate * (length - mean)


_PREDICTORS = {"max_tokens": MaxTokens, "history": History}


def make_predictor(name: str) -> LengthPredictor:
    """The predictor of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in _PREDICTORS:
        raise ValueError(f"predictor={name!r} is not one of {', '.join(sorted(_PREDICTORS))}")
    return _PREDICTORS[name]()

"""What a pooling model gives back, in vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np

T = TypeVar("T")


@dataclass(slots=True)
class PoolingOutput:
    """What was made of one prompt.

    Attributes:
        data: float32[D] or [labels], or for every token [N, D] or [N, labels].
    """

    data: np.ndarray


@dataclass(slots=True)
class EmbeddingOutput:
    """One embedding."""

    embedding: list[float]

    @property
    def hidden_size(self) -> int:
        """Its length."""
        return len(self.embedding)


@dataclass(slots=True)
class ClassificationOutput:
    """A score for each label: probabilities, unless the request turned the activation off."""

    probs: list[float]

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return len(self.probs)


@dataclass(slots=True)
class ScoringOutput:
    """How well two texts fit: a cosine, or what a cross-encoder says."""

    score: float


@dataclass(slots=True)
class PoolingRequestOutput(Generic[T]):
    """The answer to one prompt of `LLM.encode`, `embed`, `classify` or `score`.

    Attributes:
        num_cached_tokens: prompt tokens that were found in the prefix cache.
        error: why the request failed, or None.
    """

    request_id: str
    outputs: T
    prompt_token_ids: list[int]
    num_cached_tokens: int
    finished: bool
    error: str | None = None


EmbeddingRequestOutput = PoolingRequestOutput[EmbeddingOutput]
ClassificationRequestOutput = PoolingRequestOutput[ClassificationOutput]
ScoringRequestOutput = PoolingRequestOutput[ScoringOutput]


def with_outputs(output: PoolingRequestOutput[PoolingOutput], outputs: T) -> PoolingRequestOutput[T]:
    """The same answer in another form."""
    return PoolingRequestOutput(
        output.request_id,
        outputs,
        output.prompt_token_ids,
        output.num_cached_tokens,
        output.finished,
        output.error,
    )


def embedding_of(output: PoolingRequestOutput[PoolingOutput]) -> EmbeddingRequestOutput:
    """The answer as an embedding."""
    return with_outputs(output, EmbeddingOutput(output.outputs.data.tolist()))


def classification_of(output: PoolingRequestOutput[PoolingOutput]) -> ClassificationRequestOutput:
    """The answer as scores of the labels."""
    return with_outputs(output, ClassificationOutput(output.outputs.data.tolist()))

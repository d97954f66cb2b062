"""What a user asks of a pooling model, in vLLM's names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from jaxllm.errors import InvalidRequestError

PoolingTask = Literal["embed", "classify", "token_embed", "token_classify"]
POOLING_TASKS: tuple[str, ...] = get_args(PoolingTask)


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """How one prompt is pooled; None is the model's default.

    Attributes:
        use_activation: whether embeddings are brought to length 1, or scores through the classifier's
            activation (softmax, sigmoid).
        dimensions: length of the embedding, cut from the front before it is brought to length 1.
        task: what is wanted: one vector ("embed"), scores of the labels ("classify"), or either for
            every token ("token_embed", "token_classify").
        skip_reading_prefix_cache: compute the whole prompt even where part of it is cached.
        prompt_name: of the prompts that a model of sentence-transformers was trained with, which one goes
            before the text; "" is none of them.

    Raises:
        InvalidRequestError: naming the field.
    """

    use_activation: bool | None = None
    dimensions: int | None = None
    task: PoolingTask | None = None
    skip_reading_prefix_cache: bool | None = None
    prompt_name: str | None = None

    def __post_init__(self) -> None:
        for name in ("use_activation", "skip_reading_prefix_cache"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise InvalidRequestError(f"{name} must be True, False or None; got {value!r}.", param=name)
        if self.dimensions is not None and (type(self.dimensions) is not int or self.dimensions < 1):
            raise InvalidRequestError(
                f"dimensions must be an integer of at least 1, or None; got {self.dimensions!r}.",
                param="dimensions",
            )
        if self.prompt_name is not None and not isinstance(self.prompt_name, str):
            raise InvalidRequestError(
                f"prompt_name must be a string or None; got {self.prompt_name!r}.", param="prompt_name"
            )
        if self.task is not None and self.task not in POOLING_TASKS:
            raise InvalidRequestError(
                f"task must be one of {', '.join(POOLING_TASKS)}; got {self.task!r}.", param="task"
            )

    @property
    def per_token(self) -> bool:
        """Whether every token gets a vector of its own."""
        return self.task in ("token_embed", "token_classify")

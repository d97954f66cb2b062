"""The bodies that the routes of pooling models take."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from jaxllm.errors import InvalidRequestError
from jaxllm.pooling_params import PoolingParams, PoolingTask
from jaxllm.request import SchedulingTerms
from jaxllm.serve.body import Body, refusal
from jaxllm.serve.protocol import TokenId

Texts = str | list[str]


class PoolingBody(Body):
    """The fields that all routes of pooling models share."""

    model: str | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1)] | None = None
    truncation_side: Literal["left", "right"] | None = None
    use_activation: bool | None = None
    priority: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    tenant: Annotated[str, Field(max_length=256)] = ""
    request_id: Annotated[str, Field(min_length=1, max_length=256)] = Field(
        default_factory=lambda: uuid.uuid4().hex
    )
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    # For the caller's own bookkeeping.
    user: str | None = None

    @model_validator(mode="after")
    def _check_truncation(self) -> PoolingBody:
        if self.truncation_side is not None and self.truncate_prompt_tokens is None:
            raise refusal("Field 'truncation_side' needs 'truncate_prompt_tokens'.", "truncation_side")
        if self.truncate_prompt_tokens == 0:
            raise refusal(
                "Field 'truncate_prompt_tokens' is 0: at least one token must stay; -1 keeps what fits.",
                "truncate_prompt_tokens",
            )
        return self

    def scheduling_terms(self) -> SchedulingTerms:
        """How the request wants to be scheduled."""
        return SchedulingTerms(self.priority, self.tenant)


class InputBody(PoolingBody):
    """A body with texts, token ids, or a conversation to pool."""

    input: str | list[TokenId] | list[str] | list[list[TokenId]] | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    prompt_name: Annotated[str, Field(max_length=256)] | None = None

    @model_validator(mode="after")
    def _check_input(self) -> InputBody:
        if (self.input is None) == (self.messages is None):
            raise refusal("Give exactly one of 'input' and 'messages'.", "input")
        if self.input is not None and not self.input:
            raise refusal("Field 'input' is empty: give text or token ids.", "input")
        is_text = self.input is not None and all(isinstance(given, str) for given in self.inputs)
        if self.prompt_name is not None and not is_text:
            raise refusal("Field 'prompt_name' goes with texts as 'input'.", "prompt_name")
        if self.continue_final_message and self.add_generation_prompt:
            raise refusal(
                "Fields 'continue_final_message' and 'add_generation_prompt' exclude each other.",
                "add_generation_prompt",
            )
        return self

    @property
    def inputs(self) -> list[str | list[int]]:
        """What `input` holds, one by one; nothing where there are messages instead."""
        given = self.input or []
        if not given:
            return []
        if isinstance(given, str) or isinstance(given[0], int):
            return [given]  # type: ignore[list-item]
        return list(given)  # type: ignore[arg-type]


class EmbeddingRequest(InputBody):
    """POST /v1/embeddings."""

    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = None

    def pooling_params(self) -> PoolingParams:
        """What is asked of the model."""
        return PoolingParams(self.use_activation, self.dimensions, "embed")


class PoolingRequest(EmbeddingRequest):
    """POST /pooling."""

    task: PoolingTask | None = None

    def pooling_params(self) -> PoolingParams:
        """What is asked of the model."""
        return PoolingParams(self.use_activation, self.dimensions, self.task)


class ClassificationRequest(InputBody):
    """POST /classify."""

    def pooling_params(self) -> PoolingParams:
        """What is asked of the model."""
        return PoolingParams(self.use_activation, task="classify")


class ScoringBody(PoolingBody):
    """A body with pairs of texts; the two limits cut each text by itself, 0 is no limit."""

    max_tokens_per_query: Annotated[int, Field(ge=0)] = 0
    max_tokens_per_doc: Annotated[int, Field(ge=0)] = 0


class ScoreRequest(ScoringBody):
    """POST /score: the two sides under any of their names."""

    queries: Texts | None = None
    documents: Texts | None = None
    items: Texts | None = None
    data_1: Texts | None = None
    data_2: Texts | None = None
    text_1: Texts | None = None
    text_2: Texts | None = None

    @property
    def names(self) -> tuple[str, str]:
        """The names under which the two sides were given.

        Raises:
            InvalidRequestError: they were not, or under several.
        """
        allowed = [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")]
        names = ("queries", "documents", "items", "data_1", "data_2", "text_1", "text_2")
        given = [name for name in names if getattr(self, name) is not None]
        if tuple(given) not in allowed:
            pairs = ", ".join(f"'{a}' and '{b}'" for a, b in allowed)
            raise InvalidRequestError(
                f"Give the texts as one of {pairs}.", param=given[0] if given else "queries"
            )
        return given[0], given[1]


class RerankDocument(Body):
    """A document with its text in a field."""

    text: str


class RerankRequest(ScoringBody):
    """POST /rerank."""

    query: str
    documents: Annotated[list[str | RerankDocument], Field(min_length=1)]
    top_n: Annotated[int, Field(ge=0)] = 0
    return_documents: bool = True

    @property
    def texts(self) -> list[str]:
        """The documents' texts."""
        return [d if isinstance(d, str) else d.text for d in self.documents]

"""The methods of `LLM` that pooling models answer: encode, embed, classify and score."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jaxllm.errors import InvalidRequestError, UnsupportedError
from jaxllm.input_processor import ProcessedInput
from jaxllm.inputs import PromptType, as_prompt_list
from jaxllm.pooling_outputs import (
    ClassificationRequestOutput,
    EmbeddingRequestOutput,
    PoolingOutput,
    PoolingRequestOutput,
    ScoringOutput,
    ScoringRequestOutput,
    classification_of,
    embedding_of,
    with_outputs,
)
from jaxllm.pooling_params import PoolingParams, PoolingTask
from jaxllm.pooling_processor import process_pooling
from jaxllm.scoring import Texts, cosines, is_cross_encoder, pair_prompt, pair_up

if TYPE_CHECKING:
    from jaxllm.engine import Engine

UseTqdm = bool | Callable[..., Any]


class PoolingMethods:
    """What `LLM` has for models with `runner="pooling"`; the rest of it submits and runs."""

    if TYPE_CHECKING:
        _lock: threading.RLock  # type: ignore[valid-type]

        @property
        def llm_engine(self) -> Engine: ...
        def _new_ids(self, count: int) -> list[str]: ...
        def _submit_processed(self, processed: Sequence[ProcessedInput]) -> None: ...
        def _run(self, request_ids: list[str], use_tqdm: UseTqdm) -> list[Any]: ...

    def encode(
        self,
        prompts: PromptType | Sequence[PromptType],
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        *,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        pooling_task: PoolingTask | None = None,
        tokenization_kwargs: None = None,
    ) -> list[PoolingRequestOutput[PoolingOutput]]:
        """Pool the hidden states of each prompt, as `pooling_task` says.

        Args:
            prompts: one prompt or a list of them: text, token ids, `TextPrompt` or `TokensPrompt`.
            pooling_params: one for all, or one for each prompt; None is the model's default.
            use_tqdm: show progress; a callable makes the bar in place of `tqdm`.
            pooling_task: "embed" or "classify" for a vector of each prompt, "token_embed" or
                "token_classify" for one of each token; needed unless `pooling_params` has it.
            lora_request, tokenization_kwargs: not served yet.

        Returns:
            One output for each prompt, in order, its `outputs.data` float32[D] or [tokens, D].

        Raises:
            InvalidRequestError: a prompt or its parameters cannot be served; then none has been started.
        """
        if lora_request or tokenization_kwargs:
            raise UnsupportedError(
                "lora_request and tokenization_kwargs are not supported yet; leave them out."
            )
        each = as_prompt_list(prompts)
        given = pooling_params if pooling_params is not None else PoolingParams()
        params: list[PoolingParams] = [given] * len(each) if isinstance(given, PoolingParams) else list(given)
        if len(params) != len(each):
            raise InvalidRequestError(
                f"pooling_params has {len(params)} entries for {len(each)} prompts; give one for each, or "
                "one for all.",
                param="pooling_params",
            )
        params = [_with_task(one, pooling_task) for one in params]
        engine = self.llm_engine
        with self._lock:
            request_ids = self._new_ids(len(each))
            self._submit_processed(
                [
                    process_pooling(engine.input_processor, engine.model_config, request_id, prompt, own)
                    for request_id, prompt, own in zip(request_ids, each, params, strict=True)
                ]
            )
            return self._run(request_ids, use_tqdm)

    def embed(
        self,
        prompts: PromptType | Sequence[PromptType],
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        lora_request: None = None,
        tokenization_kwargs: None = None,
    ) -> list[EmbeddingRequestOutput]:
        """An embedding of each prompt. Arguments are those of `encode`."""
        outputs = self.encode(
            prompts,
            pooling_params,
            use_tqdm=use_tqdm,
            lora_request=lora_request,
            pooling_task="embed",
            tokenization_kwargs=tokenization_kwargs,
        )
        return [embedding_of(output) for output in outputs]

    def classify(
        self,
        prompts: PromptType | Sequence[PromptType],
        *,
        pooling_params: PoolingParams | Sequence[PoolingParams] | None = None,
        use_tqdm: UseTqdm = True,
        lora_request: None = None,
        tokenization_kwargs: None = None,
    ) -> list[ClassificationRequestOutput]:
        """The probability of each label for each prompt. Arguments are those of `encode`."""
        outputs = self.encode(
            prompts,
            pooling_params,
            use_tqdm=use_tqdm,
            lora_request=lora_request,
            pooling_task="classify",
            tokenization_kwargs=tokenization_kwargs,
        )
        return [classification_of(output) for output in outputs]

    def score(
        self,
        data_1: Texts,
        data_2: Texts,
        /,
        *,
        use_tqdm: UseTqdm = True,
        pooling_params: PoolingParams | None = None,
        lora_request: None = None,
        tokenization_kwargs: None = None,
    ) -> list[ScoringRequestOutput]:
        """How well texts fit: one against each of many, or pair by pair.

        A model with one label reads both at once (a cross-encoder); one that embeds gives the cosine.

        Args:
            data_1: a text, or as many as `data_2` has.
            data_2: a text or several.

        Other arguments are those of `encode`.
        """
        engine = self.llm_engine
        cross = is_cross_encoder(engine.model_config)
        first, second = pair_up(data_1, data_2)
        if not cross:
            outputs = self.encode(
                [*first, *second],
                pooling_params,
                use_tqdm=use_tqdm,
                lora_request=lora_request,
                pooling_task="embed",
                tokenization_kwargs=tokenization_kwargs,
            )
            vectors = [output.outputs.data for output in outputs]
            scores = cosines(vectors[: len(first)], vectors[len(first) :])
            pairs = zip(outputs[len(first) :], scores, strict=True)
            return [with_outputs(output, ScoringOutput(score)) for output, score in pairs]
        each = first * len(second) if len(first) == 1 else first
        prompts: list[Any] = [
            pair_prompt(engine.tokenizer, engine.model_config, a, b)
            for a, b in zip(each, second, strict=True)
        ]
        outputs = self.encode(
            prompts,
            pooling_params,
            use_tqdm=use_tqdm,
            lora_request=lora_request,
            pooling_task="classify",
            tokenization_kwargs=tokenization_kwargs,
        )
        return [with_outputs(output, ScoringOutput(float(output.outputs.data[0]))) for output in outputs]


def _with_task(params: PoolingParams, task: PoolingTask | None) -> PoolingParams:
    if not isinstance(params, PoolingParams):
        raise InvalidRequestError(
            f"pooling_params must be PoolingParams; got {type(params).__name__}.", param="pooling_params"
        )
    if task is None and params.task is None:
        raise InvalidRequestError(
            "encode needs a pooling_task: embed, classify, token_embed or token_classify.",
            param="pooling_task",
        )
    if task is not None and params.task not in (None, task):
        raise InvalidRequestError(
            f"pooling_params has task={params.task!r}, and {task!r} is asked for; give one of them.",
            param="pooling_task",
        )
    return replace(params, task=task or params.task)

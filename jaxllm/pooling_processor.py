"""Both ends of a pooling request: prompts in, and vectors out."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jaxllm.errors import InvalidRequestError
from jaxllm.input_processor import InputProcessor, ProcessedInput, as_token_ids
from jaxllm.inputs import PromptType, split_prompt
from jaxllm.models.config import ModelConfig, Pooler
from jaxllm.pooling_outputs import PoolingOutput, PoolingRequestOutput
from jaxllm.pooling_params import PoolingParams
from jaxllm.request import NO_TERMS, Request, SchedulingTerms
from jaxllm.sampling_params import SamplingParams
from jaxllm.scheduling.plan import RequestUpdate


def pooler_of(model: ModelConfig) -> Pooler:
    """The model's pooler.

    Raises:
        InvalidRequestError: the engine generates.
    """
    if model.pooler is None:
        raise InvalidRequestError(
            "This engine generates text and does not pool; start it with runner='pooling' (--runner pooling)."
        )
    return model.pooler


def supported_tasks(model: ModelConfig) -> tuple[str, ...]:
    """The pooling tasks that a model can do; none where it generates."""
    if model.pooler is None:
        return ()
    return ("classify", "token_classify") if model.pooler.labels else ("embed", "token_embed")


def prompted(pooler: Pooler, text: str, prompt_name: str | None) -> str:
    """A text behind one of the prompts that a model was trained with.

    Args:
        prompt_name: None is the model's default; "" is none.

    Raises:
        InvalidRequestError: the model has none of that name.
    """
    name = pooler.default_prompt if prompt_name is None else prompt_name
    if not name:
        return text
    prompts = dict(pooler.prompts)
    if name not in prompts:
        known = ", ".join(map(repr, prompts)) or "none"
        raise InvalidRequestError(
            f"prompt_name={name!r}: prompts of this model are {known}.", param="prompt_name"
        )
    return prompts[name] + text


def process_pooling(
    processor: InputProcessor,
    model: ModelConfig,
    request_id: str,
    prompt: PromptType,
    params: PoolingParams,
    *,
    terms: SchedulingTerms = NO_TERMS,
    cache_salt: str | None = None,
) -> ProcessedInput:
    """Tokenize and check one prompt of a pooling model.

    Args:
        prompt: as for generation; a dict with `prompt_token_ids` may hold `token_type_ids` as well.

    Raises:
        InvalidRequestError: naming what is wrong with the prompt or a parameter.
    """
    pooler = pooler_of(model)
    params = _check_params(params, model, pooler)
    processor.check_terms(terms)
    token_types = None
    if isinstance(prompt, Mapping) and prompt.get("token_type_ids") is not None:
        given = dict(prompt)
        token_types = as_token_ids(given.pop("token_type_ids"))
        prompt = given  # type: ignore[assignment]
    text, given_ids, own_salt = split_prompt(prompt)
    if given_ids is None:
        text = prompted(pooler, text or "", params.prompt_name)
        token_ids = processor.tokenize(text)
    else:
        if params.prompt_name is not None:
            raise InvalidRequestError(
                "prompt_name goes before a text, and token ids are given; leave it out.", param="prompt_name"
            )
        token_ids = as_token_ids(given_ids)
    processor.check_prompt(token_ids, given=given_ids is not None, room=0)
    if token_types is not None:
        _check_token_types(token_types, len(token_ids), model.num_token_types)
    # Only the last token of a causal model says all; what else is pooled must be computed.
    reads_cache = pooler.pooling == "last" and not params.per_token and not params.skip_reading_prefix_cache
    request = Request(
        request_id=request_id,
        prompt_token_ids=token_ids,
        sampling_params=SamplingParams(max_tokens=1, skip_reading_prefix_cache=not reads_cache),
        arrival_time=time.monotonic(),
        max_tokens=1,
        terms=terms,
        cache_salt=own_salt if own_salt is not None else cache_salt,
        pooling_params=params,
        token_type_ids=token_types,
    )
    return ProcessedInput([request], text)


def _check_params(params: PoolingParams, model: ModelConfig, pooler: Pooler) -> PoolingParams:
    if not isinstance(params, PoolingParams):
        raise InvalidRequestError(
            f"pooling_params must be PoolingParams; got {type(params).__name__}.", param="pooling_params"
        )
    tasks = supported_tasks(model)
    if params.task is None:
        params = replace(params, task=tasks[0])  # type: ignore[arg-type]
    if params.task not in tasks:
        raise InvalidRequestError(
            f"task={params.task!r} is not what this model does ({model.architecture}); it does "
            f"{' and '.join(tasks)}.",
            param="task",
        )
    if params.dimensions is None:
        return params
    if pooler.labels:
        raise InvalidRequestError(
            "dimensions belongs to embeddings, and this model classifies.", param="dimensions"
        )
    full = pooler.width(model.hidden_size)
    if params.dimensions == full:
        return params
    if pooler.matryoshka is None:
        raise InvalidRequestError(
            f"dimensions={params.dimensions}: this model was not trained to have its embeddings cut; leave "
            f"it out, or ask for {full}. (If it was, start the engine with "
            "hf_overrides={'is_matryoshka': True}.)",
            param="dimensions",
        )
    if params.dimensions > full or (pooler.matryoshka and params.dimensions not in pooler.matryoshka):
        allowed = ", ".join(map(str, pooler.matryoshka)) if pooler.matryoshka else f"1 to {full}"
        raise InvalidRequestError(
            f"dimensions={params.dimensions} is not among what this model has: {allowed}.", param="dimensions"
        )
    return params


def _check_token_types(types: list[int], num_tokens: int, num_types: int) -> None:
    if not num_types:
        raise InvalidRequestError(
            "token_type_ids are given, and this model has no token types; leave them out.",
            param="token_type_ids",
        )
    if len(types) != num_tokens or min(types, default=0) < 0 or max(types, default=0) >= num_types:
        raise InvalidRequestError(
            f"token_type_ids must be {num_tokens} integers in [0, {num_types - 1}], one for each token.",
            param="token_type_ids",
        )


class PoolingProcessor:
    """Collects what steps bring for each pooling request; stands where a generating engine has its
    `OutputProcessor`. Its outputs are `PoolingRequestOutput[PoolingOutput]`.
    """

    def __init__(self, model: ModelConfig) -> None:
        self._pooler = pooler_of(model)
        self._requests: dict[str, Request] = {}
        self._parts: dict[str, list[np.ndarray]] = {}

    def add(
        self,
        requests: Sequence[Request],
        prompt: str | None,
        sampling_params: SamplingParams,
        request_id: str,
    ) -> None:
        """Registers a request.

        Raises:
            InvalidRequestError: the id is in use, or this is a request for generation.
        """
        if request_id in self._requests:
            raise InvalidRequestError(
                f"request_id {request_id!r} is in use by an unfinished request; every request needs its own.",
                param="request_id",
            )
        if requests[0].pooling_params is None:
            raise InvalidRequestError(
                "This engine pools and does not generate text; use embed, encode, classify or score, or "
                "start it with a model that generates."
            )
        self._requests[request_id] = requests[0]
        self._parts[request_id] = []

    def process(self, updates: Sequence[RequestUpdate], now: float) -> tuple[list[Any], list[Any]]:
        """What users get after a step; nothing is ever stopped by its text."""
        outputs = []
        for update in updates:
            request = update.request
            if request.request_id not in self._requests or update.pooled is None:
                continue
            parts = self._parts[request.request_id]
            if update.pooled_start == 0:
                parts.clear()  # A preempted request is computed again from its beginning.
            parts.append(update.pooled)
            if request.status.is_finished:
                outputs.append(self._end(request, None))
        return outputs, []

    def abort(self, request_ids: Iterable[str], now: float | None = None) -> list[Any]:
        """Ends requests; ids that are not here are ignored."""
        known = [self._requests[i] for i in request_ids if i in self._requests]
        return [self._end(request, "the request was aborted") for request in known]

    def fail(self, requests: Sequence[Request], message: str, now: float | None = None) -> list[Any]:
        """Ends requests with a message for users' eyes."""
        return [self._end(r, message) for r in requests if r.request_id in self._requests]

    def has(self, request_id: str) -> bool:
        """Whether a request of this id is unfinished."""
        return request_id in self._requests

    def requests(self, request_id: str) -> list[Request]:
        """The request of this id, if it is unfinished."""
        return [self._requests[request_id]] if request_id in self._requests else []

    @property
    def unfinished_request_ids(self) -> list[str]:
        """Ids of requests, oldest first."""
        return list(self._requests)

    def _end(self, request: Request, error: str | None) -> PoolingRequestOutput[PoolingOutput]:
        del self._requests[request.request_id]
        parts = self._parts.pop(request.request_id)
        params = request.pooling_params
        assert params is not None
        data = np.zeros(0, np.float32)
        if error is None:
            data = finish(np.concatenate(parts) if params.per_token else parts[-1], params, self._pooler)
        return PoolingRequestOutput(
            request.request_id,
            PoolingOutput(data),
            request.prompt_token_ids,
            request.num_cached_tokens,
            True,
            error,
        )


def finish(data: np.ndarray, params: PoolingParams, pooler: Pooler) -> np.ndarray:
    """Raw vectors float32[..., D] with the activation, cut to the dimensions that were asked for."""
    if pooler.labels:
        if params.use_activation is False:
            return data
        return _activate(data, pooler.activation)
    if params.dimensions is not None:
        data = data[..., : params.dimensions]
    if pooler.normalize if params.use_activation is None else params.use_activation:
        data = data / np.maximum(np.linalg.norm(data, axis=-1, keepdims=True), np.float32(1e-12))
    return data


def _activate(scores: np.ndarray, activation: str) -> np.ndarray:
    if activation == "sigmoid":
        # The half-angle form does not overflow.
        return 0.5 * (1 + np.tanh(0.5 * scores))
    if activation == "softmax":
        powers = np.exp(scores - scores.max(axis=-1, keepdims=True))
        return powers / powers.sum(axis=-1, keepdims=True)
    return scores

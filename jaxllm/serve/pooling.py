"""POST /v1/embeddings, /pooling, /classify, /score and /rerank."""

from __future__ import annotations

import base64
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import orjson
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from jaxllm.errors import InvalidRequestError
from jaxllm.input_processor import ProcessedInput
from jaxllm.output_stream import OutputStream
from jaxllm.pooling_outputs import PoolingOutput, PoolingRequestOutput
from jaxllm.pooling_params import PoolingParams
from jaxllm.pooling_processor import pooler_of, process_pooling, prompted
from jaxllm.sampling_params import RequestOutputKind
from jaxllm.scoring import cosines, is_cross_encoder, pair_prompt, pair_up
from jaxllm.serve.errors import GenerationError
from jaxllm.serve.pooling_protocol import (
    ClassificationRequest,
    EmbeddingRequest,
    InputBody,
    PoolingBody,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
    ScoringBody,
)
from jaxllm.serve.state import ServerState
from jaxllm.serve.streaming import CLIENT_CLOSED_REQUEST, closing_on_disconnect

Outputs = list[PoolingRequestOutput[PoolingOutput]]


class ClientGone(Exception):
    """The client closed its connection before its answer was there."""


async def create_embeddings(state: ServerState, body: EmbeddingRequest, http: HTTPRequest) -> Response:
    """An embedding of each input."""

    def write(outputs: Outputs) -> list[dict[str, Any]]:
        return [
            {"index": i, "object": "embedding", "embedding": _encoded(o.outputs.data, body.encoding_format)}
            for i, o in enumerate(outputs)
        ]

    return await _answer_inputs(state, body, body.pooling_params(), http, "embd", write)


async def create_pooling(state: ServerState, body: PoolingRequest, http: HTTPRequest) -> Response:
    """The pooled hidden states of each input, or of each of its tokens."""

    def write(outputs: Outputs) -> list[dict[str, Any]]:
        return [
            {"index": i, "object": "pooling", "data": _encoded(o.outputs.data, body.encoding_format)}
            for i, o in enumerate(outputs)
        ]

    return await _answer_inputs(state, body, body.pooling_params(), http, "pool", write)


async def create_classification(
    state: ServerState, body: ClassificationRequest, http: HTTPRequest
) -> Response:
    """The most probable label of each input, and the probabilities of all."""
    labels = pooler_of(state.engine.engine.model_config).labels

    def write(outputs: Outputs) -> list[dict[str, Any]]:
        return [
            {
                "index": i,
                "label": labels[int(output.outputs.data.argmax())],
                "probs": output.outputs.data.tolist(),
                "num_classes": len(labels),
            }
            for i, output in enumerate(outputs)
        ]

    return await _answer_inputs(state, body, body.pooling_params(), http, "classify", write)


async def create_score(state: ServerState, body: ScoreRequest, http: HTTPRequest) -> Response:
    """How well each pair of texts fits."""
    state.check_model(body.model)
    public_id = state.public_id("score", body, http)
    names = body.names
    first, second = pair_up(getattr(body, names[0]), getattr(body, names[1]), names)
    try:
        scores, usage = await _score(state, body, first, second, public_id, http)
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    data = [{"index": i, "object": "score", "score": score} for i, score in enumerate(scores)]
    return _json({**_head(state, public_id), "data": data, "usage": usage})


async def create_rerank(state: ServerState, body: RerankRequest, http: HTTPRequest) -> Response:
    """Documents by how well they fit a query, the best first."""
    state.check_model(body.model)
    public_id = state.public_id("rerank", body, http)
    texts = body.texts
    try:
        scores, usage = await _score(state, body, [body.query], texts, public_id, http)
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    best = sorted(range(len(texts)), key=lambda i: -scores[i])[: body.top_n or len(texts)]
    results = []
    for index in best:
        result: dict[str, Any] = {"index": index, "relevance_score": scores[index]}
        if body.return_documents:
            result["document"] = {"text": texts[index]}
        results.append(result)
    return _json({"id": public_id, "model": state.model_names[0], "usage": usage, "results": results})


async def _answer_inputs(
    state: ServerState,
    body: InputBody,
    params: PoolingParams,
    http: HTTPRequest,
    prefix: str,
    write: Callable[[Outputs], list[dict[str, Any]]],
) -> Response:
    state.check_model(body.model)
    public_id = state.public_id(prefix, body, http)
    length = sum(len(given) for given in body.inputs if isinstance(given, str))
    prompts = await state.engine.run_in_thread(_input_prompts, state, body, num_characters=length)
    try:
        outputs = await _pool(state, body, params, prompts, public_id, http)
    except ClientGone:
        return Response(status_code=CLIENT_CLOSED_REQUEST)
    return _json({**_head(state, public_id), "data": write(outputs), "usage": _usage(outputs)})


def _head(state: ServerState, public_id: str) -> dict[str, Any]:
    return {"id": public_id, "object": "list", "created": int(time.time()), "model": state.model_names[0]}


async def _score(
    state: ServerState,
    body: ScoringBody,
    first: list[str],
    second: list[str],
    public_id: str,
    http: HTTPRequest,
) -> tuple[list[float], dict[str, int]]:
    """A score for each pair, and the tokens that it took."""
    model = state.engine.engine.model_config
    cross = is_cross_encoder(model)

    def prompts() -> list[Any]:
        queries = [_cut(state, text, body.max_tokens_per_query) for text in first]
        documents = [_cut(state, text, body.max_tokens_per_doc) for text in second]
        if not cross:
            pooler = pooler_of(model)
            texts = [prompted(pooler, text, None) for text in [*queries, *documents]]
            ids = (state.tokenize(text, add_special_tokens=True) for text in texts)
            return [{"prompt_token_ids": _truncated(state, body, each)} for each in ids]
        limit = body.truncate_prompt_tokens
        limit = state.max_model_len if limit == -1 else limit
        each = queries * len(documents) if len(queries) == 1 else queries
        return [
            pair_prompt(state.tokenizer, model, a, b, limit) for a, b in zip(each, documents, strict=True)
        ]

    params = PoolingParams(body.use_activation, task="classify" if cross else "embed")
    length = sum(map(len, [*first, *second]))
    each_prompt = await state.engine.run_in_thread(prompts, num_characters=length)
    outputs = await _pool(state, body, params, each_prompt, public_id, http)
    vectors = [output.outputs.data for output in outputs]
    if cross:
        return [float(vector[0]) for vector in vectors], _usage(outputs)
    return cosines(vectors[: len(first)], vectors[len(first) :]), _usage(outputs)


async def _pool(
    state: ServerState,
    body: PoolingBody,
    params: PoolingParams,
    prompts: Sequence[Any],
    public_id: str,
    http: HTTPRequest,
) -> Outputs:
    """Check every prompt, submit them all, and wait for their outputs, which come in the prompts' order.

    Raises:
        ClientGone: nobody waits for them any more.
    """
    state.check_room(len(prompts))
    unique = uuid.uuid4().hex[:8]
    ids = [f"{public_id}-{unique}-{i}" for i in range(len(prompts))]
    processed = await state.engine.run_in_thread(_process_all, state, body, params, prompts, ids)
    state.check_room(len(prompts))
    streams: list[OutputStream] = []

    def close() -> None:
        for stream in streams:
            stream.close()

    try:
        for request_id, one in zip(ids, processed, strict=True):
            streams.append(state.submit(request_id, one, RequestOutputKind.FINAL_ONLY))
        async with closing_on_disconnect(http.receive, close):
            outputs: Outputs = []
            for stream in streams:
                output: Any = await anext(stream, None)
                if output is None:
                    raise ClientGone
                if output.error is not None:
                    raise GenerationError(output.error)
                outputs.append(output)
            return outputs
    finally:
        close()


def _process_all(
    state: ServerState,
    body: PoolingBody,
    params: PoolingParams,
    prompts: Sequence[Any],
    request_ids: Sequence[str],
) -> list[ProcessedInput]:
    engine = state.engine.engine
    try:
        return [
            process_pooling(
                engine.input_processor,
                engine.model_config,
                request_id,
                prompt,
                params,
                terms=body.scheduling_terms(),
                cache_salt=body.cache_salt,
            )
            for request_id, prompt in zip(request_ids, prompts, strict=True)
        ]
    except InvalidRequestError as error:
        if error.param in ("prompt", "prompt_token_ids"):
            error.param = "input" if isinstance(body, InputBody) else None
        raise


def _input_prompts(state: ServerState, body: InputBody) -> list[dict[str, Any]]:
    if body.messages is not None:
        text = state.render_chat(
            body.messages,
            chat_template=body.chat_template,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
        )
        each = [state.tokenize(text, add_special_tokens=body.add_special_tokens is True)]
    else:
        special = body.add_special_tokens is not False
        pooler = pooler_of(state.engine.engine.model_config)
        each = [
            state.tokenize(prompted(pooler, given, body.prompt_name), add_special_tokens=special)
            if isinstance(given, str)
            else given
            for given in body.inputs
        ]
    return [{"prompt_token_ids": _truncated(state, body, token_ids)} for token_ids in each]


def _truncated(state: ServerState, body: PoolingBody, token_ids: list[int]) -> list[int]:
    limit = body.truncate_prompt_tokens
    if limit is None:
        return token_ids
    limit = state.max_model_len if limit == -1 else limit
    if len(token_ids) <= limit:
        return token_ids
    side = body.truncation_side or getattr(state.engine.engine.tokenizer, "truncation_side", "right")
    return token_ids[-limit:] if side == "left" else token_ids[:limit]


def _cut(state: ServerState, text: str, max_tokens: int) -> str:
    """The beginning of a text that comes to so many tokens; all of it where the limit is 0."""
    if not max_tokens:
        return text
    encoded = state.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    offsets = encoded["offset_mapping"]
    return text if len(offsets) <= max_tokens else text[: offsets[max_tokens - 1][1]]


def _encoded(data: np.ndarray, encoding_format: str) -> Any:
    """Numbers, or the bytes of little-endian float32 in base64."""
    if encoding_format == "base64":
        return base64.b64encode(np.ascontiguousarray(data, "<f4").tobytes()).decode()
    return data.tolist()


def _usage(outputs: Outputs) -> dict[str, int]:
    tokens = sum(len(output.prompt_token_ids) for output in outputs)
    return {"prompt_tokens": tokens, "completion_tokens": 0, "total_tokens": tokens}


def _json(data: Any) -> Response:
    return Response(orjson.dumps(data), media_type="application/json")

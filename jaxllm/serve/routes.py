"""The small routes: tokens and text, health and load, profiling, and what a developer wants besides."""

from __future__ import annotations

import asyncio
import dataclasses
import platform
from typing import Any

import orjson
from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

import jaxllm
from jaxllm.errors import InvalidRequestError
from jaxllm.serve.errors import error_response
from jaxllm.serve.metrics import make_registry
from jaxllm.serve.pooling import (
    create_classification,
    create_embeddings,
    create_pooling,
    create_rerank,
    create_score,
)
from jaxllm.serve.pooling_protocol import (
    ClassificationRequest,
    EmbeddingRequest,
    PoolingRequest,
    RerankRequest,
    ScoreRequest,
)
from jaxllm.serve.protocol import DetokenizeRequest, TokenizeRequest
from jaxllm.serve.state import ServerState


def add_pooling_routes(app: FastAPI, state: ServerState) -> None:
    """What pooling models answer; a model that generates refuses it in words."""

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, http: HTTPRequest) -> Response:
        return await create_embeddings(state, body, http)

    @app.post("/pooling")
    async def pooling(body: PoolingRequest, http: HTTPRequest) -> Response:
        return await create_pooling(state, body, http)

    @app.post("/classify")
    async def classify(body: ClassificationRequest, http: HTTPRequest) -> Response:
        return await create_classification(state, body, http)

    async def score(body: ScoreRequest, http: HTTPRequest) -> Response:
        return await create_score(state, body, http)

    async def rerank(body: RerankRequest, http: HTTPRequest) -> Response:
        return await create_rerank(state, body, http)

    for path in ("/score", "/v1/score"):
        app.add_api_route(path, score, methods=["POST"], name=path)
    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        app.add_api_route(path, rerank, methods=["POST"], name=path)


def add_tokenizer_routes(app: FastAPI, state: ServerState) -> None:
    """Text to tokens and back."""

    def token_ids_of(body: TokenizeRequest) -> list[int]:
        if body.prompt is not None:
            return state.tokenize(body.prompt, add_special_tokens=body.add_special_tokens is not False)
        assert body.messages is not None
        text = state.render_chat(
            body.messages,
            chat_template=body.chat_template,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            chat_template_kwargs=body.chat_template_kwargs,
            tools=[tool.model_dump(exclude_unset=True) for tool in body.tools] if body.tools else None,
        )
        return state.tokenize(text, add_special_tokens=body.add_special_tokens is True)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeRequest) -> Response:
        state.check_model(body.model)
        length = len(getattr(body, "prompt", None) or "")
        ids = await state.engine.run_in_thread(token_ids_of, body, num_characters=length)
        names = state.tokenizer.convert_ids_to_tokens(ids) if body.return_token_strs else None
        return _json(
            {"count": len(ids), "max_model_len": state.max_model_len, "tokens": ids, "token_strs": names}
        )

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeRequest) -> Response:
        state.check_model(body.model)
        state.check_token_ids("tokens", body.tokens)
        return _json({"prompt": await state.engine.run_in_thread(state.tokenizer.decode, body.tokens)})

    if state.config.enable_tokenizer_info_endpoint:

        @app.get("/tokenizer_info")
        async def tokenizer_info() -> Response:
            tokenizer = state.tokenizer
            info = {name: _plain(value) for name, value in tokenizer.init_kwargs.items()}
            template = state.chat_template or getattr(tokenizer, "chat_template", None)
            return _json({**info, "tokenizer_class": type(tokenizer).__name__, "chat_template": template})


def add_operator_routes(app: FastAPI, state: ServerState) -> None:
    """How the server is."""

    @app.get("/health")
    async def health() -> Response:
        if state.engine.is_dead:
            error = state.engine.error
            return error_response(503, f"The engine stopped after an error: {type(error).__name__}: {error}")
        if state.engine.is_draining:
            return error_response(503, "The server is shutting down.")
        return Response(status_code=200)

    for method in ("GET", "POST"):
        app.add_api_route("/ping", health, methods=[method], name=f"ping_{method.lower()}")

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": jaxllm.__version__})

    @app.get("/load")
    async def load() -> Response:
        return _json({"server_load": state.requests_in_progress})

    registry = make_registry(state.engine, state.model_names[0])

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


def add_profile_routes(app: FastAPI, state: ServerState, directory: str) -> None:
    """Traces of JAX's profiler, from /start_profile to /stop_profile, in a directory of the server."""

    @app.post("/start_profile")
    async def start_profile() -> Response:
        await state.engine.call(lambda engine: engine.start_profile(directory))
        return Response(status_code=200)

    @app.post("/stop_profile")
    async def stop_profile() -> Response:
        await state.engine.call(lambda engine: engine.stop_profile())
        return Response(status_code=200)


def add_dev_routes(app: FastAPI, state: ServerState) -> None:
    """What shall not be open to everybody: it shows and changes the engine itself."""

    @app.get("/server_info")
    async def server_info() -> Response:
        engine = state.engine.engine
        secret = {"api_key", "ssl_keyfile"}
        server = {
            field.name: getattr(state.config, field.name)
            for field in dataclasses.fields(state.config)
            if field.name not in secret
        }
        return _json(
            {
                "engine_config": dataclasses.asdict(engine.config),
                "model_config": dataclasses.asdict(engine.model_config),
                "server_config": server,
                "state": {
                    "asyncio_tasks": len(asyncio.all_tasks()),
                    "requests_in_progress": state.requests_in_progress,
                    "unfinished_sequences": state.engine.num_unfinished,
                },
                "system_env": {
                    "jaxllm": jaxllm.__version__,
                    "python": platform.python_version(),
                    "platform": platform.platform(),
                },
            }
        )

    @app.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> Response:
        done = await state.engine.call(lambda engine: engine.reset_prefix_cache())
        return _json({"success": done})

    @app.post("/sleep")
    async def sleep(http: HTTPRequest) -> Response:
        level = _sleep_level(http.query_params.get("level", "1"))
        await state.engine.call(lambda engine: engine.sleep(level))
        return _json({"status": "sleeping", "level": level})

    @app.post("/wake_up")
    async def wake_up(http: HTTPRequest) -> Response:
        tags = http.query_params.getlist("tags") or None
        awake = await state.engine.call(lambda engine: engine.wake_up(tags))
        return _json({"status": "awake" if awake else "sleeping", "tags": tags})

    @app.get("/is_sleeping")
    async def is_sleeping() -> Response:
        return _json({"is_sleeping": await state.engine.call(lambda engine: engine.is_sleeping)})


def _sleep_level(text: str) -> int:
    if text not in ("1", "2"):
        raise InvalidRequestError(f"level={text!r}: there are levels 1 and 2.", param="level")
    return int(text)


def _plain(value: Any) -> Any:
    """A setting of a tokenizer as JSON can hold it."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value)


def _json(data: Any) -> Response:
    return Response(orjson.dumps(data), media_type="application/json")

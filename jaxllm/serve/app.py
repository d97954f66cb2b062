"""The routes."""

from __future__ import annotations

import logging
import time
import typing
from pathlib import Path
from typing import Any

import orjson
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from starlette.exceptions import HTTPException
from starlette.responses import Response

import jaxllm
from jaxllm.async_engine import AsyncEngine
from jaxllm.config import DEMO_MODEL
from jaxllm.demo import DEMO_MODEL_NAME
from jaxllm.errors import ConfigError, JaxLLMError
from jaxllm.serve.body import Body, Refusal
from jaxllm.serve.chat import create_chat_completion
from jaxllm.serve.completions import create_completion
from jaxllm.serve.config import ServerConfig
from jaxllm.serve.errors import (
    GenerationError,
    NotFoundError,
    OverloadedError,
    describe_validation,
    error_response,
    response_of,
)
from jaxllm.serve.json_body import JSONRoute
from jaxllm.serve.messages import count_tokens, create_message, in_anthropic_words
from jaxllm.serve.messages_protocol import CountTokensRequest, MessagesRequest
from jaxllm.serve.middleware import APIKeys, Limits, RequestGate, RequestIds, TraceContext, path_of
from jaxllm.serve.page import add_page_routes
from jaxllm.serve.parsing import OutputParsers
from jaxllm.serve.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
)
from jaxllm.serve.responses import (
    ResponseStore,
    cancel_response,
    create_response,
    delete_response,
    retrieve_response,
)
from jaxllm.serve.responses_protocol import ResponsesRequest
from jaxllm.serve.routes import (
    add_dev_routes,
    add_operator_routes,
    add_pooling_routes,
    add_profile_routes,
    add_tokenizer_routes,
)
from jaxllm.serve.state import ServerState
from jaxllm.serve.streaming import log_unexpected

logger = logging.getLogger(__name__)


def served_names(model: str, config: ServerConfig) -> tuple[str, ...]:
    """The names that requests may call the model by."""
    if config.served_model_name:
        return config.served_model_name
    return (DEMO_MODEL_NAME, DEMO_MODEL) if model == DEMO_MODEL else (model,)


def load_chat_template(given: str | None) -> str | None:
    """The Jinja source that `--chat-template` means: a file's, or the argument itself.

    Raises:
        ConfigError: it looks like a file and is none.
    """
    if given is None:
        return None
    if any(mark in given for mark in ("{%", "{{", "\n")):
        return given
    try:
        return Path(given).read_text()
    except OSError as error:
        raise ConfigError(
            f"--chat-template {given!r} cannot be read ({error.strerror}), and is no Jinja template itself;"
            " give the path of a file, or the template.",
            param="chat_template",
        ) from error


def build_app(
    engine: AsyncEngine, config: ServerConfig, *, model_names: tuple[str, ...] | None = None
) -> FastAPI:
    """The application around a running engine.

    Args:
        model_names: names that requests may call the model by; None derives them from the engine's.
    """
    names = model_names or served_names(engine.engine.config.model, config)
    parsers = OutputParsers.from_config(config)
    state = ServerState(engine, config, names, load_chat_template(config.chat_template), parsers)
    app = FastAPI(
        title="jaxllm",
        version=jaxllm.__version__,
        docs_url=None if config.disable_fastapi_docs else "/docs",
        redoc_url=None if config.disable_fastapi_docs else "/redoc",
        openapi_url=None if config.disable_fastapi_docs else "/openapi.json",
    )
    app.router.route_class = JSONRoute
    app.state.server = state
    _add_generation_routes(app, state)
    add_pooling_routes(app, state)
    add_tokenizer_routes(app, state)
    add_operator_routes(app, state)
    if config.profile_dir is not None:
        add_profile_routes(app, state, config.profile_dir)
    if config.enable_dev_routes:
        add_dev_routes(app, state)
    page: frozenset[str] = frozenset() if config.disable_page else add_page_routes(app, state)
    _add_error_handlers(app)
    # The last one added is the outermost.
    app.add_middleware(RequestGate, state=state)
    if engine.engine.config.otlp_traces_endpoint is not None:
        app.add_middleware(TraceContext)
    if config.api_key:
        app.add_middleware(APIKeys, keys=config.api_key, also_open=page)
    app.add_middleware(
        Limits,
        body=config.max_request_bytes,
        headers=config.h11_max_header_count,
        header_bytes=config.h11_max_incomplete_event_size,
    )
    app.add_middleware(RequestIds, in_response=config.enable_request_id_headers)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.allowed_origins,
            allow_methods=config.allowed_methods,
            allow_headers=config.allowed_headers,
            allow_credentials=config.allow_credentials,
        )
    return app


def _add_generation_routes(app: FastAPI, state: ServerState) -> None:
    @app.post("/v1/completions")
    async def completions(body: CompletionRequest, http: Request) -> Response:
        return await create_completion(state, body, http)

    @app.post("/v1/chat/completions")
    async def chat_completions(body: ChatCompletionRequest, http: Request) -> Response:
        return await create_chat_completion(state, body, http)

    @app.post("/v1/messages")
    async def messages(body: MessagesRequest, http: Request) -> Response:
        return await create_message(state, body, http)

    @app.post("/v1/messages/count_tokens")
    async def message_tokens(body: CountTokensRequest) -> Response:
        return await count_tokens(state, body)

    store = ResponseStore(state.config.response_store_size)

    @app.post("/v1/responses")
    async def responses(body: ResponsesRequest, http: Request) -> Response:
        return await create_response(state, store, body, http)

    @app.get("/v1/responses/{response_id}")
    async def response(response_id: str, http: Request) -> Response:
        return await retrieve_response(store, response_id, http.query_params)

    @app.delete("/v1/responses/{response_id}")
    async def forget_response(response_id: str) -> Response:
        return await delete_response(store, response_id)

    @app.post("/v1/responses/{response_id}/cancel")
    async def end_response(response_id: str) -> Response:
        return await cancel_response(store, response_id)

    created = int(time.time())

    @app.get("/v1/models")
    async def models() -> Response:
        return _json(
            {"object": "list", "data": [_model_card(state, name, created) for name in state.model_names]}
        )

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        state.check_model(name)
        return _json(_model_card(state, name, created))


def _model_card(state: ServerState, name: str, created: int) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "jaxllm",
        "root": state.engine.engine.config.model,
        "parent": None,
        "max_model_len": state.max_model_len,
        "permission": [],
    }


def _add_error_handlers(app: FastAPI) -> None:
    def in_words_of(request: Request, response: Response) -> Response:
        is_anthropic = path_of(request.scope).startswith("/v1/messages")
        return in_anthropic_words(response) if is_anthropic else response

    @app.exception_handler(RequestValidationError)
    async def on_invalid_body(request: Request, error: RequestValidationError) -> Response:
        fields = _fields_of(request)
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if fields and media_type.rpartition("/")[2].rpartition("+")[2] != "json":
            sent = f"is '{media_type}'" if media_type else "is missing"
            message = f"Header Content-Type {sent}; send the body as JSON, with 'application/json'."
            return in_words_of(request, error_response(415, message))
        message, param = describe_validation(error.errors(), fields)
        return in_words_of(request, error_response(400, message, param))

    @app.exception_handler(Refusal)
    async def on_refusal(request: Request, refusal: Refusal) -> Response:
        return in_words_of(request, response_of(refusal.error))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        message = str(error.detail)
        if error.status_code == 404:
            message = f"There is no {request.method} {request.url.path} here."
        elif error.status_code == 405:
            message = f"{request.url.path} does not take {request.method}."
        elif error.status_code == 400:
            message = "The body cannot be read as JSON."
        return in_words_of(request, error_response(error.status_code, message, headers=error.headers))

    async def on_error(request: Request, error: Exception) -> Response:
        log_unexpected(error)
        return in_words_of(request, response_of(error))

    for kind in (JaxLLMError, NotFoundError, OverloadedError, GenerationError, Exception):
        app.add_exception_handler(kind, on_error)


def _fields_of(request: Request) -> list[str]:
    """The names that the body of a request's route may hold."""
    hints = typing.get_type_hints(request.scope["route"].endpoint)
    bodies = [hint for hint in hints.values() if isinstance(hint, type) and issubclass(hint, Body)]
    return [name for body in bodies for name in body.model_fields]


def _json(data: Any) -> Response:
    return Response(orjson.dumps(data), media_type="application/json")

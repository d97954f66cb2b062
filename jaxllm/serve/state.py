"""What the routes share: the engine, the names it is known by, and how requests are checked in."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request as HTTPRequest

from jaxllm.async_engine import AsyncEngine
from jaxllm.errors import InvalidRequestError
from jaxllm.input_processor import ProcessedInput
from jaxllm.output_stream import OutputStream
from jaxllm.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.serve.config import ServerConfig
from jaxllm.serve.errors import NotFoundError, OverloadedError
from jaxllm.serve.logs import REQUEST_ID
from jaxllm.serve.parsing import NO_DEMANDS, Demands, OutputParsers
from jaxllm.serve.protocol import GenerationRequest
from jaxllm.text.chat_template import render_chat

logger = logging.getLogger(__name__)

TRACE_HEADERS: ContextVar[Mapping[str, str] | None] = ContextVar("trace_headers", default=None)
"""What the HTTP request that the running task answers said of its trace; None where none are recorded."""

MAX_REQUEST_ID = 256


class Identified(Protocol):
    """A body with an id, the client's own or a made-up one."""

    request_id: str


@dataclass(slots=True)
class ServerState:
    """One server.

    Attributes:
        model_names: names that requests may give; the first stands in responses.
        chat_template: a Jinja template that goes before the tokenizer's, or None.
        parsers: what tells reasoning, answer and tool calls apart in what the model writes.
        requests_in_progress: HTTP requests for generation that have not been answered in full.
    """

    engine: AsyncEngine
    config: ServerConfig
    model_names: tuple[str, ...]
    chat_template: str | None = None
    parsers: OutputParsers = field(default_factory=OutputParsers)
    requests_in_progress: int = field(default=0)

    @property
    def max_model_len(self) -> int:
        """Prompt and output tokens of a request, at most."""
        limit = self.engine.engine.config.max_model_len
        assert limit is not None  # Resolved by the engine.
        return limit

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, or an error that says why there is none."""
        tokenizer = self.engine.engine.tokenizer
        if tokenizer is None:
            raise InvalidRequestError(
                "This server runs without a tokenizer (--skip-tokenizer-init): send token ids as the"
                " 'prompt' of /v1/completions.",
            )
        return tokenizer

    def default_sampling_params(self) -> dict[str, Any]:
        """Sampling parameters of the model's `generation_config.json`."""
        return dict(self.engine.engine.input_processor.default_sampling_params)

    def tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""
        return self.engine.engine.input_processor.tokenize(text, add_special_tokens=add_special_tokens)

    def render_chat(
        self,
        messages: list[dict[str, Any]],
        *,
        chat_template: str | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        chat_template_kwargs: dict[str, Any] | None,
        documents: list[dict[str, Any]] | None = None,
        tools: list[dict[str, Any]] | None = None,
        reasoning_effort: str | None = None,
    ) -> str:
        """The text that the model is given for a conversation.

        Raises:
            InvalidRequestError: the messages do not fit the template, or the request brings a template
                of its own where the operator does not allow it.
        """
        if chat_template is not None and not self.config.trust_request_chat_template:
            raise InvalidRequestError(
                "Field 'chat_template' is refused: a template is a program, and this server runs only its"
                " own. Start it with --chat-template FILE, or with --trust-request-chat-template.",
                param="chat_template",
            )
        return render_chat(
            self.tokenizer,
            messages,
            chat_template=self.chat_template if chat_template is None else chat_template,
            content_format=self.config.chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            reasoning_effort=reasoning_effort,
            chat_template_kwargs=chat_template_kwargs,
        )

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served here; None is whichever is."""
        if name is not None and name not in self.model_names:
            served = ", ".join(f"'{n}'" for n in self.model_names)
            raise NotFoundError(
                f"The model '{name}' does not exist; this server has {served}.", param="model"
            )

    def check_room(self, sequences: int) -> None:
        """Refuse a request of so many sequences (prompts times n) where it is, or makes, too many.

        Raises:
            InvalidRequestError: one request may not have as many.
            OverloadedError: together with those that are unfinished they are more than the queue takes, or
                too many prompt tokens wait already.
        """
        if sequences > self.config.max_sequences_per_request:
            raise InvalidRequestError(
                f"The request has {sequences} sequences (prompts times 'n'): at most"
                f" {self.config.max_sequences_per_request} are taken. Send several requests.",
                param="n",
            )
        limit = self.config.max_num_queued_reqs
        if limit is not None and self.engine.num_unfinished + sequences > limit:
            raise OverloadedError(
                f"The server works on {self.engine.num_unfinished} sequences and takes {limit} at once"
                " (--max-num-queued-reqs); try again in a moment, or on another server."
            )
        limit = self.config.max_num_queued_tokens
        if limit is not None and (queued := self.engine.num_queued_tokens()) >= limit:
            raise OverloadedError(
                f"Prompts of {queued} tokens wait for their first output, and {limit} may"
                " (--max-num-queued-tokens); try again in a moment, or on another server."
            )

    def check_token_ids(self, name: str, token_ids: Sequence[int]) -> None:
        """Refuse token ids that the model does not have."""
        size = self.engine.engine.model_config.vocab_size
        wrong = next((i for i in token_ids if not 0 <= i < size), None)
        if wrong is not None:
            raise InvalidRequestError(
                f"Field '{name}' holds {wrong}: token ids of this model are in [0, {size - 1}].", param=name
            )

    def submit(
        self, request_id: str, processed: ProcessedInput, output_kind: RequestOutputKind
    ) -> OutputStream:
        """Hand processed input to the engine, as a part of the trace that the HTTP request belongs to."""
        for request in processed.requests:
            request.trace_headers = TRACE_HEADERS.get()
        return self.engine.submit(request_id, processed, output_kind)

    def public_id(self, prefix: str, body: Identified, http: HTTPRequest) -> str:
        """The id that the client sees: its own where it sent one."""
        own = http.headers.get("x-request-id")
        if own is not None and not 0 < len(own) <= MAX_REQUEST_ID:
            raise InvalidRequestError(
                f"Header X-Request-Id has {len(own)} characters: 1 to {MAX_REQUEST_ID} are allowed.",
                param="X-Request-Id",
            )
        if own is None:
            REQUEST_ID.set(body.request_id)
        return f"{prefix}-{own or body.request_id}"


@dataclass(frozen=True, slots=True)
class PromptInput:
    """One prompt before it is tokenized.

    Attributes:
        text: the prompt as text, or None where the client sent token ids.
        token_ids: these ids.
        add_special_tokens: whether the tokenizer adds what the model expects around a text.
    """

    text: str | None = None
    token_ids: list[int] | None = None
    add_special_tokens: bool = True


@dataclass(frozen=True, slots=True)
class Generation:
    """One prompt that the engine works on.

    Attributes:
        prompt_token_ids: as computed, after truncation.
        prompt_text: the prompt as text, or None where it came as ids or was truncated.
    """

    stream: OutputStream
    prompt_token_ids: list[int]
    prompt_text: str | None


async def start_generations(
    state: ServerState,
    body: GenerationRequest,
    prompts: Sequence[PromptInput],
    public_id: str,
    demands: Demands = NO_DEMANDS,
) -> list[Generation]:
    """Check every prompt, then submit them all; none is submitted when one is refused.

    Args:
        demands: of whoever reads the completions.

    Raises:
        InvalidRequestError: naming the field.
        EngineDeadError: the engine failed or is shutting down.
    """
    params = body.to_sampling_params(state.default_sampling_params())
    sequences = len(prompts) * body.num_completions
    state.check_room(sequences)
    if not demands.skips_special_tokens:
        params.skip_special_tokens = False
    if demands.form is not None:
        params.structured_outputs = demands.form
    # Clients choose their ids freely, also the same one twice at once.
    unique = uuid.uuid4().hex[:8]
    ids = [f"{public_id}-{unique}-{i}" for i in range(len(prompts))]
    try:
        await state.engine.compile_grammar(params)
        length = sum(len(prompt.text or "") for prompt in prompts)
        processed = await state.engine.run_in_thread(
            _process_all, state, body, prompts, params, ids, demands, num_characters=length
        )
    except InvalidRequestError as error:
        if error.param == "structured_outputs":
            error.param = body.form_field()
        raise
    if state.config.enable_log_requests:
        for request_id, one in zip(ids, processed, strict=True):
            log_request(request_id, one, params, state.config.max_log_len)
    # Others may have come while this one was tokenized.
    state.check_room(sequences)
    generations: list[Generation] = []
    try:
        for request_id, one in zip(ids, processed, strict=True):
            stream = state.submit(request_id, one, params.output_kind)
            generations.append(Generation(stream, one.requests[0].prompt_token_ids, one.prompt))
    except BaseException:
        close_all(generations)
        raise
    return generations


def close_all(generations: Sequence[Generation]) -> None:
    """Abort what still runs of these."""
    for generation in generations:
        generation.stream.close()


def log_request(
    request_id: str, processed: ProcessedInput, params: SamplingParams, limit: int | None
) -> None:
    """Write a request to the log, its prompt cut to `limit` characters (or token ids)."""
    ids = processed.requests[0].prompt_token_ids
    shown: Any = ids if processed.prompt is None else processed.prompt
    logger.info(
        "Request %s: %d prompt tokens, prompt %r, %s",
        request_id,
        len(ids),
        shown if limit is None else shown[:limit],
        params,
    )


def _process_all(
    state: ServerState,
    body: GenerationRequest,
    prompts: Sequence[PromptInput],
    params: SamplingParams,
    request_ids: Sequence[str],
    demands: Demands,
) -> list[ProcessedInput]:
    return [
        _process(state, body, prompt, params, request_id, demands)
        for prompt, request_id in zip(prompts, request_ids, strict=True)
    ]


def _process(
    state: ServerState,
    body: GenerationRequest,
    prompt: PromptInput,
    params: SamplingParams,
    request_id: str,
    demands: Demands,
) -> ProcessedInput:
    try:
        processed = state.engine.engine.input_processor.process(
            request_id,
            _engine_prompt(state, body, prompt),
            params,
            terms=body.scheduling_terms(),
            cache_salt=body.cache_salt,
            grammar_after=demands.form_after,
            thinking=demands.thinking,
        )
    except InvalidRequestError as error:
        if error.param in ("prompt", "prompt_token_ids"):
            error.param = body.PROMPT_FIELD
        raise
    asked = body.output_limit()
    name = next((n for n in ("max_completion_tokens", "max_tokens") if n in body.model_fields_set), None)
    num_prompt_tokens = len(processed.requests[0].prompt_token_ids)
    room = state.max_model_len - num_prompt_tokens
    # A limit that nobody asked for, such as the default of 16, gives way to the room there is.
    if asked is not None and asked > room and name is not None:
        raise InvalidRequestError(
            f"Field '{name}' is {asked}: this model's maximum context length is {state.max_model_len} tokens,"
            f" of which the prompt takes {num_prompt_tokens}. Ask for at most {room}, or shorten the prompt.",
            param=name,
        )
    return processed


def _engine_prompt(state: ServerState, body: GenerationRequest, prompt: PromptInput) -> Any:
    """The prompt as the engine takes it: text where nothing has to be done to it, token ids otherwise."""
    truncation = body.truncate_prompt_tokens
    token_ids = prompt.token_ids
    if token_ids is None:
        assert prompt.text is not None
        if not prompt.text or (prompt.add_special_tokens and truncation is None):
            return prompt.text  # An empty text is refused by the engine, in its own words.
        token_ids = state.tokenize(prompt.text, add_special_tokens=prompt.add_special_tokens)
    if truncation is not None:
        limit = truncation
        if truncation == -1:
            limit = max(1, state.max_model_len - (body.output_limit() or 1))
        if limit == 0:
            raise InvalidRequestError(
                "Field 'truncate_prompt_tokens' is 0: at least one token must stay; -1 keeps what fits.",
                param="truncate_prompt_tokens",
            )
        if len(token_ids) > limit:
            kept = token_ids[:limit] if body.truncation_side == "right" else token_ids[-limit:]
            return {"prompt_token_ids": kept}
    if prompt.text is None:
        return {"prompt_token_ids": token_ids}
    return {"prompt_token_ids": token_ids, "prompt": prompt.text}

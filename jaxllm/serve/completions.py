"""POST /v1/completions."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from jaxllm.outputs import CompletionOutput, PromptLogprobs, RequestOutput
from jaxllm.serve.logprobs import completion_logprobs, prompt_logprobs_json
from jaxllm.serve.protocol import CompletionRequest
from jaxllm.serve.state import Generation, PromptInput, ServerState, close_all, start_generations
from jaxllm.serve.streaming import (
    CLIENT_CLOSED_REQUEST,
    EventStream,
    closing_on_disconnect,
    collect,
    event,
    merge,
)
from jaxllm.serve.usage import UsageCounter


async def create_completion(state: ServerState, body: CompletionRequest, http: HTTPRequest) -> Response:
    """Complete each prompt, in one JSON object or as a stream of chunks."""
    state.check_model(body.model)
    public_id = state.public_id("cmpl", body, http)
    prompts = [
        PromptInput(text=prompt, add_special_tokens=body.add_special_tokens)
        if isinstance(prompt, str)
        else PromptInput(token_ids=prompt)
        for prompt in body.prompts
    ]
    generations = await start_generations(state, body, prompts, public_id)
    answer = _Answer(state, body, public_id, generations)
    close = functools.partial(close_all, generations)
    if body.stream:
        return EventStream(answer.events(), close)
    try:
        async with closing_on_disconnect(http.receive, close):
            finals = await collect(generations)
            if finals is None:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            return Response(orjson.dumps(answer.whole(finals)), media_type="application/json")
    finally:
        close()


@dataclass(slots=True)
class _Choice:
    """How far the stream of one choice has come."""

    begun: bool = False
    text_offset: int = 0


class _Answer:
    """Writes the outputs of one request down as OpenAI's completion objects."""

    def __init__(
        self, state: ServerState, body: CompletionRequest, public_id: str, generations: Sequence[Generation]
    ) -> None:
        self._body = body
        self._generations = generations
        self._tokenizer = state.engine.engine.tokenizer
        self._as_ids = (
            state.config.return_tokens_as_token_ids
            if body.return_tokens_as_token_ids is None
            else body.return_tokens_as_token_ids
        )
        self._usage = UsageCounter(
            [len(g.prompt_token_ids) for g in generations],
            body.stream_options,
            force=state.config.enable_force_include_usage,
            details=state.config.enable_prompt_tokens_details,
        )
        self._head = {
            "id": public_id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": state.model_names[0],
        }

    def whole(self, finals: Sequence[RequestOutput]) -> dict[str, Any]:
        """The response object."""
        choices = []
        for prompt_index, final in enumerate(finals):
            self._usage.add_cached(prompt_index, final.num_cached_tokens)
            for completion in sorted(final.outputs, key=lambda c: c.index):
                choice, _ = self._choice(prompt_index, completion, final.prompt_logprobs, begins=True)
                self._usage.add(prompt_index, completion.index, self._num_tokens(completion))
                if self._body.prompt_logprobs is not None:
                    choice["prompt_logprobs"] = prompt_logprobs_json(final.prompt_logprobs)
                choices.append(choice)
        return {**self._head, "choices": choices, "usage": self._usage.total()}

    async def events(self) -> AsyncIterator[bytes]:
        """The chunks of the stream; those of one engine step together."""
        progress: dict[int, _Choice] = {}
        prompt_logprobs: dict[int, PromptLogprobs | None] = {}
        async for prompt_index, output in merge(self._generations):
            self._usage.add_cached(prompt_index, output.num_cached_tokens)
            if output.prompt_logprobs is not None:
                prompt_logprobs[prompt_index] = output.prompt_logprobs
            chunks = []
            for completion in output.outputs:
                index = prompt_index * self._body.num_completions + completion.index
                done = progress.setdefault(index, _Choice())
                self._usage.add(prompt_index, completion.index, self._num_tokens(completion))
                if not completion.token_ids and not completion.text and completion.finish_reason is None:
                    continue
                if self._body.echo_only and done.begun and completion.finish_reason is None:
                    continue
                choice, done.text_offset = self._choice(
                    prompt_index,
                    completion,
                    prompt_logprobs.get(prompt_index),
                    begins=not done.begun,
                    text_offset=done.text_offset,
                )
                done.begun = True
                if self._says_something(choice):
                    chunk = {**self._head, "choices": [choice]}
                    self._usage.stamp(chunk, prompt_index, completion.index)
                    chunks.append(event(chunk))
            if chunks:
                yield b"".join(chunks)
        if self._usage.in_stream:
            yield event({**self._head, "choices": [], "usage": self._usage.total()})

    def _choice(
        self,
        prompt_index: int,
        completion: CompletionOutput,
        prompt_logprobs: PromptLogprobs | None,
        *,
        begins: bool,
        text_offset: int = 0,
    ) -> tuple[dict[str, Any], int]:
        """A choice, and the text offset after it.

        Args:
            begins: whether it holds the beginning of its text, where an echo goes.
        """
        body = self._body
        generation = self._generations[prompt_index]
        text, token_ids = completion.text, completion.token_ids
        positions: list[Any] = list(completion.logprobs or ())
        if body.echo_only:
            text, token_ids, positions = "", [], []
        new_token_ids = token_ids
        if body.echo and begins:
            text = self._prompt_text(generation) + text
            token_ids = [*generation.prompt_token_ids, *token_ids]
            positions = [*(prompt_logprobs or ()), *positions]
        logprobs = None
        if body.logprobs is not None:
            logprobs, text_offset = completion_logprobs(
                token_ids,
                positions,
                tokenizer=self._tokenizer,
                as_ids=self._as_ids,
                text_offset=text_offset,
            )
        choice: dict[str, Any] = {
            "index": prompt_index * body.num_completions + completion.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": completion.finish_reason,
            "stop_reason": completion.stop_reason,
        }
        if body.return_token_ids:
            choice["token_ids"] = new_token_ids
            choice["prompt_token_ids"] = generation.prompt_token_ids if begins else None
        return choice, text_offset

    def _prompt_text(self, generation: Generation) -> str:
        if generation.prompt_text is not None:
            return generation.prompt_text
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode(generation.prompt_token_ids))

    def _num_tokens(self, completion: CompletionOutput) -> int:
        return 0 if self._body.echo_only else len(completion.token_ids)

    def _says_something(self, choice: dict[str, Any]) -> bool:
        """Whether a chunk is worth sending: text may be held back while tokens come."""
        return bool(
            choice["text"]
            or choice["finish_reason"] is not None
            or choice["logprobs"] is not None
            or self._body.return_token_ids
            or self._usage.continuous
        )

"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from jaxllm.outputs import CompletionOutput, RequestOutput
from jaxllm.serve.chat_message import ChatMessage
from jaxllm.serve.logprobs import chat_logprobs, prompt_logprobs_json
from jaxllm.serve.protocol import ChatCompletionRequest
from jaxllm.serve.state import Generation, ServerState
from jaxllm.serve.streaming import (
    CLIENT_CLOSED_REQUEST,
    EventStream,
    closing_on_disconnect,
    collect,
    event,
    merge,
)
from jaxllm.serve.turn import start_turn
from jaxllm.serve.usage import UsageCounter
from jaxllm.text.parsers.message import MessageFormat
from jaxllm.text.parsers.reasoning import count_reasoning_tokens


async def create_chat_completion(
    state: ServerState, body: ChatCompletionRequest, http: HTTPRequest
) -> Response:
    """Write the next message of a conversation, in one JSON object or as a stream of chunks."""
    state.check_model(body.model)
    public_id = state.public_id("chatcmpl", body, http)
    turn = await start_turn(state, body, public_id)
    answer = _Answer(state, body, public_id, turn.generation, turn.how)
    close = turn.generation.stream.close
    if body.stream:
        return EventStream(answer.events(), close)
    try:
        async with closing_on_disconnect(http.receive, close):
            finals = await collect([turn.generation])
            if finals is None:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            return Response(orjson.dumps(answer.whole(finals[0])), media_type="application/json")
    finally:
        close()


class _Answer:
    """Writes the outputs of one request down as OpenAI's chat objects.

    Args:
        how: how its completions are to be read.
    """

    def __init__(
        self,
        state: ServerState,
        body: ChatCompletionRequest,
        public_id: str,
        generation: Generation,
        how: MessageFormat,
    ) -> None:
        self._body = body
        self._generation = generation
        self._tokenizer = state.engine.engine.tokenizer
        self._parses_reasoning = how.reasoning is not None
        self._messages = [ChatMessage(how, body) for _ in range(body.num_completions)]
        self._as_ids = (
            state.config.return_tokens_as_token_ids
            if body.return_tokens_as_token_ids is None
            else body.return_tokens_as_token_ids
        )
        self._usage = UsageCounter(
            [len(generation.prompt_token_ids)],
            body.stream_options,
            force=state.config.enable_force_include_usage,
            details=state.config.enable_prompt_tokens_details,
        )
        last = body.messages[-1]
        # Without a generation prompt the model goes on writing as whoever spoke last.
        self._role = state.config.response_role if body.add_generation_prompt else last["role"]
        self._echo = _text_of(last) if body.echo and last["role"] == self._role else ""
        self._head = {
            "id": public_id,
            "object": "chat.completion.chunk" if body.stream else "chat.completion",
            "created": int(time.time()),
            "model": state.model_names[0],
        }

    def whole(self, final: RequestOutput) -> dict[str, Any]:
        """The response object."""
        self._usage.add_cached(0, final.num_cached_tokens)
        choices = []
        for completion in sorted(final.outputs, key=lambda c: c.index):
            self._usage.add(0, completion.index, len(completion.token_ids))
            message = self._messages[completion.index]
            message.add(completion)
            choice: dict[str, Any] = {
                "index": completion.index,
                "message": {"role": self._role, **message.whole(self._echo)},
                "logprobs": self._logprobs(completion),
                "finish_reason": message.finish_reason(completion),
                "stop_reason": completion.stop_reason,
            }
            if self._body.return_token_ids:
                choice["token_ids"] = completion.token_ids
            choices.append(choice)
        self._count_reasoning()
        response: dict[str, Any] = {**self._head, "choices": choices, "usage": self._usage.total()}
        if self._body.prompt_logprobs is not None:
            response["prompt_logprobs"] = prompt_logprobs_json(final.prompt_logprobs)
        if self._body.return_token_ids:
            response["prompt_token_ids"] = self._generation.prompt_token_ids
        return response

    async def events(self) -> AsyncIterator[bytes]:
        """The chunks of the stream: a role for each choice, then text; those of one engine step together."""
        begun = False
        async for _, output in merge([self._generation]):
            self._usage.add_cached(0, output.num_cached_tokens)
            chunks = []
            if not begun:
                chunks += self._opening()
                begun = True
            for completion in output.outputs:
                self._usage.add(0, completion.index, len(completion.token_ids))
                delta = self._messages[completion.index].add(completion)
                if delta or self._says_something(completion):
                    chunks.append(self._chunk(self._stream_choice(completion, delta)))
            if chunks:
                yield b"".join(chunks)
        if self._usage.in_stream:
            self._count_reasoning()
            yield event({**self._head, "choices": [], "usage": self._usage.total()})

    def _opening(self) -> list[bytes]:
        """The first chunk of every choice, and what it echoes."""
        deltas = [{"role": self._role, "content": ""}]
        if self._echo:
            deltas.append({"content": self._echo})
        chunks = []
        for delta in deltas:
            for index in range(self._body.num_completions):
                choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
                extra: dict[str, Any] = {}
                if self._body.return_token_ids and "role" in delta:
                    extra["prompt_token_ids"] = self._generation.prompt_token_ids
                chunks.append(self._chunk(choice, **extra))
        return chunks

    def _stream_choice(self, completion: CompletionOutput, delta: dict[str, Any]) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": completion.index,
            "delta": delta or {"content": ""},
            "logprobs": self._logprobs(completion),
            "finish_reason": self._messages[completion.index].finish_reason(completion),
        }
        if completion.finish_reason is not None:
            choice["stop_reason"] = completion.stop_reason
        if self._body.return_token_ids:
            choice["token_ids"] = completion.token_ids
        return choice

    def _chunk(self, choice: dict[str, Any], **extra: Any) -> bytes:
        chunk = {**self._head, **extra, "choices": [choice]}
        self._usage.stamp(chunk, 0, choice["index"])
        return event(chunk)

    def _count_reasoning(self) -> None:
        if self._parses_reasoning:
            for message in self._messages:
                self._usage.add_reasoning(count_reasoning_tokens(self._tokenizer, message.reasoning))

    def _logprobs(self, completion: CompletionOutput) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(
            completion.token_ids,
            completion.logprobs or [],
            self._body.top_logprobs or 0,
            tokenizer=self._tokenizer,
            as_ids=self._as_ids,
        )

    def _says_something(self, completion: CompletionOutput) -> bool:
        """Whether a chunk without text is worth sending: text may be held back while tokens come."""
        if completion.finish_reason is not None:
            return True
        reports_tokens = self._body.logprobs or self._body.return_token_ids or self._usage.continuous
        return bool(completion.token_ids and reports_tokens)


def _text_of(message: dict[str, Any]) -> str:
    """The text of a message whose content is a string, a list of text parts, or missing."""
    content = message.get("content") or ""
    if isinstance(content, str):
        return content
    return "\n".join(part if isinstance(part, str) else part.get("text", "") for part in content)

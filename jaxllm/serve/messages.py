"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's Messages API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import orjson
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from jaxllm.errors import JaxLLMError
from jaxllm.serve.errors import message_of, response_of, status_of
from jaxllm.serve.messages_protocol import RENAMED, CountTokensRequest, MessagesRequest
from jaxllm.serve.state import ServerState
from jaxllm.serve.streaming import (
    CLIENT_CLOSED_REQUEST,
    EventStream,
    closing_on_disconnect,
    named_event,
)
from jaxllm.serve.tools import NamedToolChoice
from jaxllm.serve.turn import Turn, TurnReader, chat_request, in_terms_of, render_turn, start_turn
from jaxllm.text.parsers.message import MessageDelta

_ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    503: "overloaded_error",
}


def anthropic_error(status: int, message: str) -> dict[str, Any]:
    """An error as Anthropic writes it."""
    kind = _ERROR_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": message}}


def in_anthropic_words(response: Response) -> Response:
    """An error of ours as Anthropic writes it, with the same status and headers."""
    message = orjson.loads(bytes(response.body))["error"]["message"]
    body = orjson.dumps(anthropic_error(response.status_code, message))
    headers = {k: v for k, v in response.headers.items() if k not in ("content-length", "content-type")}
    return Response(body, response.status_code, media_type="application/json", headers=headers)


def anthropic_error_response(error: BaseException) -> Response:
    """An exception as a response."""
    return in_anthropic_words(response_of(error))


async def create_message(state: ServerState, body: MessagesRequest, http: HTTPRequest) -> Response:
    """Write the next message of a conversation, in one JSON object or as a stream of events."""
    state.check_model(body.model)
    public_id = state.public_id("msg", body, http)
    chat = chat_request(body.chat_fields(), RENAMED)
    try:
        turn = await start_turn(state, chat, public_id)
    except JaxLLMError as error:
        raise in_terms_of(error, RENAMED) from error
    writer = _Writer(state, turn, public_id)
    close = turn.generation.stream.close
    if body.stream:
        return EventStream(
            writer.events(),
            close,
            end=b"",
            failure=lambda error: named_event(anthropic_error(int(status_of(error)), message_of(error))),
            refusal=anthropic_error_response,
        )
    try:
        async with closing_on_disconnect(http.receive, close):
            async for _ in writer.events():
                pass
            if not writer.is_finished:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            return Response(orjson.dumps(writer.message()), media_type="application/json")
    finally:
        close()


async def count_tokens(state: ServerState, body: CountTokensRequest) -> Response:
    """How many tokens a conversation comes to."""
    state.check_model(body.model)
    chat = chat_request(body.chat_fields(), RENAMED)
    text = await render_turn(state, chat)
    ids = await state.engine.run_in_thread(
        lambda: state.tokenize(text, add_special_tokens=chat.add_special_tokens), num_characters=len(text)
    )
    return Response(orjson.dumps({"input_tokens": len(ids)}), media_type="application/json")


class _Writer:
    """Writes one answer down as a list of blocks, and tells of each change as an event."""

    def __init__(self, state: ServerState, turn: Turn, public_id: str) -> None:
        self._turn = turn
        self._reader = TurnReader(turn)
        self._head = {"id": public_id, "type": "message", "role": "assistant", "model": state.model_names[0]}
        self._blocks: list[dict[str, Any]] = []
        self._arguments: list[str] = []
        self._is_open = False

    @property
    def is_finished(self) -> bool:
        """Whether the answer came to its end."""
        return self._reader.is_finished

    def message(self) -> dict[str, Any]:
        """The whole message."""
        return {**self._head, "content": self._blocks, **self._stop(), "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """The events of the stream; those of one engine step together."""
        begun = False
        async for _, delta in self._reader.deltas():
            changes = []
            if not begun:
                changes.append(self._start())
                begun = True
            changes += self._add(delta)
            if changes:
                yield b"".join(map(named_event, changes))
        if not self.is_finished:
            return
        ending = self._close_block()
        ending.append({"type": "message_delta", "delta": self._stop(), "usage": self._usage()})
        ending.append({"type": "message_stop"})
        yield b"".join(map(named_event, ending))

    def _start(self) -> dict[str, Any]:
        usage = {**self._usage(), "output_tokens": 0}
        nothing: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        return {"type": "message_start", "message": {**self._head, **nothing, "usage": usage}}

    def _add(self, delta: MessageDelta) -> list[dict[str, Any]]:
        changes = []
        if delta.reasoning:
            changes += self._open({"type": "thinking", "thinking": "", "signature": ""})
            self._blocks[-1]["thinking"] += delta.reasoning
            changes.append(self._change({"type": "thinking_delta", "thinking": delta.reasoning}))
        if delta.content:
            changes += self._open({"type": "text", "text": ""})
            self._blocks[-1]["text"] += delta.content
            changes.append(self._change({"type": "text_delta", "text": delta.content}))
        for call in delta.tool_calls:
            if call.name is not None:
                block: dict[str, Any] = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
                changes += self._open(block, anew=True)
            if call.arguments:
                self._arguments.append(call.arguments)
                changes.append(self._change({"type": "input_json_delta", "partial_json": call.arguments}))
        return changes

    def _open(self, block: dict[str, Any], *, anew: bool = False) -> list[dict[str, Any]]:
        """Begin a block, unless one of the kind is open; an open one of another kind is closed first."""
        if self._is_open and not anew and self._blocks[-1]["type"] == block["type"]:
            return []
        changes = self._close_block()
        shown = dict(block)
        self._blocks.append(block)
        self._is_open = True
        changes.append(
            {"type": "content_block_start", "index": len(self._blocks) - 1, "content_block": shown}
        )
        return changes

    def _close_block(self) -> list[dict[str, Any]]:
        if not self._is_open:
            return []
        self._is_open = False
        block = self._blocks[-1]
        if block["type"] == "tool_use":
            block["input"] = _parsed("".join(self._arguments))
            self._arguments = []
        return [{"type": "content_block_stop", "index": len(self._blocks) - 1}]

    def _change(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self._blocks) - 1, "delta": delta}

    def _stop(self) -> dict[str, Any]:
        last = self._reader.last
        reason, sequence = "end_turn", None
        if last is not None and last.finish_reason == "length":
            reason = "max_tokens"
        elif any(block["type"] == "tool_use" for block in self._blocks) or isinstance(
            self._turn.body.chosen_tool, NamedToolChoice
        ):
            reason = "tool_use"
        elif last is not None and isinstance(last.stop_reason, str):
            reason, sequence = "stop_sequence", last.stop_reason
        return {"stop_reason": reason, "stop_sequence": sequence}

    def _usage(self) -> dict[str, int]:
        cached = self._reader.num_cached_tokens
        return {
            "input_tokens": self._turn.num_prompt_tokens - cached,
            "cache_read_input_tokens": cached,
            "cache_creation_input_tokens": 0,
            "output_tokens": self._reader.num_output_tokens,
        }


def _parsed(arguments: str) -> Any:
    """The arguments of a call; what a model was cut off in, or wrote wrongly, is kept as text."""
    try:
        return orjson.loads(arguments) if arguments.strip() else {}
    except orjson.JSONDecodeError:
        return {"raw_arguments": arguments}

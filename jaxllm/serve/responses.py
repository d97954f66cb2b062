"""/v1/responses: OpenAI's Responses API, with a bounded memory of past responses."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from jaxllm.errors import InvalidRequestError, JaxLLMError
from jaxllm.outputs import CompletionOutput
from jaxllm.serve.errors import NotFoundError, message_of
from jaxllm.serve.logprobs import chat_logprobs
from jaxllm.serve.response_items import ResponseItems
from jaxllm.serve.responses_protocol import RENAMED, ResponsesRequest, messages_of_items
from jaxllm.serve.state import ServerState
from jaxllm.serve.streaming import (
    CLIENT_CLOSED_REQUEST,
    EventStream,
    closing_on_disconnect,
    log_unexpected,
    named_event,
)
from jaxllm.serve.turn import Turn, TurnReader, chat_request, in_terms_of, start_turn


@dataclass(slots=True)
class StoredResponse:
    """A response that may be fetched, and gone on from.

    Attributes:
        read: gives the response object as it is now.
        messages: the conversation before it, without instructions.
        cancel: ends the work on it.
    """

    read: Callable[[], dict[str, Any]]
    messages: list[dict[str, Any]]
    cancel: Callable[[], None]
    is_background: bool = False


@dataclass(slots=True)
class ResponseStore:
    """The newest responses by their ids; the oldest go first.

    Attributes:
        size: how many are kept.
    """

    size: int
    _responses: OrderedDict[str, StoredResponse] = field(default_factory=OrderedDict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def __contains__(self, response_id: str) -> bool:
        return response_id in self._responses

    def put(self, response_id: str, stored: StoredResponse) -> None:
        """Keep a response."""
        if self.size:
            self._responses[response_id] = stored
            while len(self._responses) > self.size:
                self._responses.popitem(last=False)

    def get(self, response_id: str, param: str | None = None) -> StoredResponse:
        """A response that was kept.

        Raises:
            NotFoundError: it was not, or has gone.
        """
        stored = self._responses.get(response_id)
        if stored is None:
            raise NotFoundError(
                f"There is no response '{response_id}' here: this server keeps the newest {self.size}"
                " (--response-store-size), unless their requests say 'store': false.",
                param=param,
            )
        return stored

    def delete(self, response_id: str) -> None:
        """Forget a response, and end the work on it."""
        self.get(response_id).cancel()
        del self._responses[response_id]

    def run(self, work: Any) -> None:
        """Work on a response that nobody waits for."""
        task = asyncio.create_task(work)
        self._tasks.add(task)  # An event loop keeps no task alive.
        task.add_done_callback(self._tasks.discard)


async def create_response(
    state: ServerState, store: ResponseStore, body: ResponsesRequest, http: HTTPRequest
) -> Response:
    """Answer an input: in one JSON object, as a stream of events, or in the background."""
    state.check_model(body.model)
    response_id = state.public_id("resp", body, http).replace("-", "_", 1)
    if response_id in store:
        raise InvalidRequestError(
            f"There is a response '{response_id}' already; give another request id, or leave it out.",
            param="request_id",
        )
    if body.background and not store.size:
        raise InvalidRequestError(
            "Field 'background' is true, and this server keeps no responses (--response-store-size 0).",
            param="background",
        )
    before: list[dict[str, Any]] = []
    if body.previous_response_id is not None:
        previous = store.get(body.previous_response_id, "previous_response_id")
        answer = previous.read()
        if answer["status"] == "in_progress":
            raise InvalidRequestError(
                f"Field 'previous_response_id' is '{body.previous_response_id}', which is still in progress.",
                param="previous_response_id",
            )
        before = [*previous.messages, *messages_of_items(answer["output"])]
    chat = chat_request(body.chat_fields(before), RENAMED)
    try:
        turn = await start_turn(state, chat, response_id)
    except JaxLLMError as error:
        raise in_terms_of(error, RENAMED) from error
    writer = _Writer(state, body, turn, response_id)
    if body.store is not False:
        messages = [*before, *body.input_messages()]
        store.put(
            response_id, StoredResponse(writer.response, messages, writer.cancel, bool(body.background))
        )
    close = turn.generation.stream.close
    if body.stream:
        return EventStream(writer.stream(), writer.leave, end=b"")
    if body.background:
        store.run(writer.write())
        return _json(writer.response())
    try:
        async with closing_on_disconnect(http.receive, close):
            async for _ in writer.events():
                pass
            if not writer.is_finished:
                return Response(status_code=CLIENT_CLOSED_REQUEST)
            return _json(writer.response())
    finally:
        writer.leave()


async def retrieve_response(store: ResponseStore, response_id: str, query: Mapping[str, str]) -> Response:
    """A response as it is now."""
    for name in query:
        raise InvalidRequestError(
            f"Parameter '{name}' is not supported: a response is fetched as it is, and fetched again.",
            param=name,
        )
    return _json(store.get(response_id).read())


async def cancel_response(store: ResponseStore, response_id: str) -> Response:
    """End the work on a response that runs in the background."""
    stored = store.get(response_id)
    if not stored.is_background:
        raise InvalidRequestError(
            f"The response '{response_id}' was not made in the background; only those can be cancelled."
            " Close the connection instead."
        )
    stored.cancel()
    return _json(stored.read())


async def delete_response(store: ResponseStore, response_id: str) -> Response:
    """Forget a response."""
    store.delete(response_id)
    return _json({"id": response_id, "object": "response", "deleted": True})


class _Writer:
    """Writes one answer down as a response, and tells of each change as an event."""

    def __init__(self, state: ServerState, body: ResponsesRequest, turn: Turn, response_id: str) -> None:
        self._body = body
        self._turn = turn
        self._tokenizer = state.tokenizer
        self._as_ids = state.config.return_tokens_as_token_ids
        self._reader = TurnReader(turn)
        self._items = ResponseItems()
        self._status = "in_progress"
        self._error: dict[str, Any] | None = None
        self._sequence_number = 0
        self._head = {
            "id": response_id,
            "object": "response",
            "created_at": int(time.time()),
            "model": state.model_names[0],
        }

    @property
    def is_finished(self) -> bool:
        """Whether the answer came to its end."""
        return self._reader.is_finished

    def response(self) -> dict[str, Any]:
        """The response object as it is now."""
        body = self._body
        is_incomplete = self._status == "incomplete"
        text = None if body.text is None else body.text.model_dump(by_alias=True, exclude_none=True)
        choice = body.tool_choice
        return {
            **self._head,
            "status": self._status,
            "background": bool(body.background),
            "error": self._error,
            "incomplete_details": {"reason": "max_output_tokens"} if is_incomplete else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "output": list(self._items.items),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "reasoning": None if body.reasoning is None else body.reasoning.model_dump(),
            "service_tier": "default",
            "store": body.store is not False,
            "temperature": body.temperature,
            "text": text or {"format": {"type": "text"}},
            "tool_choice": choice.model_dump()
            if choice and not isinstance(choice, str)
            else choice or "auto",
            "tools": [tool.model_dump(exclude_none=True) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": body.top_p,
            "truncation": body.truncation or "disabled",
            "usage": None if self._status == "in_progress" else self._usage(),
            "user": body.user,
        }

    async def stream(self) -> AsyncIterator[bytes]:
        """The events as they are sent; an answer that fails ends in an event that says so."""
        try:
            async for events in self.events():
                yield b"".join(map(named_event, events))
        except Exception as error:
            if not self._sequence_number:
                raise  # Nothing was sent yet: an ordinary error response says it.
            self._fail(error)
            yield named_event(self._numbered({"type": "response.failed", "response": self.response()}))

    async def write(self) -> None:
        """Write all of it with nobody watching."""
        try:
            async for _ in self.events():
                pass
        except Exception as error:
            self._fail(error)

    async def events(self) -> AsyncIterator[list[dict[str, Any]]]:
        """Lists of events, one for each engine step that brought any.

        Raises:
            GenerationError: the engine gave up.
        """
        begun = False
        async for completion, delta in self._reader.deltas():
            changes: list[dict[str, Any]] = []
            if not begun:
                now = self.response()
                changes += [
                    {"type": f"response.{what}", "response": now} for what in ("created", "in_progress")
                ]
                begun = True
            changes += self._items.add(delta, self._logprobs(completion))
            if changes:
                yield [self._numbered(change) for change in changes]
        if not self.is_finished or self._status == "cancelled":
            return
        last = self._reader.last
        is_cut = last is not None and last.finish_reason == "length"
        ending = self._items.close("incomplete" if is_cut else "completed")
        self._status = "incomplete" if is_cut else "completed"
        ending.append({"type": f"response.{self._status}", "response": self.response()})
        yield [self._numbered(change) for change in ending]

    def cancel(self) -> None:
        """End the work, unless it is done."""
        if self._status == "in_progress":
            self._status = "cancelled"
            self._items.close("incomplete")
            self._turn.generation.stream.close()

    def leave(self) -> None:
        """The client is gone, or has everything."""
        self.cancel()
        self._turn.generation.stream.close()

    def _fail(self, error: Exception) -> None:
        log_unexpected(error)
        self._items.close("incomplete")
        self._status = "failed"
        self._error = {"code": "server_error", "message": message_of(error)}

    def _numbered(self, change: dict[str, Any]) -> dict[str, Any]:
        numbered = {**change, "sequence_number": self._sequence_number}
        self._sequence_number += 1
        return numbered

    def _logprobs(self, completion: CompletionOutput) -> list[dict[str, Any]]:
        if not self._body.wants_logprobs:
            return []
        entries: list[dict[str, Any]] = chat_logprobs(
            completion.token_ids,
            completion.logprobs or [],
            self._body.top_logprobs or 0,
            tokenizer=self._tokenizer,
            as_ids=self._as_ids,
        )["content"]
        return entries

    def _usage(self) -> dict[str, Any]:
        reader, prompt = self._reader, self._turn.num_prompt_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": reader.num_cached_tokens},
            "output_tokens": reader.num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": reader.num_reasoning_tokens(self._tokenizer)},
            "total_tokens": prompt + reader.num_output_tokens,
        }


def _json(data: Any) -> Response:
    return Response(orjson.dumps(data), media_type="application/json")

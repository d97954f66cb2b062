"""The body of OpenAI's Responses API, and the chat that it comes to."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from jaxllm.errors import InvalidRequestError
from jaxllm.serve.body import Body, refusal

# From the fields of a chat to those of a response.
RENAMED = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text",
    "reasoning_effort": "reasoning",
}

LOGPROBS = "message.output_text.logprobs"


class ResponseTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponseToolChoice(Body):
    """The function that must be called."""

    type: Literal["function"]
    name: str


class TextFormat(Body):
    """The form of the answer: text, JSON, or JSON of a schema."""

    model_config = ConfigDict(populate_by_name=False)

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    json_schema: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise refusal(
                "Field 'text.format' has a 'schema' if its type is json_schema, and only then.", "text"
            )
        return self


class TextConfig(Body):
    """How the answer is written."""

    format: TextFormat | None = None


class Reasoning(Body):
    """How much the model shall think first; its reasoning is given as it is, and never summarised."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: Literal["auto"] | None = None


class ResponseStreamOptions(Body):
    """What a stream carries besides."""

    include_obfuscation: Literal[False] | None = None


class ResponsesRequest(Body):
    """POST /v1/responses."""

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = True
    background: bool | None = False
    stream: bool | None = False
    stream_options: ResponseStreamOptions | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[str, float] | None = None
    top_logprobs: Annotated[int, Field(ge=0)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    parallel_tool_calls: bool | None = None
    truncation: Literal["auto", "disabled"] | None = "disabled"
    chat_template_kwargs: dict[str, Any] | None = None
    priority: int | None = None
    cache_salt: str | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=256)] = Field(
        default_factory=lambda: uuid.uuid4().hex
    )
    # Given back with the response; no output depends on them.
    metadata: dict[str, str] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _check_together(self) -> ResponsesRequest:
        if self.background and self.stream:
            raise refusal("Fields 'background' and 'stream' exclude each other here.", "background")
        if self.background and self.store is False:
            raise refusal("Field 'background' needs 'store': the response is fetched from there.", "store")
        if self.stream_options is not None and not self.stream:
            raise refusal("Field 'stream_options' is only allowed with 'stream': true.", "stream_options")
        if self.top_logprobs and not self.wants_logprobs:
            raise refusal(f"Field 'top_logprobs' needs 'include': ['{LOGPROBS}'].", "top_logprobs")
        return self

    @property
    def wants_logprobs(self) -> bool:
        """Whether the text comes with log-probabilities."""
        return LOGPROBS in (self.include or ())

    def chat_fields(self, before: list[dict[str, Any]]) -> dict[str, Any]:
        """The fields of the chat that this is.

        Args:
            before: messages that it goes on from.

        Raises:
            InvalidRequestError: an item of the input that is not served.
        """
        messages = [*before, *self.input_messages()]
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        fields: dict[str, Any] = {
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "logprobs": self.wants_logprobs or None,
            "top_logprobs": self.top_logprobs,
            "reasoning_effort": None if self.reasoning is None else self.reasoning.effort,
            "tools": [_chat_tool(tool) for tool in self.tools] if self.tools else None,
            "tool_choice": self.tool_choice,
        }
        if isinstance(self.tool_choice, ResponseToolChoice):
            fields["tool_choice"] = {"type": "function", "function": {"name": self.tool_choice.name}}
        if self.text is not None and self.text.format is not None:
            fields["response_format"] = _response_format(self.text.format)
        if self.truncation == "auto":
            fields["truncate_prompt_tokens"] = -1
        for name in _SAME:
            fields[name] = getattr(self, name)
        return fields

    def input_messages(self) -> list[dict[str, Any]]:
        """The input as messages of a chat."""
        if isinstance(self.input, str):
            return [{"role": "user", "content": self.input}]
        return messages_of_items(self.input)


_SAME = (
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "ignore_eos",
    "logit_bias",
    "parallel_tool_calls",
    "chat_template_kwargs",
    "priority",
    "cache_salt",
    "request_id",
)


def messages_of_items(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Input or output items as messages of a chat.

    What a model did in one turn (its reasoning, its words, its calls) is one message.

    Raises:
        InvalidRequestError: an item of a type that is not served.
    """
    messages: list[dict[str, Any]] = []

    def assistant() -> dict[str, Any]:
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        return messages[-1]

    for index, item in enumerate(items):
        where = f"input[{index}]"
        kind = item.get("type", "message" if "role" in item else None)
        if kind == "message":
            role = _string(item, "role", where)
            content = item.get("content")
            if role == "assistant":
                message = assistant()
                if message["content"] is not None or message.get("tool_calls"):
                    message = {"role": "assistant"}
                    messages.append(message)
                message["content"] = content
            else:
                messages.append({"role": "system" if role == "developer" else role, "content": content})
        elif kind == "function_call":
            function = {
                "name": _string(item, "name", where),
                "arguments": _string(item, "arguments", where),
            }
            call = {"id": _string(item, "call_id", where), "type": "function", "function": function}
            assistant().setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = item.get("output")
            messages.append(
                {"role": "tool", "tool_call_id": _string(item, "call_id", where), "content": output}
            )
        elif kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            texts = [part.get("text", "") for part in parts if isinstance(part, dict)]
            if not messages or messages[-1]["role"] != "assistant" or messages[-1]["content"] is not None:
                messages.append({"role": "assistant", "content": None})
            messages[-1]["reasoning_content"] = "\n".join(texts)
        else:
            raise InvalidRequestError(
                f"Field '{where}' has type {kind!r}: message, function_call, function_call_output and"
                " reasoning are served.",
                param="input",
            )
    return messages


def _string(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise InvalidRequestError(f"Field '{where}.{name}' must be a string; got {value!r}.", param="input")
    return value


def _chat_tool(tool: ResponseTool) -> dict[str, Any]:
    function = tool.model_dump(exclude={"type"}, exclude_none=True)
    return {"type": "function", "function": function}


def _response_format(form: TextFormat) -> dict[str, Any]:
    if form.type != "json_schema":
        return {"type": form.type}
    schema: dict[str, Any] = {"name": form.name or "answer", "schema": form.json_schema}
    if form.strict is not None:
        schema["strict"] = form.strict
    if form.description is not None:
        schema["description"] = form.description
    return {"type": "json_schema", "json_schema": schema}

"""The bodies of Anthropic's Messages API, and the chats that they come to."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

import orjson
from pydantic import ConfigDict, Field, model_validator

from jaxllm.errors import InvalidRequestError
from jaxllm.serve.body import Body, refusal

# From the fields of a chat to those of a message.
RENAMED = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "parallel_tool_calls": "tool_choice",
    "chat_template_kwargs": "thinking",
    "thinking_token_budget": "thinking",
}


class Block(Body):
    """A part of a message. Marks of what to cache are taken: prefixes are cached without being asked."""

    type: Literal["text", "tool_use", "tool_result", "thinking", "redacted_thinking"]
    text: str | None = None
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None
    tool_use_id: str | None = None
    content: str | list[dict[str, Any]] | None = None
    is_error: bool | None = None
    thinking: str | None = None
    signature: str | None = None
    data: str | None = None
    cache_control: dict[str, Any] | None = None
    citations: Annotated[list[Any], Field(max_length=0)] | None = None
    caller: dict[str, Any] | None = None


class Message(Body):
    """What somebody said."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class MessageTool(Body):
    """A function that the model may call."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    type: Literal["custom"] | None = None
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None


class MessageToolChoice(Body):
    """Whether a tool must be called, and which."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Body):
    """Whether the model shall think first, and for how many tokens at most."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _check_budget(self) -> Thinking:
        if (self.budget_tokens is None) == (self.type == "enabled"):
            rule = "needs 'budget_tokens'" if self.budget_tokens is None else "takes no 'budget_tokens'"
            raise refusal(f"Field 'thinking' is '{self.type}', which {rule}.", "thinking")
        return self


class Format(Body):
    """A JSON schema that the answer must match."""

    # Pydantic has a method of the field's name.
    model_config = ConfigDict(populate_by_name=False)

    type: Literal["json_schema"]
    json_schema: Annotated[dict[str, Any], Field(alias="schema")]


class OutputConfig(Body):
    """The form of the answer."""

    format: Format | None = None


class Metadata(Body):
    """Who asks; for the caller's own bookkeeping."""

    user_id: str | None = None


class CountTokensRequest(Body):
    """POST /v1/messages/count_tokens."""

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    system: str | list[Block] | None = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def chat_fields(self) -> dict[str, Any]:
        """The fields of the chat that this is.

        Raises:
            InvalidRequestError: blocks that do not fit their message.
        """
        fields: dict[str, Any] = {"messages": self._messages(), "chat_template_kwargs": self._kwargs()}
        if self.thinking is not None:
            fields["thinking_token_budget"] = self.thinking.budget_tokens
        if self.tools:
            fields["tools"] = [_tool(tool) for tool in self.tools]
        if self.tool_choice is not None:
            choice = self.tool_choice
            if choice.type == "tool":
                fields["tool_choice"] = {"type": "function", "function": {"name": choice.name or ""}}
            else:
                fields["tool_choice"] = {"any": "required"}.get(choice.type, choice.type)
            if choice.disable_parallel_tool_use:
                fields["parallel_tool_calls"] = False
        if self.output_config is not None and self.output_config.format is not None:
            schema = {"name": "answer", "schema": self.output_config.format.json_schema}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields

    def _kwargs(self) -> dict[str, Any] | None:
        if self.thinking is None:
            return self.chat_template_kwargs
        # What templates of models that think call it.
        return {"enable_thinking": self.thinking.type != "disabled", **(self.chat_template_kwargs or {})}

    def _messages(self) -> list[dict[str, Any]]:
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": _texts(self.system, "system")})
        for index, message in enumerate(self.messages):
            where = f"messages[{index}]"
            if isinstance(message.content, str):
                messages.append({"role": message.role, "content": message.content})
            elif message.role == "assistant":
                messages.append(_assistant(message.content, where))
            else:
                messages += _user(message.role, message.content, where)
        return messages


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    stop_sequences: list[str] | None = None
    stream: bool | None = False
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: int | None = None
    top_p: float | None = None
    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    priority: int = 0
    cache_salt: str | None = None
    request_id: Annotated[str, Field(min_length=1, max_length=256)] = Field(
        default_factory=lambda: uuid.uuid4().hex
    )

    def chat_fields(self) -> dict[str, Any]:
        """See `CountTokensRequest`."""
        return {
            **super().chat_fields(),
            "max_completion_tokens": self.max_tokens,
            "stop": self.stop_sequences,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "priority": self.priority,
            "cache_salt": self.cache_salt,
            "request_id": self.request_id,
        }


def _tool(tool: MessageTool) -> dict[str, Any]:
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.input_schema,
        "strict": tool.strict,
    }
    return {"type": "function", "function": {k: v for k, v in function.items() if v is not None}}


def _assistant(blocks: list[Block], where: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant"}
    texts, thoughts, calls = [], [], []
    for i, block in enumerate(blocks):
        if block.type == "text":
            texts.append(_given(block.text, f"{where}.content[{i}].text"))
        elif block.type == "thinking":
            thoughts.append(_given(block.thinking, f"{where}.content[{i}].thinking"))
        elif block.type == "tool_use":
            name = _given(block.name, f"{where}.content[{i}].name")
            arguments = orjson.dumps(block.input or {}).decode()
            function = {"name": name, "arguments": arguments}
            calls.append({"id": block.id or name, "type": "function", "function": function})
        else:
            raise _misplaced(block, where, "assistant")
    if texts or not calls:
        message["content"] = "\n".join(texts)
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _user(role: str, blocks: list[Block], where: str) -> list[dict[str, Any]]:
    """Results of tools each as a message, and the text between them, in order."""
    messages: list[dict[str, Any]] = []
    texts: list[str] = []
    for i, block in enumerate(blocks):
        here = f"{where}.content[{i}]"
        if block.type == "text":
            texts.append(_given(block.text, f"{here}.text"))
        elif block.type == "tool_result" and role == "user":
            if texts:
                messages.append({"role": role, "content": "\n".join(texts)})
                texts = []
            answered = _given(block.tool_use_id, f"{here}.tool_use_id")
            result = block.content if isinstance(block.content, str) else _parts(block.content or [], here)
            messages.append({"role": "tool", "tool_call_id": answered, "content": result})
        else:
            raise _misplaced(block, where, role)
    if texts or not messages:
        messages.append({"role": role, "content": "\n".join(texts)})
    return messages


def _texts(content: str | list[Block], where: str) -> str:
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text":
            raise _misplaced(block, where, "system")
    return "\n".join(_given(block.text, f"{where}[{i}].text") for i, block in enumerate(content))


def _parts(parts: list[dict[str, Any]], where: str) -> str:
    for part in parts:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequestError(
                f"{where}.content holds a part of type {part.get('type')!r}; only text is served.",
                param="messages",
            )
    return "\n".join(part["text"] for part in parts)


def _given(value: str | None, where: str) -> str:
    if value is None:
        raise InvalidRequestError(f"{where} is missing.", param=where.split("[")[0].split(".")[0])
    return value


def _misplaced(block: Block, where: str, role: str) -> InvalidRequestError:
    return InvalidRequestError(
        f"{where} of the role {role} holds a block of type {block.type!r}, which is not served there.",
        param=where.split("[")[0],
    )

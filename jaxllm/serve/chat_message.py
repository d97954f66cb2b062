"""A chat's answer in the fields of the API: content, reasoning and tool calls."""

from __future__ import annotations

from typing import Any

from jaxllm.outputs import CompletionOutput
from jaxllm.serve.protocol import ChatCompletionRequest
from jaxllm.serve.tools import NamedToolChoice
from jaxllm.text.parsers.message import MessageFormat, MessageParser, ToolCallDelta


class ChatMessage:
    """The message of one choice as it grows, in the fields of the API."""

    def __init__(self, how: MessageFormat, body: ChatCompletionRequest) -> None:
        self._parser = MessageParser(how)
        self._shows_reasoning = body.include_reasoning
        self._is_named = isinstance(body.chosen_tool, NamedToolChoice)
        self._content: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self.reasoning: list[str] = []

    def add(self, completion: CompletionOutput) -> dict[str, Any]:
        """Take in what is new of the completion, and tell it as a delta."""
        new = self._parser.feed(completion.text, finished=completion.finish_reason is not None)
        delta: dict[str, Any] = {}
        if new.reasoning:
            self.reasoning.append(new.reasoning)
            if self._shows_reasoning:
                # vLLM's name for it, and the one that it had before, which other servers use.
                delta["reasoning"] = delta["reasoning_content"] = new.reasoning
        if new.content:
            self._content.append(new.content)
            delta["content"] = new.content
        if new.tool_calls:
            delta["tool_calls"] = [self._add_call(call) for call in new.tool_calls]
        return delta

    def _add_call(self, new: ToolCallDelta) -> dict[str, Any]:
        if new.name is None:
            self._calls[new.index]["function"]["arguments"] += new.arguments
            return {"index": new.index, "function": {"arguments": new.arguments}}
        function = {"name": new.name, "arguments": new.arguments}
        self._calls.append({"id": new.id, "type": "function", "function": function})
        return {"index": new.index, "id": new.id, "type": "function", "function": dict(function)}

    def whole(self, echo: str) -> dict[str, Any]:
        """All of the message, behind the text that is echoed."""
        content = echo + "".join(self._content)
        nothing_said = not content and (self._calls or self.reasoning)
        message: dict[str, Any] = {"content": None if nothing_said else content, "refusal": None}
        if self.reasoning and self._shows_reasoning:
            message["reasoning"] = message["reasoning_content"] = "".join(self.reasoning)
        if self._calls:
            message["tool_calls"] = self._calls
        return message

    def finish_reason(self, completion: CompletionOutput) -> str | None:
        """Why the choice ended: for calls that the model chose to make, these."""
        if completion.finish_reason == "stop" and self._calls and not self._is_named:
            return "tool_calls"
        return completion.finish_reason

"""A response as it grows: its output items, and the event that tells of each change."""

from __future__ import annotations

import uuid
from typing import Any

from jaxllm.text.parsers.message import MessageDelta, ToolCallDelta


class ResponseItems:
    """The output of one response.

    Attributes:
        items: reasoning, messages and function calls, in the order in which they came.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._is_open = False
        self._logprobs: list[dict[str, Any]] = []

    def add(self, delta: MessageDelta, logprobs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Take in what is new, and tell it as events.

        Args:
            logprobs: of the tokens that brought it; they go with the next words of the answer.
        """
        events: list[dict[str, Any]] = []
        self._logprobs += logprobs
        if delta.reasoning:
            events += self._open_text("reasoning")
            events.append(self._extend("response.reasoning_text.delta", delta.reasoning))
        if delta.content:
            events += self._open_text("message")
            part = self.items[-1]["content"][0]
            part["logprobs"] += self._logprobs
            news = self._extend("response.output_text.delta", delta.content)
            events.append({**news, "logprobs": self._logprobs})
            self._logprobs = []
        for call in delta.tool_calls:
            events += self._add_call(call)
        return events

    def close(self, status: str = "completed") -> list[dict[str, Any]]:
        """End the item that is open."""
        if not self._is_open:
            return []
        self._is_open = False
        item = self.items[-1]
        item["status"] = status
        place = {"item_id": item["id"], "output_index": len(self.items) - 1}
        events: list[dict[str, Any]] = []
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            events.append({"type": "response.function_call_arguments.done", **place, **done})
        else:
            part = item["content"][0]
            kind = "reasoning_text" if item["type"] == "reasoning" else "output_text"
            done = {"content_index": 0, "text": part["text"]}
            if "logprobs" in part:
                done["logprobs"] = part["logprobs"]
            events.append({"type": f"response.{kind}.done", **place, **done})
            events.append({"type": "response.content_part.done", **place, "content_index": 0, "part": part})
        events.append(
            {"type": "response.output_item.done", "output_index": place["output_index"], "item": item}
        )
        return events

    def _extend(self, kind: str, text: str) -> dict[str, Any]:
        item = self.items[-1]
        item["content"][0]["text"] += text
        place = {"item_id": item["id"], "output_index": len(self.items) - 1, "content_index": 0}
        return {"type": kind, **place, "delta": text}

    def _open_text(self, kind: str) -> list[dict[str, Any]]:
        if self._is_open and self.items[-1]["type"] == kind:
            return []
        if kind == "reasoning":
            item: dict[str, Any] = {"id": _new_id("rs"), "type": "reasoning", "summary": [], "content": []}
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        else:
            item = {"id": _new_id("msg"), "type": "message", "role": "assistant", "content": []}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        events = self._open(item)
        item["content"] = [part]
        place = {"item_id": item["id"], "output_index": len(self.items) - 1, "content_index": 0}
        # A copy: what it holds now is what the event says, whenever it is written down.
        shown = {**part, "logprobs": []} if "logprobs" in part else dict(part)
        return [*events, {"type": "response.content_part.added", **place, "part": shown}]

    def _add_call(self, new: ToolCallDelta) -> list[dict[str, Any]]:
        events: list[dict[str, Any]] = []
        item: dict[str, Any]
        if new.name is not None:
            item = {"id": _new_id("fc"), "type": "function_call", "call_id": new.id}
            events += self._open({**item, "name": new.name, "arguments": ""})
        if new.arguments:
            item = self.items[-1]
            item["arguments"] += new.arguments
            place = {"item_id": item["id"], "output_index": len(self.items) - 1}
            events.append({"type": "response.function_call_arguments.delta", **place, "delta": new.arguments})
        return events

    def _open(self, item: dict[str, Any]) -> list[dict[str, Any]]:
        events = self.close()
        item["status"] = "in_progress"
        self.items.append(item)
        self._is_open = True
        return [
            *events,
            {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": dict(item)},
        ]


def _new_id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"

"""One answer of a chat, for every API that has chats: the conversation in, the parts of a message out."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from jaxllm.errors import InvalidRequestError, UnsupportedError
from jaxllm.outputs import CompletionOutput
from jaxllm.serve.body import Refusal
from jaxllm.serve.errors import describe_validation
from jaxllm.serve.protocol import ChatCompletionRequest
from jaxllm.serve.state import Generation, PromptInput, ServerState, start_generations
from jaxllm.serve.streaming import merge
from jaxllm.text.parsers.message import MessageFormat, MessageParser
from jaxllm.text.parsers.reasoning import count_reasoning_tokens


@dataclass(frozen=True, slots=True)
class Turn:
    """An answer that the engine works on.

    Attributes:
        how: how the answer is to be read.
    """

    body: ChatCompletionRequest
    generation: Generation
    how: MessageFormat

    @property
    def num_prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.generation.prompt_token_ids)


async def render_turn(state: ServerState, body: ChatCompletionRequest) -> str:
    """The prompt text of a conversation.

    Raises:
        InvalidRequestError: it does not fit the chat template, or needs a parser that is not here.
    """
    state.parsers.check(body)
    return await state.engine.run_in_thread(
        state.render_chat,
        body.messages,
        chat_template=body.chat_template,
        add_generation_prompt=body.add_generation_prompt,
        continue_final_message=body.continue_final_message,
        chat_template_kwargs=body.chat_template_kwargs,
        documents=body.documents,
        tools=_tools_shown(state, body),
        reasoning_effort=body.reasoning_effort,
    )


async def start_turn(state: ServerState, body: ChatCompletionRequest, public_id: str) -> Turn:
    """Render a conversation and submit it to the engine."""
    text = await render_turn(state, body)
    prompt = PromptInput(text=text, add_special_tokens=body.add_special_tokens)
    demands = state.parsers.demands_of(body, text, state.tokenizer)
    generations = await start_generations(state, body, [prompt], public_id, demands)
    return Turn(body, generations[0], state.parsers.format_of(body, text))


def _tools_shown(state: ServerState, body: ChatCompletionRequest) -> list[dict[str, Any]] | None:
    """The tools as the template shows them to the model."""
    if not body.tools or (body.chosen_tool == "none" and state.config.exclude_tools_when_tool_choice_none):
        return None
    return [tool.model_dump(exclude_unset=True) for tool in body.tools]


class TurnReader:
    """Reads the one completion of a turn, and counts what a usage object wants.

    Attributes:
        last: the newest output; None before there is one.
        num_output_tokens: written so far.
        num_cached_tokens: of the prompt, found in the prefix cache.
    """

    def __init__(self, turn: Turn) -> None:
        self.parser = MessageParser(turn.how)
        self.last: CompletionOutput | None = None
        self.num_output_tokens = 0
        self.num_cached_tokens = 0
        self._turn = turn
        self._reasoning: list[str] = []

    async def deltas(self) -> AsyncIterator[tuple[CompletionOutput, Any]]:
        """Each output with what it adds to the message.

        Raises:
            GenerationError: the engine gave up.
        """
        async for _, output in merge([self._turn.generation]):
            self.num_cached_tokens = output.num_cached_tokens or self.num_cached_tokens
            for completion in output.outputs:
                self.last = completion
                self.num_output_tokens += len(completion.token_ids)
                finished = completion.finish_reason is not None
                delta = self.parser.feed(completion.text, finished=finished)
                if delta.reasoning:
                    self._reasoning.append(delta.reasoning)
                yield completion, delta

    @property
    def is_finished(self) -> bool:
        """Whether the answer came to an end; otherwise its client went away."""
        return self.last is not None and self.last.finish_reason is not None

    def num_reasoning_tokens(self, tokenizer: Any) -> int:
        """How many of the output tokens were reasoning."""
        return count_reasoning_tokens(tokenizer, self._reasoning)


def chat_request(fields: Mapping[str, Any], renamed: Mapping[str, str]) -> ChatCompletionRequest:
    """The chat that a body of another API comes to; fields that are None are left out.

    Args:
        renamed: from the names of a chat's fields to those of the other API, for messages of errors.

    Raises:
        InvalidRequestError, UnsupportedError: in the other API's words.
    """
    try:
        return ChatCompletionRequest(**{name: value for name, value in fields.items() if value is not None})
    except Refusal as refused:
        raise in_terms_of(refused.error, renamed) from refused
    except ValidationError as error:
        message, param = describe_validation(error.errors(), list(ChatCompletionRequest.model_fields))
        raise in_terms_of(InvalidRequestError(message, param=param), renamed) from error


def in_terms_of(error: Exception, renamed: Mapping[str, str]) -> Exception:
    """The same error with the names of another API's fields."""
    if not isinstance(error, InvalidRequestError | UnsupportedError):
        return error
    message, param = str(error), getattr(error, "param", None)
    for ours, theirs in renamed.items():
        message = message.replace(f"'{ours}'", f"'{theirs}'")
        if param is not None and param.split(".")[0].split("[")[0] == ours:
            param = theirs
    return InvalidRequestError(message, param=param)

"""What the reasoning of a model asks of its generation, offline, where nobody reads the output."""

from __future__ import annotations

from typing import Any

from jaxllm.errors import ConfigError, InvalidRequestError
from jaxllm.inputs import PromptType, split_prompt
from jaxllm.sampling_params import SamplingParams
from jaxllm.text.parsers.reasoning import REASONING_FORMATS
from jaxllm.text.thinking import ThinkingBudget

# The end of a prompt, in tokens, that is searched for a mark of reasoning.
_TAIL = 64


class Reasoner:
    """Where a model's reasoning begins and ends: for `thinking_token_budget`, and for forms of the answer.

    Args:
        name: of a reasoning parser, such as "qwen3"; None is a model that does not reason.

    Raises:
        ConfigError: there is no such parser.
    """

    def __init__(self, name: str | None) -> None:
        if name is not None and name not in REASONING_FORMATS:
            raise ConfigError(
                f"reasoning_parser={name!r} is unknown; there are {', '.join(sorted(REASONING_FORMATS))}.",
                param="reasoning_parser",
            )
        self._name = name

    def of(
        self, prompt: PromptType, params: SamplingParams, tokenizer: Any
    ) -> tuple[tuple[int, ...], ThinkingBudget | None]:
        """Token ids behind which the answer to a prompt begins (none: at once), and the bound before it.

        Raises:
            InvalidRequestError: the prompt is none, or the reasoning about it cannot be bounded.
        """
        budget = None if params.thinking_token_budget == -1 else params.thinking_token_budget
        if self._name is None or (budget is None and params.structured_outputs is None):
            return (), None
        if tokenizer is None:
            raise InvalidRequestError(
                f"reasoning_parser={self._name!r} needs a tokenizer for thinking_token_budget and "
                "structured_outputs, and this engine runs without one (skip_tokenizer_init).",
                param="structured_outputs" if budget is None else "thinking_token_budget",
            )
        text, token_ids, _ = split_prompt(prompt)
        if text is None:
            assert token_ids is not None  # One of the two is there.
            text = str(tokenizer.decode(list(token_ids[-_TAIL:]), skip_special_tokens=False))
        form = REASONING_FORMATS[self._name]
        after = form.answer_after(text, tokenizer)
        if budget is None:
            return after, None
        thinking = form.bound(budget, text, tokenizer)
        if thinking is None:
            raise InvalidRequestError(
                f"thinking_token_budget={budget} cannot be held under reasoning_parser={self._name!r}, which "
                "has no mark of its end alone. Bound the whole output with max_tokens.",
                param="thinking_token_budget",
            )
        return after, thinking

"""The forms in which a user may give a prompt, and the one form behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NotRequired, TypeAlias, TypedDict, TypeGuard

from jaxllm.errors import InvalidRequestError


class TextPrompt(TypedDict):
    """A prompt as text, to be tokenized.

    Attributes:
        cache_salt: the prefix cache is shared only between prompts of the same salt.
    """

    prompt: str
    cache_salt: NotRequired[str | None]


class TokensPrompt(TypedDict):
    """A prompt as token ids.

    Attributes:
        prompt: the text they were made of, returned as `RequestOutput.prompt`; not looked at otherwise.
        cache_salt: the prefix cache is shared only between prompts of the same salt.
    """

    prompt_token_ids: Sequence[int]
    prompt: NotRequired[str | None]
    cache_salt: NotRequired[str | None]


PromptType: TypeAlias = str | Sequence[int] | TextPrompt | TokensPrompt
"""Text, token ids, or a dict with one of them and options."""

_NOT_SERVED = {
    "prompt_embeds": "embeddings as a prompt",
    "multi_modal_data": "images, audio and video",
    "multi_modal_uuids": "images, audio and video",
    "mm_processor_kwargs": "images, audio and video",
    "media_io_kwargs": "images, audio and video",
    "encoder_prompt": "encoder-decoder models",
    "decoder_prompt": "encoder-decoder models",
    "token_type_ids": "token types",
}
_KNOWN = ("prompt", "prompt_token_ids", "cache_salt")


def as_prompt_list(prompts: PromptType | Sequence[PromptType]) -> Sequence[PromptType]:
    """One prompt or several, as a sequence of prompts. A list of ints is one prompt of token ids.

    Raises:
        InvalidRequestError: `prompts` is neither.
    """
    if isinstance(prompts, str | Mapping):
        return [prompts]  # type: ignore[list-item]
    if isinstance(prompts, bytes) or not hasattr(prompts, "__len__"):
        _refuse_type(prompts)
    if _is_token_ids(prompts):
        return [prompts]
    return list(prompts)  # type: ignore[arg-type]


def split_prompt(prompt: PromptType) -> tuple[str | None, Sequence[int] | None, str | None]:
    """Take a prompt apart into its text, its token ids and its cache salt.

    Returns:
        The text is None where only token ids were given, the ids are None where the text is to be
        tokenized. What the ids hold is not checked here.

    Raises:
        InvalidRequestError: the prompt is of another type, or has fields that are not served.
    """
    if isinstance(prompt, str):
        return prompt, None, None
    if not isinstance(prompt, Mapping):
        if isinstance(prompt, bytes) or not hasattr(prompt, "__len__"):
            _refuse_type(prompt)
        return None, prompt, None
    fields: Mapping[str, Any] = prompt
    for name in fields:
        if fields[name] is not None and name in _NOT_SERVED:
            raise InvalidRequestError(
                f"{name} is not supported yet: {_NOT_SERVED[name]} cannot be served. Give a text prompt "
                "or prompt_token_ids.",
                param=name,
            )
        if name not in _KNOWN and name not in _NOT_SERVED:
            raise InvalidRequestError(
                f"a prompt has no field {name!r}; it has {', '.join(_KNOWN)}.", param=str(name)
            )
    text, token_ids, salt = (fields.get(name) for name in _KNOWN)
    if text is None and token_ids is None:
        raise InvalidRequestError(
            f"a prompt needs 'prompt' or 'prompt_token_ids'; got {sorted(map(str, fields))}.", param="prompt"
        )
    if text is not None and not isinstance(text, str):
        raise InvalidRequestError(f"prompt must be a string; got {type(text).__name__}.", param="prompt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise InvalidRequestError(f"cache_salt must be a non-empty string; got {salt!r}.", param="cache_salt")
    return text, token_ids, salt


def _is_token_ids(prompts: Any) -> TypeGuard[Sequence[int]]:
    """Whether the first element is no prompt by itself; the others are looked at when it is processed."""
    if getattr(prompts, "ndim", None) == 1:
        return True
    return len(prompts) > 0 and not hasattr(next(iter(prompts)), "__len__")


def _refuse_type(prompt: object) -> None:
    raise InvalidRequestError(
        "a prompt must be a string, a list of token ids, or a dict with 'prompt' or 'prompt_token_ids'; "
        f"got {type(prompt).__name__}.",
        param="prompt",
    )

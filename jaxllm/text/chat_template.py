"""From chat messages to the prompt text, by the model's Jinja chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

from jaxllm.errors import ConfigError, InvalidRequestError, UnsupportedError
from jaxllm.text.template_inspection import template_variables, wants_content_parts

ContentFormat = Literal["auto", "string", "openai"]
"""How a template wants the content of a message: as a string, or as a list of typed parts."""

# Part types of the chat API that carry text, and the field that holds it.
_TEXT_FIELDS = {
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
    "thinking": "thinking",
}


def render_chat(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    chat_template: str | None = None,
    content_format: ContentFormat = "auto",
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    reasoning_effort: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> str:
    """The prompt text of a conversation.

    Args:
        tokenizer: of Hugging Face; holds the chat template unless one is given.
        messages: OpenAI chat messages: `role`, and `content` as a string or a list of text parts.
        chat_template: Jinja source, or the name of one of the tokenizer's templates.
        content_format: "openai" hands lists of parts to the template, "string" joins them with
            newlines, "auto" looks at the template.
        add_generation_prompt: end with what begins an assistant's answer.
        continue_final_message: leave the last message open, for the model to go on with it.
        tools: OpenAI tool definitions, for templates that know tools.
        documents: for templates that know retrieval.
        reasoning_effort: for templates that know it, or one of `enable_thinking` and
            `thinking`, which "none" makes false.
        chat_template_kwargs: more variables for the template.

    Raises:
        InvalidRequestError: malformed messages, no template, or the template refuses the conversation.
        UnsupportedError: a part of a message is not text.
        ConfigError: `content_format` is unknown.
    """
    if content_format not in get_args(ContentFormat):
        raise ConfigError(
            f"chat_template_content_format={content_format!r}; it must be one of auto, string, openai.",
            param="chat_template_content_format",
        )
    if continue_final_message and add_generation_prompt:
        raise InvalidRequestError(
            "continue_final_message and add_generation_prompt are both true: the first leaves the last "
            "message open, the second begins a new one. Set one of them to false.",
            param="continue_final_message",
        )
    extra = dict(chat_template_kwargs or {})
    for name in ("messages", "conversation", "chat_template", "tokenize", "return_dict"):
        if name in extra:
            raise InvalidRequestError(
                f"chat_template_kwargs may not hold {name!r}; it is for variables of the template's own.",
                param="chat_template_kwargs",
            )
    template = _resolve_template(tokenizer, chat_template, with_tools=bool(tools))
    as_parts = content_format == "openai" or (content_format == "auto" and wants_content_parts(template))
    known = template_variables(template)
    tool_list = _plain_list("tools", tools)
    if tool_list and known is not None and "tools" not in known:
        raise InvalidRequestError(
            "The chat template has no place for tools, so that the model would not know of them. Leave tools "
            "out, or pass a chat_template that knows tools (the server takes --chat-template).",
            param="tools",
        )
    extra = {**_effort_variables(known, reasoning_effort), **extra}
    conversation = normalize_messages(messages, as_parts=as_parts)
    if continue_final_message:
        _check_continuable(conversation)
    variables = {
        "tools": tool_list,
        "documents": _plain_list("documents", documents),
        "add_generation_prompt": add_generation_prompt,
        "continue_final_message": continue_final_message,
        **extra,
    }
    if variables["add_generation_prompt"] and variables["continue_final_message"]:
        raise InvalidRequestError(
            "chat_template_kwargs makes both add_generation_prompt and continue_final_message true; "
            "at most one of them may be.",
            param="chat_template_kwargs",
        )
    return _apply(tokenizer, conversation, template, variables)


def _apply(
    tokenizer: Any, conversation: list[dict[str, Any]], template: str, variables: dict[str, Any]
) -> str:
    import jinja2

    try:
        rendered = tokenizer.apply_chat_template(
            conversation, chat_template=template, tokenize=False, **variables
        )
    except jinja2.TemplateSyntaxError as error:
        raise InvalidRequestError(
            f"The chat template is not valid Jinja: {error.message} (line {error.lineno}).",
            param="chat_template",
        ) from error
    except jinja2.TemplateError as error:
        # Also what a template's own raise_exception(...) throws.
        raise InvalidRequestError(
            f"The chat template refuses these messages: {error.message or error}", param="messages"
        ) from error
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise InvalidRequestError(
            f"The chat template fails on these messages: {type(error).__name__}: {error}", param="messages"
        ) from error
    if not isinstance(rendered, str):
        raise InvalidRequestError(
            f"The chat template gave a {type(rendered).__name__} instead of text.", param="chat_template"
        )
    return rendered


def _effort_variables(known: frozenset[str] | None, effort: str | None) -> dict[str, Any]:
    """What a template with these variables has to be told about `reasoning_effort`."""
    if effort is None or known is None:
        return {}
    wanted = effort != "none"
    variables: dict[str, Any] = {
        "reasoning_effort": effort,
        "enable_thinking": wanted,
        "thinking": wanted,
    }
    told = {name: value for name, value in variables.items() if name in known}
    if not told:
        raise InvalidRequestError(
            f"reasoning_effort is {effort!r}, but the chat template knows no effort; leave it out.",
            param="reasoning_effort",
        )
    return told


def _resolve_template(tokenizer: Any, chat_template: str | None, *, with_tools: bool) -> str:
    """The Jinja source to use."""
    own = getattr(tokenizer, "chat_template", None)
    named: dict[str, str] = own if isinstance(own, dict) else {}
    if chat_template is not None:
        if not isinstance(chat_template, str) or not chat_template.strip():
            raise InvalidRequestError(
                f"chat_template={chat_template!r}; it must be Jinja source, or be left out for the one "
                "of the model.",
                param="chat_template",
            )
        return named.get(chat_template, chat_template)
    if isinstance(own, str):
        return own
    if with_tools and "tool_use" in named:
        return named["tool_use"]
    if "default" in named:
        return named["default"]
    if named:
        raise InvalidRequestError(
            f"The model has chat templates named {', '.join(sorted(named))} and no default one; "
            "pass one of these names as chat_template.",
            param="chat_template",
        )
    raise InvalidRequestError(
        "The model's tokenizer has no chat template, so it is probably not a chat model. Pass chat_template "
        "(Jinja source; the server takes --chat-template), or send a plain prompt to completions.",
        param="chat_template",
    )


def normalize_messages(messages: Sequence[Mapping[str, Any]], *, as_parts: bool) -> list[dict[str, Any]]:
    """Checks chat messages, and brings their content into the form that a template wants.

    Args:
        messages: as of the chat API; not changed.
        as_parts: content becomes a list of `{"type": "text", "text": ...}`, else one string with the
            parts on lines of their own. None stays None where there are tool calls, else it is empty.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise InvalidRequestError(
            f"messages must be a list of messages, not a {type(messages).__name__}; "
            "for example [{'role': 'user', 'content': 'Hello'}].",
            param="messages",
        )
    if not messages:
        raise InvalidRequestError("messages is empty; it needs at least one message.", param="messages")
    return [_normalize_message(message, f"messages[{i}]", as_parts) for i, message in enumerate(messages)]


def _normalize_message(message: Mapping[str, Any], where: str, as_parts: bool) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidRequestError(
            f"{where} must be an object with role and content, not a {type(message).__name__}.", param=where
        )
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidRequestError(
            f"{where}.role is {role!r}; it must be a string such as system, user, assistant or tool.",
            param=f"{where}.role",
        )
    # The API's clients send null for what is absent; templates test whether a key is there.
    result = {key: value for key, value in message.items() if value is not None}
    result["role"] = role
    # One thing under two names, of which templates know either.
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if role == "assistant" and reasoning is not None:
        result["reasoning_content"] = result["reasoning"] = reasoning
    content = message.get("content")
    if content is None:
        if role not in ("assistant", "tool"):
            raise InvalidRequestError(
                f"{where}.content is missing; a {role} message needs text.", param=f"{where}.content"
            )
        result["content"] = None if message.get("tool_calls") else ([] if as_parts else "")
    else:
        texts = list(_texts(content, f"{where}.content"))
        if as_parts:
            result["content"] = [{"type": "text", "text": text} for text in texts]
        else:
            result["content"] = "\n".join(texts)
    if message.get("tool_calls") is not None:
        result["tool_calls"] = _normalize_tool_calls(message["tool_calls"], f"{where}.tool_calls")
    return result


def _texts(content: Any, where: str) -> Iterator[str]:
    if isinstance(content, str):
        yield content
        return
    if isinstance(content, Mapping) or not isinstance(content, Sequence):
        raise InvalidRequestError(
            f"{where} must be a string or a list of parts, not a {type(content).__name__}.", param=where
        )
    for i, part in enumerate(content):
        if isinstance(part, str):
            yield part
            continue
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str):
            raise InvalidRequestError(
                f"{where}[{i}] must be a string or an object with a type, such as "
                "{'type': 'text', 'text': 'Hello'}.",
                param=f"{where}[{i}]",
            )
        if kind not in _TEXT_FIELDS:
            raise UnsupportedError(
                f"{where}[{i}] has type {kind!r}; only text is served: {', '.join(_TEXT_FIELDS)}.",
                param=f"{where}[{i}]",
            )
        text = part.get(_TEXT_FIELDS[kind])
        if not isinstance(text, str):
            raise InvalidRequestError(
                f"{where}[{i}].{_TEXT_FIELDS[kind]} is {text!r}; it must be a string.", param=f"{where}[{i}]"
            )
        yield text


def _normalize_tool_calls(tool_calls: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls with their arguments as an object: templates turn them into JSON themselves."""
    if not isinstance(tool_calls, Sequence) or isinstance(tool_calls, str):
        raise InvalidRequestError(f"{where} must be a list, not a {type(tool_calls).__name__}.", param=where)
    calls = []
    for i, call in enumerate(tool_calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidRequestError(
                f"{where}[{i}] must be an object whose function has a name.", param=f"{where}[{i}]"
            )
        arguments = function.get("arguments")
        if arguments is None or arguments == "":
            arguments = {}
        elif isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError as error:
                raise InvalidRequestError(
                    f"{where}[{i}].function.arguments is not valid JSON: {error}.",
                    param=f"{where}[{i}].function.arguments",
                ) from error
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return calls


def _check_continuable(conversation: list[dict[str, Any]]) -> None:
    if not conversation[-1].get("content"):
        raise InvalidRequestError(
            "continue_final_message is true, but the last message has no text to continue.", param="messages"
        )


def _plain_list(name: str, value: Any) -> list[dict[str, Any]] | None:
    if value is None:
        return None
    if (
        not isinstance(value, Sequence)
        or isinstance(value, str)
        or not all(isinstance(item, Mapping) for item in value)
    ):
        raise InvalidRequestError(f"{name} must be a list of objects.", param=name)
    return [dict(item) for item in value] or None

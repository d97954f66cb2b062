"""From chat messages to the prompt text, by the model's Jinja chat template."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

from jaxllm.errors import ConfigError, InvalidRequestError, UnsupportedError

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
    conversation = normalize_messages(messages, as_parts=as_parts)
    if continue_final_message:
        _check_continuable(conversation)
    variables = {
        "tools": _plain_list("tools", tools),
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
                f"{where}[{i}] has type {kind!r}; only text is served: {', '.join(_TEXT_FIELDS)}."
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


@lru_cache(maxsize=64)
def wants_content_parts(template: str) -> bool:
    """Whether a chat template goes through the content of a message part by part.

    It does where it loops over `<message>.content` (or `<message>["content"]`), directly, through a
    filter, or through a variable or macro argument that the content was handed to.
    """
    import jinja2
    import jinja2.ext
    from jinja2 import nodes

    # Like the environment that templates are rendered in; {% generation %} marks an assistant's words.
    environment = jinja2.Environment(extensions=[jinja2.ext.loopcontrols, _generation_tag()])
    try:
        tree = environment.parse(template)
    except jinja2.TemplateSyntaxError:
        return False  # rendering reports it

    aliases = _content_aliases(tree)
    return any(_is_content(loop.iter, aliases) for loop in tree.find_all(nodes.For))


def _content_aliases(tree: Any) -> frozenset[str]:
    """Names that stand for the content of a message: variables set to it, parameters that get it."""
    from jinja2 import nodes

    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    aliases: frozenset[str] = frozenset()
    while True:
        found = set(aliases)
        for assignment in tree.find_all(nodes.Assign):
            if isinstance(assignment.target, nodes.Name) and _is_content(assignment.node, aliases):
                found.add(assignment.target.name)
        for call in tree.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            if macro is not None:
                found.update(
                    parameter.name
                    for parameter, argument in zip(macro.args, call.args, strict=False)
                    if _is_content(argument, aliases)
                )
        if found == aliases:
            return aliases
        aliases = frozenset(found)


def _is_content(node: Any, aliases: frozenset[str]) -> bool:
    from jinja2 import nodes

    match node:
        case nodes.Getattr(attr="content") | nodes.Getitem(arg=nodes.Const(value="content")):
            return True
        case nodes.Name(name=name):
            return name in aliases
        case nodes.Filter(node=inner, name="selectattr" | "rejectattr" | "list" | "reverse"):
            return _is_content(inner, aliases)
        case _:
            return False


@lru_cache(maxsize=1)
def _generation_tag() -> Any:
    import jinja2.ext
    from jinja2 import nodes

    class GenerationTag(jinja2.ext.Extension):
        """`{% generation %} ... {% endgeneration %}`, which leaves its body as it is."""

        tags = {"generation"}  # noqa: RUF012 (jinja2 declares it so)

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            body: list[nodes.Node] = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return body

    return GenerationTag

"""What a chat template does with what it is given, read off its source."""

from __future__ import annotations

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=64)
def wants_content_parts(template: str) -> bool:
    """Whether a chat template goes through the content of a message part by part.

    It does where it loops over `<message>.content` (or `<message>["content"]`), directly, through a
    filter, or through a variable or macro argument that the content was handed to.
    """
    from jinja2 import nodes

    tree = _parse(template)
    if tree is None:
        return False
    aliases = _content_aliases(tree)
    return any(_is_content(loop.iter, aliases) for loop in tree.find_all(nodes.For))


@lru_cache(maxsize=64)
def template_variables(template: str) -> frozenset[str] | None:
    """The names that a chat template reads from outside itself; None where it is not valid."""
    from jinja2 import meta

    tree = _parse(template)
    return None if tree is None else frozenset(meta.find_undeclared_variables(tree))


def _parse(template: str) -> Any:
    """The syntax tree of a template; None where it is not valid, which rendering reports."""
    import jinja2
    import jinja2.ext

    # Like the environment that templates are rendered in; {% generation %} marks an assistant's words.
    environment = jinja2.Environment(extensions=[jinja2.ext.loopcontrols, _generation_tag()])
    try:
        return environment.parse(template)
    except jinja2.TemplateSyntaxError:
        return None


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

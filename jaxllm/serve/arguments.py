"""The server's command line, derived from `EngineConfig` and `ServerConfig`: each field is a flag."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import json
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import yaml

from jaxllm.config import DEMO_MODEL, EngineConfig
from jaxllm.errors import ConfigError
from jaxllm.serve.config import ServerConfig
from jaxllm.serve.flags import GROUPS, HELP

API_KEY_VARIABLE = "JAXLLM_API_KEY"

_DECIMAL = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclass(frozen=True, slots=True)
class ServeArguments:
    """What a command line says."""

    engine: EngineConfig
    server: ServerConfig


def parse_arguments(argv: Sequence[str], program: str = "jaxllm serve") -> ServeArguments:
    """Read a command line; exits with a message where it is wrong, and for --help.

    A YAML file given by --config is read first, and flags go before what it says.
    """
    parser = make_parser(program)
    asked = next((argument for argument in argv if argument.startswith("--help=")), None)
    if asked is not None:
        parser.show_group(asked.partition("=")[2])
    given = _join_dotted_keys(parser, list(argv))
    config_file, given = _take_config_file(parser, given)
    if config_file is not None:
        own = {argument.partition("=")[0] for argument in given}
        given = [*_flags_of_file(parser, config_file, own), *given]
    namespace, unknown = parser.parse_known_args(given)
    if unknown:
        parser.refuse(unknown[0])
    values = {name: value for name, value in vars(namespace).items() if value is not None}
    model, option = values.pop("model_positional", None), values.pop("model", None)
    if model is not None and option is not None and model != option:
        parser.error(f"the model is given twice: {model!r} and --model {option!r}; give it once")
    values["model"] = model or option or DEMO_MODEL
    if "api_key" not in values and os.environ.get(API_KEY_VARIABLE):
        values["api_key"] = (os.environ[API_KEY_VARIABLE],)
    if (values.get("ssl_keyfile") is None) != (values.get("ssl_certfile") is None):
        parser.error("--ssl-keyfile and --ssl-certfile belong together; give both or neither")
    if (values.get("ssl_ca_certs") is None) != (values.get("ssl_cert_reqs", 0) == 0):
        parser.error(
            "--ssl-ca-certs and --ssl-cert-reqs belong together: the authorities, and whether a client must"
            " have a certificate of theirs (2), or may (1)"
        )
    if not 0 <= values.get("port", 1) <= 65535:
        parser.error(f"argument --port: {values['port']} is no port; ports are in [0, 65535]")
    try:
        return ServeArguments(_build(EngineConfig, values), _build(ServerConfig, values))
    except ConfigError as error:
        parser.error(str(error))


class Parser(argparse.ArgumentParser):
    """A parser that suggests what an unknown flag may have meant."""

    def refuse(self, argument: str) -> NoReturn:
        """Exit over an argument that means nothing here."""
        flag = argument.partition("=")[0]
        if not flag.startswith("-"):
            self.error(f"unexpected argument {argument!r}: one model is served, and it is already given")
        known = [option for action in self._actions for option in action.option_strings]
        near = difflib.get_close_matches(flag.replace("_", "-"), known, n=1)
        hint = f"did you mean {near[0]}?" if near else "--help lists what there is"
        self.error(f"unknown flag {flag}; {hint}")

    def show_group(self, title: str) -> NoReturn:
        """Print the flags under one heading of --help, and exit."""
        groups = {group.title: group for group in self._action_groups if group.title in GROUPS}
        found = next((group for name, group in groups.items() if name.lower() == title.lower()), None)
        if found is None:
            self.error(f"--help has no group {title!r}; there are {', '.join(map(repr, groups))}")
        formatter = self._get_formatter()
        formatter.start_section(found.title)
        formatter.add_arguments(found._group_actions)
        formatter.end_section()
        self.exit(0, formatter.format_help())


def make_parser(program: str) -> Parser:
    """The parser, with one flag for each field of the two configurations."""
    parser = Parser(
        prog=program,
        usage=f"{program} [MODEL] [--config FILE] [flags]",
        description="Serve a model to OpenAI clients. Without MODEL, a tiny bundled demo model.",
        epilog="--help='KV cache' shows one group alone. Integers take suffixes: 1k is 1000, 1K is 1024,"
        " 25.6k is 25600. Flags that take JSON take dotted keys too: --hf-overrides.rope_theta 1e6.",
        allow_abbrev=False,
    )
    parser.add_argument("model_positional", nargs="?", metavar="MODEL", help="directory or hub name")
    parser.add_argument("--model", help="the same, as a flag")
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags without their dashes")
    fields = {}
    for config in (ServerConfig, EngineConfig):
        hints = typing.get_type_hints(config)
        documented = attribute_docs(config)
        for field in dataclasses.fields(config):
            fields[field.name] = (field, hints[field.name], documented)
    for title, names in GROUPS.items():
        group = parser.add_argument_group(title)
        for name in names:
            field, hint, documented = fields[name]
            _add_flag(group, field, hint, documented.get(name) or HELP.get(name, ""))
    return parser


def attribute_docs(config: type) -> dict[str, str]:
    """What a class's docstring says in its Attributes section, by field name."""
    docs: dict[str, str] = {}
    names: list[str] = []
    section = inspect.cleandoc(config.__doc__ or "").partition("Attributes:\n")[2]
    for line in section.splitlines():
        entry = re.match(r" {4}(\w[\w, ]*): (.*)", line)
        if entry:
            names = [name.strip() for name in entry[1].split(",")]
            docs.update(dict.fromkeys(names, entry[2]))
        elif line.startswith(" " * 8):
            docs.update({name: f"{docs[name]} {line.strip()}" for name in names})
        else:
            break
    return docs


def human_int(text: str) -> int:
    """An integer that may carry a suffix: k, m, g, t for thousands, K, M, G, T for powers of 1024."""
    match = re.fullmatch(r"(-?\d+(?:\.\d+)?)([kmgtKMGT]?)", text.strip().replace("_", ""))
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no integer; write 8192, 8k (8000) or 8K (8192)")
    digits, suffix = match.groups()
    if suffix in _DECIMAL:
        whole, _, fraction = digits.partition(".")
        scaled = int(whole + fraction) * _DECIMAL[suffix]
        if scaled % 10 ** len(fraction) == 0:
            return scaled // 10 ** len(fraction)
    elif "." not in digits:
        return int(digits) * _BINARY.get(suffix, 1)
    raise argparse.ArgumentTypeError(f"{text!r} is no whole number; 1.5k is 1500, and 1.5K is not allowed")


def _auto_or_int(text: str) -> int | None:
    return None if text == "auto" else human_int(text)


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is no JSON object such as {{"key": 1}}')
    return value


class _Strings(argparse.Action):
    """Several words, or one JSON list of them; a flag that is repeated adds to them."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        if len(values) == 1 and values[0].startswith("["):
            try:
                values = json.loads(values[0])
            except ValueError:
                parser.error(f"argument {option_string}: {values[0]!r} is no JSON list of strings")
            if not all(isinstance(value, str) for value in values):
                parser.error(f"argument {option_string}: {values!r} must be strings")
        setattr(namespace, self.dest, (*(getattr(namespace, self.dest) or ()), *values))


def _add_flag(group: Any, field: dataclasses.Field[Any], hint: Any, text: str) -> None:
    """One flag; not given, its value is None and the configuration's default stands."""
    has_default = field.default is not dataclasses.MISSING and field.default not in (None, "", ())
    default = " ".join(field.default) if isinstance(field.default, tuple) else field.default
    shown = f" (default: {default})" if has_default else ""
    options: dict[str, Any] = {
        "dest": field.name,
        "default": None,
        "help": (text.rstrip(".") + shown).replace("%", "%%"),
    }
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        hint = next(member for member in typing.get_args(hint) if member is not types.NoneType)
    if field.name == "max_model_len":
        options |= {"type": _auto_or_int, "metavar": "INT|auto"}
    elif hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    elif hint is int:
        options |= {"type": human_int, "metavar": "INT"}
    elif hint is float:
        options |= {"type": float, "metavar": "FLOAT"}
    elif typing.get_origin(hint) is Literal:
        options["choices"] = typing.get_args(hint)
        options["type"] = type(options["choices"][0])
    elif typing.get_origin(hint) is dict:
        options |= {"type": _json_object, "metavar": "JSON"}
    elif typing.get_origin(hint) is tuple:
        options |= {"action": _Strings, "nargs": "+", "metavar": "STR"}
    else:
        assert hint is str, (field.name, hint)
        options["metavar"] = "STR"
    group.add_argument(f"--{field.name.replace('_', '-')}", **options)


def _build(config: type[Any], values: dict[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(config)}
    return config(**{name: value for name, value in values.items() if name in names})


def _take_config_file(parser: Parser, argv: list[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and the arguments without it."""
    rest: list[str] = []
    path = None
    arguments = iter(argv)
    for argument in arguments:
        if argument == "--config":
            path = next(arguments, None)
            if path is None:
                parser.error("argument --config: give the path of a YAML file")
        elif argument.startswith("--config="):
            path = argument.partition("=")[2]
        else:
            rest.append(argument)
    return path, rest


def _flags_of_file(parser: Parser, path: str, given: set[str]) -> list[str]:
    """A YAML mapping from flag names to values, as a command line; without lists that are `given` anew."""
    try:
        content = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        parser.error(f"argument --config: {path} cannot be read: {error.strerror}")
    except yaml.YAMLError as error:
        parser.error(f"argument --config: {path} is not valid YAML: {error}")
    if not isinstance(content, dict):
        parser.error(f"argument --config: {path} must hold 'flag: value' lines")
    flags: list[str] = []
    for key, value in content.items():
        name = str(key).replace("_", "-")
        flag = f"--{name}"
        if flag not in parser._option_string_actions or name == "config":
            parser.refuse(flag)
        takes_value = parser._option_string_actions[flag].nargs != 0
        if value is None:
            continue
        if isinstance(value, bool):
            if takes_value:
                parser.error(f"argument --config: {key} in {path} is {value}, but {flag} takes a value")
            flags.append(flag if value else f"--no-{name}")
        elif isinstance(value, dict):
            flags.append(f"{flag}={json.dumps(value)}")
        elif isinstance(value, list) and flag in given:
            continue
        elif isinstance(value, list):
            flags += [flag, json.dumps([str(item) for item in value])]
        else:
            flags.append(f"{flag}={value}")
    return flags


def _join_dotted_keys(parser: Parser, argv: list[str]) -> list[str]:
    """`--flag.a.b VALUE` as `--flag JSON`; values that parse as JSON are JSON, others are text."""
    rest: list[str] = []
    objects: dict[str, dict[str, Any]] = {}
    arguments = iter(argv)
    for argument in arguments:
        flag, separator, value = argument.partition("=")
        base, dot, path = flag.partition(".")
        if not (base.startswith("--") and dot):
            rest.append(argument)
            continue
        base = base.replace("_", "-")
        action = parser._option_string_actions.get(base)
        if action is None or action.type is not _json_object:
            parser.refuse(flag)
        if not separator:
            following = next(arguments, None)
            if following is None:
                parser.error(f"argument {flag}: give a value")
            value = following
        node = objects.setdefault(base, {})
        *parents, leaf = path.split(".")
        for key in parents:
            node = node.setdefault(key, {})
            if not isinstance(node, dict):
                parser.error(f"argument {flag}: {key} already has a value")
        try:
            node[leaf] = json.loads(value)
        except ValueError:
            node[leaf] = value
    for base, content in objects.items():
        if any(argument.partition("=")[0] == base for argument in rest):
            parser.error(f"argument {base}: give JSON or dotted keys, not both")
        rest.append(f"{base}={json.dumps(content)}")
    return rest

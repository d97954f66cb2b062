from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.cli import main
from jaxllm.config import DEMO_MODEL, EngineConfig
from jaxllm.errors import ConfigError
from jaxllm.serve.app import load_chat_template, served_names
from jaxllm.serve.arguments import GROUPS, attribute_docs, human_int, make_parser, parse_arguments
from jaxllm.serve.config import ServerConfig
from jaxllm.serve.errors import describe_validation

FIELDS = {f.name: f for config in (EngineConfig, ServerConfig) for f in dataclasses.fields(config)}


def parse(*argv: str) -> tuple[EngineConfig, ServerConfig]:
    arguments = parse_arguments(argv)
    return arguments.engine, arguments.server


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(argv)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_every_field_is_a_flag_with_a_group_and_a_help_text() -> None:
    grouped = [name for names in GROUPS.values() for name in names]
    assert sorted([*grouped, "model"]) == sorted(FIELDS)
    actions = {action.dest: action for action in make_parser("p")._actions}
    for name in FIELDS:
        assert f"--{name.replace('_', '-')}" in actions[name].option_strings
        assert len(actions[name].help or "") > 5, name


def test_nothing_given_is_the_default() -> None:
    assert parse() == (EngineConfig(model=DEMO_MODEL), ServerConfig())


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["some/model"], {"model": "some/model"}),
        (["--model", "some/model"], {"model": "some/model"}),
        (["m", "--model", "m"], {"model": "m"}),
        (["m", "--max-model-len", "8k"], {"max_model_len": 8000}),
        (["m", "--max-model-len=8K"], {"max_model_len": 8192}),
        (["--max-model-len", "auto"], {"max_model_len": None}),
        (["--max-num-batched-tokens", "25.6k"], {"max_num_batched_tokens": 25600}),
        (["--kv-cache-memory-bytes", "2G"], {"kv_cache_memory_bytes": 2**31}),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
        (["--enable-prefix-caching"], {"enable_prefix_caching": True}),
        (["--gpu-memory-utilization", "0.5"], {"gpu_memory_utilization": 0.5}),
        (["--load-format", "dummy"], {"load_format": "dummy"}),
        (["--hf-overrides", '{"a": {"b": 1}}'], {"hf_overrides": {"a": {"b": 1}}}),
        (
            ["--hf-overrides.a.b", "1", "--hf-overrides.a.c=x", "--hf-overrides.d", "true"],
            {"hf_overrides": {"a": {"b": 1, "c": "x"}, "d": True}},
        ),
        (["--max-logprobs", "-1"], {"max_logprobs": -1}),
        (["m", "--port", "0", "--host", "::1"], {"port": 0, "host": "::1"}),
        (["m", "--api-key", "a", "b"], {"api_key": ("a", "b")}),
        (["--api-key", "a", "--api-key", "b", "c"], {"api_key": ("a", "b", "c")}),
        (["--ssl-ca-certs", "f", "--ssl-cert-reqs", "2"], {"ssl_ca_certs": "f", "ssl_cert_reqs": 2}),
        (["--max-request-bytes", "1M"], {"max_request_bytes": 2**20}),
        (
            ["--allowed-origins", '["http://a", "http://b"]', "--port", "1"],
            {"allowed_origins": ("http://a", "http://b")},
        ),
        (["--served-model-name", "x"], {"served_model_name": ("x",)}),
        (["--shutdown-timeout", "2.5"], {"shutdown_timeout": 2.5}),
        (["--chat-template-content-format", "openai"], {"chat_template_content_format": "openai"}),
        (["--ssl-keyfile", "k", "--ssl-certfile", "c"], {"ssl_keyfile": "k", "ssl_certfile": "c"}),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_flags(argv: list[str], expected: dict[str, Any]) -> None:
    engine, server = parse(*argv)
    for name, value in expected.items():
        assert getattr(engine if hasattr(engine, name) else server, name) == value


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max-modellen", "5"], ["unknown flag --max-modellen", "did you mean --max-model-len?"]),
        (["--max_model_length=5"], ["did you mean --max-model-len?"]),
        (["--no-enable-prefix-cashing"], ["did you mean --no-enable-prefix-caching?"]),
        (["--zzz"], ["--help"]),
        # Half a flag's name is no flag: it would change its meaning when another is added.
        (["--max-model", "5"], ["unknown flag --max-model", "--max-model-len"]),
        (["a", "b"], ["'b'", "one model"]),
        (["a", "--model", "b"], ["'a'", "'b'"]),
        (["--port", "99999"], ["--port", "65535"]),
        (["--port", "http"], ["--port", "'http'"]),
        (["--max-model-len", "1.0005k"], ["--max-model-len", "1.0005k"]),
        (["--max-model-len", "1.5K"], ["1.5K"]),
        (["--load-format", "pickle"], ["--load-format", "safetensors"]),
        (["--hf-overrides", "{"], ["--hf-overrides", "not valid JSON"]),
        (["--hf-overrides", "[1]"], ["no JSON object"]),
        (["--hf-overrides", "{}", "--hf-overrides.a", "1"], ["not both"]),
        (["--hf-overrides.a", "1", "--hf-overrides.a.b", "1"], ["already has a value"]),
        (["--port.a", "1"], ["--port.a"]),
        (["--ssl-keyfile", "k"], ["--ssl-certfile"]),
        (["--ssl-ca-certs", "f"], ["--ssl-cert-reqs"]),
        (["--ssl-cert-reqs", "1"], ["--ssl-ca-certs"]),
        (["--ssl-cert-reqs", "3"], ["--ssl-cert-reqs", "0, 1, 2"]),
        (["--config"], ["--config", "YAML"]),
        (["--config", "/nowhere.yaml"], ["/nowhere.yaml", "cannot be read"]),
        (["--api-key", "[1]"], ["--api-key", "strings"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], argv: list[str], words: list[str]) -> None:
    message = refused(capsys, *argv)
    for word in words:
        assert word in message


@given(st.integers(-(10**15), 10**15))
def test_plain_integers_read_as_themselves(value: int) -> None:
    assert human_int(str(value)) == value


@given(st.integers(0, 10**9), st.sampled_from("kmgt"))
def test_decimal_suffixes(value: int, suffix: str) -> None:
    scale = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}[suffix]
    assert human_int(f"{value}{suffix}") == value * scale
    assert human_int(f"{value / 1000:.3f}{suffix}") * 1000 == value * scale
    assert human_int(f"{value}{suffix.upper()}") == value * 1024 ** ("kmgt".index(suffix) + 1)


def test_a_config_file_says_what_flags_then_go_before(tmp_path: Path) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(
        "model: from-file\nport: 1234\nmax-model-len: 4k\nenable_prefix_caching: false\n"
        "served-model-name: [a, b]\nhf-overrides: {x: 1}\nseed: 3\ntokenizer: null\n"
    )
    engine, server = parse("--config", str(path), "--seed", "7", "--max-model-len", "auto")
    assert (engine.model, engine.seed, engine.max_model_len) == ("from-file", 7, None)
    assert (engine.enable_prefix_caching, engine.hf_overrides, engine.tokenizer) == (False, {"x": 1}, None)
    assert (server.port, server.served_model_name) == (1234, ("a", "b"))
    assert parse(f"--config={path}", "--enable-prefix-caching")[0].enable_prefix_caching
    assert parse(f"--config={path}", "--served-model-name", "c")[1].served_model_name == ("c",)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("prot: 1", ["--prot", "--port"]),
        ("- a\n- b", ["'flag: value'"]),
        ("a: [", ["not valid YAML"]),
        ("port: true", ["--port takes a value"]),
        ("port: high", ["--port", "'high'"]),
        ("config: other.yaml", ["--config"]),
    ],
)
def test_bad_config_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, words: list[str]
) -> None:
    path = tmp_path / "server.yaml"
    path.write_text(content)
    message = refused(capsys, "--config", str(path))
    for word in words:
        assert word in message


def test_the_key_of_the_environment_yields_to_the_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAXLLM_API_KEY", "secret")
    assert parse()[1].api_key == ("secret",)
    assert parse("--api-key", "other")[1].api_key == ("other",)
    monkeypatch.setenv("JAXLLM_API_KEY", "")
    assert parse()[1].api_key == ()


def test_names_that_a_model_is_served_under() -> None:
    assert served_names(DEMO_MODEL, ServerConfig())[0] == "jaxllm-demo"
    assert served_names("org/name", ServerConfig()) == ("org/name",)
    assert served_names("org/name", ServerConfig(served_model_name=("a", "b"))) == ("a", "b")


def test_a_chat_template_is_a_file_or_itself(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    path.write_text("{{ messages }}")
    assert load_chat_template(str(path)) == load_chat_template("{{ messages }}") == "{{ messages }}"
    assert load_chat_template(None) is None
    with pytest.raises(ConfigError, match=r"no\.jinja"):
        load_chat_template(str(tmp_path / "no.jinja"))


def test_help_and_mistakes_answer_without_importing_jax_or_the_web() -> None:
    code = (
        "import sys, contextlib, io\n"
        "from jaxllm.cli import main\n"
        "for argv in (['serve', '--help'], ['serve', '--prot'], ['--version'], []):\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "        try:\n"
        "            main(argv)\n"
        "        except SystemExit as exit_:\n"
        "            pass\n"
        "print(*sorted({'jax', 'fastapi', 'uvicorn', 'transformers', 'pydantic'} & set(sys.modules)))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == []


def test_help_of_one_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse("--help=kv cache")
    assert exit_.value.code == 0
    shown = "".join(capsys.readouterr())
    assert "KV cache:" in shown and "--block-size" in shown
    assert "--port" not in shown
    message = refused(capsys, "--help=nothing")
    assert "'scheduling'" in message


def test_the_console_script(capsys: pytest.CaptureFixture[str]) -> None:
    for argv, status, words in (
        (["serve", "--help"], 0, ["jaxllm serve [MODEL]", "KV cache:", "--max-model-len INT|auto"]),
        (["--help"], 0, ["serve"]),
        (["--version"], 0, ["jaxllm 0"]),
        (["bake"], 2, ["bake"]),
        ([], 2, ["COMMAND"]),
    ):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == status
        captured = capsys.readouterr()
        for word in words:
            assert word in captured.out + captured.err


def test_docstrings_are_read_over_several_lines() -> None:
    class Example:
        """Something.

        Attributes:
            one: first line
                and second.
            two, three: shared.

        More.
        """

    assert attribute_docs(Example) == {"one": "first line and second.", "two": "shared.", "three": "shared."}


def test_long_values_are_cut_in_messages() -> None:
    error = {
        "type": "int_type",
        "loc": ("body", "n"),
        "msg": "Input should be an integer",
        "input": "x" * 9999,
    }
    message, param = describe_validation([error], ["n"])
    assert param == "n"
    assert len(message) < 300
    assert json.dumps(message)

"""The commands beside `serve`: chat, complete, run-batch, collect-env."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jaxllm import chat, collect_env, complete, run_batch
from jaxllm.async_engine import AsyncEngine
from jaxllm.cli import main
from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError
from tests.serve.fake_engine import REPLY, FakeEngine
from tests.serve.test_server import Live, free_port, live_server


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with live_server(api_key=("secret",)) as live:
        yield live


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JAXLLM_API_KEY", raising=False)


def flags(live: Live, *more: str) -> list[str]:
    return ["--url", f"{live.url}/v1", "--api-key", "secret", *more]


def test_one_question(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat.main(flags(live, "-q", "Hello")) == 0
    assert capsys.readouterr().out == f"{REPLY}\n"
    assert complete.main(flags(live, "--quick", "Hello", "--max-tokens", "64")) == 0
    assert capsys.readouterr().out == f"{REPLY}\n"


def test_a_conversation_remembers(
    live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = iter(["First", "Second", ""])
    monkeypatch.setattr("builtins.input", lambda prompt: next(said))
    monkeypatch.setenv("JAXLLM_API_KEY", "secret")
    assert chat.main(["--url", f"{live.url}/v1/", "--system-prompt", "Be brief.", "--max-tokens", "50"]) == 0
    assert capsys.readouterr().out.count(REPLY) == 2
    prompt = live.fake.tokenizer.decode(live.fake.submitted[-1].prompt_token_ids)
    assert prompt.index("Be brief.") < prompt.index("First") < prompt.index(REPLY) < prompt.index("Second")
    assert live.fake.submitted[-1].max_tokens == 50


def test_the_end_of_the_input_ends_it(
    live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert complete.main(flags(live)) == 0
    assert "fake" in capsys.readouterr().out


@pytest.mark.parametrize("command", [chat.main, complete.main])
def test_what_goes_wrong_is_said(live: Live, command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = ["--url", f"{live.url}/v1", "-q", "Hi"]
    assert command(wrong) == 1
    assert "API key" in capsys.readouterr().err
    assert command([*flags(live), "-q", "Hi", "--model-name", "other"]) == 1
    assert "'other' does not exist" in capsys.readouterr().err
    assert command(["--url", f"http://127.0.0.1:{free_port()}/v1", "-q", "Hi"]) == 1
    assert "--url" in capsys.readouterr().err


# -- run-batch --------------------------------------------------------------------------------------------


def load(config: EngineConfig) -> AsyncEngine:
    fake = FakeEngine(model=config.model, max_num_seqs=2)
    fake.reply = lambda request: f"n{len(request.prompt_token_ids)}"
    return AsyncEngine(fake)  # type: ignore[arg-type]


def batch(tmp_path: Path, lines: list[Any], *more: str) -> tuple[tuple[int, int], list[dict[str, Any]]]:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    files, arguments = run_batch.parse(["-i", str(source), "-o", str(target), "fake-model", *more], "test")
    counts = run_batch.run(files, arguments, load)
    return counts, [json.loads(line) for line in target.read_text().splitlines()]


def line(custom_id: str, url: str, body: dict[str, Any]) -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def test_a_batch_is_answered_in_order(tmp_path: Path) -> None:
    requests = []
    for i in range(40):
        if i % 2:
            body: dict[str, Any] = {"messages": [{"role": "user", "content": "word " * (40 - i)}]}
            requests.append(line(f"r{i}", "/v1/chat/completions", body))
        else:
            requests.append(line(f"r{i}", "/v1/completions", {"prompt": "word " * (i + 1), "max_tokens": 9}))
    (count, failed), answers = batch(tmp_path, requests)
    assert (count, failed) == (40, 0)
    assert [answer["custom_id"] for answer in answers] == [f"r{i}" for i in range(40)]
    assert len({answer["id"] for answer in answers}) == 40
    for i, answer in enumerate(answers):
        assert (answer["error"], answer["response"]["status_code"]) == (None, 200)
        (choice,) = answer["response"]["body"]["choices"]
        said = choice["message"]["content"] if i % 2 else choice["text"]
        assert said == f"n{answer['response']['body']['usage']['prompt_tokens']}"


def test_a_bad_line_does_not_stop_a_batch(tmp_path: Path) -> None:
    good = line("good", "/v1/completions", {"prompt": "a", "max_tokens": 1})
    bad = [
        "{",
        "[1]",
        {**good, "custom_id": 5},
        {**good, "method": "GET"},
        {**good, "url": "http://elsewhere"},
        {**good, "body": None},
        {**good, "extra": 1},
        line("s", "/v1/completions", {"prompt": "a", "stream": True}),
        line("m", "/v1/completions", {"prompt": "a", "model": "other"}),
        line("t", "/v1/completions", {"prompt": "a", "temperature": 9}),
        line("u", "/v1/nothing", {}),
    ]
    (count, failed), answers = batch(tmp_path, [good, *bad, good])
    assert (count, failed) == (13, 11)
    statuses = [answer["response"]["status_code"] for answer in answers]
    assert statuses == [200, *[400] * 8, 404, 400, 404, 200]
    assert all("message" in answer["response"]["body"]["error"] for answer in answers[1:-1])


def test_files_that_are_not_there(tmp_path: Path) -> None:
    _, arguments = run_batch.parse(["-i", "x", "-o", "y"], "test")
    with pytest.raises(ConfigError, match="-i /no/such cannot be opened"):
        run_batch.run(run_batch.Files("/no/such", str(tmp_path / "o")), arguments, load)


def test_flags_about_http_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for more in (["--port", "80"], ["--max-num-queued-reqs", "5"]):
        with pytest.raises(SystemExit):
            run_batch.parse(["-i", "a", "-o", "b", *more], "test")
        assert "is about HTTP" in capsys.readouterr().err


# -- collect-env, and the console script ------------------------------------------------------------------


def test_the_machine_without_its_secrets(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("JAXLLM_API_KEY", "hidden")
    monkeypatch.setenv("HF_TOKEN", "hidden")
    monkeypatch.setenv("JAX_EXAMPLE", "shown")
    assert collect_env.main(["--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert "hidden" not in text
    assert found["environment"]["JAX_EXAMPLE"] == "shown"
    assert found["packages"]["jax"]
    assert found["devices"][0].startswith("cpu 0")
    assert collect_env.main([]) == 0
    assert "JAXLLM_API_KEY: (set)" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command", ["serve", "chat", "complete", "simulate", "replay", "run-batch", "plan", "collect-env"]
)
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"jaxllm {command}" in capsys.readouterr().out

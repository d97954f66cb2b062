"""Scripts in the form of vLLM's documented offline examples, run on the demo model."""

from __future__ import annotations

import ast
import re
import runpy
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent / "scripts"
Run = Callable[[str], list[str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def run_script(name: str) -> list[str]:
        capsys.readouterr()
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run_script


def test_generate(run: Run) -> None:
    lines = run("generate")
    assert len(lines) == 3
    for line in lines:
        assert re.fullmatch(r"Prompt: .+, Generated text: '.+'", line)


def test_chat(run: Run) -> None:
    lines = run("chat")
    assert [line.partition(": ")[0] for line in lines] == ["one", "several", "several", "several"]
    for line, city in zip(lines, ("Rome", "Paris", "Rome", "Tokyo"), strict=True):
        assert city in line


def test_beam_search(run: Run) -> None:
    lines = run("beam_search")
    assert len(lines) == 4
    summed = [float(line.split()[0]) for line in lines]
    assert all(s < 0 for s in summed)
    assert all("'The capital of France is" in line for line in lines)
    assert "Paris" in lines[0]


def test_prefix_caching(run: Run) -> None:
    without, cached, same, reset, after = run("prefix_caching")
    assert without == "cached without: [0, 0, 0]"
    hits = ast.literal_eval(cached.removeprefix("cached with: "))
    # Whole pages of the common text; the first prompt was computed before as it stands.
    assert hits[0] >= hits[1] >= 48
    assert hits[2] >= 48
    assert (same, reset, after) == ("same: True", "reset: True", "cached after reset: 0")


def test_parallel_sampling(run: Run) -> None:
    *lines, reproducible = run("parallel_sampling")
    assert [line[:3] for line in lines] == ["0: ", "1: ", "2: ", "3: "]
    assert len({line[3:] for line in lines}) > 1
    assert reproducible == "reproducible: True"


def test_logprobs(run: Run) -> None:
    first, *rest = run("logprobs")
    _, num_logprobs, num_tokens, nothing = first.split()
    assert num_logprobs == num_tokens
    assert nothing == "None"
    prompt = [line for line in rest if line.startswith("prompt ")]
    assert len(prompt) == int(num_tokens) - 1
    assert all(int(line.split()[-1]) >= 1 and float(line.split()[-3]) <= 0 for line in prompt)
    output = [line for line in rest if line.startswith("output ")]
    # Greedy: the token is the most probable one, and among the three that were asked for.
    assert output
    assert set(output) == {"output 3 1 True"}
    assert float(rest[-1].removeprefix("total ")) <= 0


def test_token_ids(run: Run) -> None:
    text = run("token_ids")
    joined = "\n".join(text)
    assert joined.startswith("None 4")
    assert "Q: What is the capital of France?\nA: 4" in joined
    assert text[-1] == "same: True"
    assert re.search(r"^None 2 ", joined, re.MULTILINE)


def test_defaults(run: Run) -> None:
    assert run("defaults") == [
        "defaults: 0.6 0.95",
        "one: True",
        "enqueued: True",
        "tokens: 6",
    ]


def test_only_the_name_of_the_module_tells_them_from_vllms() -> None:
    for path in SCRIPTS.glob("*.py"):
        imported = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
        ]
        assert imported, path
        for node in imported:
            assert node.module in ("jaxllm", "jaxllm.sampling_params"), path
            names = {"LLM", "SamplingParams", "TokensPrompt", "BeamSearchParams"}
            assert {alias.name for alias in node.names} <= names, path

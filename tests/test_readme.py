"""Every command and every example of the README does what it says."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ADDRESS = "localhost:8000"


@dataclass(frozen=True)
class Block:
    language: str
    code: str

    @property
    def needs_server(self) -> bool:
        return ADDRESS in self.code


BLOCKS = [Block(*match) for match in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)]
INSTALLS = re.findall(r"pip install [^`\n&]*", README)


def of(language: str, *, needs_server: bool) -> list[Block]:
    return [b for b in BLOCKS if b.language == language and b.needs_server == needs_server]


def run(command: list[str], code: str) -> str:
    result = subprocess.run(
        command,
        input=code,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        env={**os.environ, "CI": "true"},
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server as the README starts it, but on a free port; yields host:port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("readme") / "server.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxllm.serve", "--host", "127.0.0.1", "--port", str(port)],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + 400
            while True:
                assert process.poll() is None, log.read_text()[-4000:]
                assert time.monotonic() < deadline, f"not healthy in time:\n{log.read_text()[-4000:]}"
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.2)
            yield f"127.0.0.1:{port}"
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 0, log.read_text()[-4000:]
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def test_every_kind_of_example_is_there() -> None:
    assert {b.language for b in BLOCKS} == {"shell", "python", "text"}
    assert of("python", needs_server=False)
    assert any("from openai import" in b.code for b in of("python", needs_server=True))
    assert any(b.code.startswith("curl ") for b in of("shell", needs_server=True))


def test_python() -> None:
    first, *_ = of("python", needs_server=False)
    output = run([sys.executable, "-"], first.code)
    assert "The capital of France is ->" in output
    assert "Paris" in output


def test_pooling() -> None:
    [block] = [b for b in of("python", needs_server=False) if "pooling" in b.code]
    size, score = run([sys.executable, "-"], block.code).split()[-2:]
    assert int(size) > 0 and -1 <= float(score) <= 1


def test_a_policy_of_thirty_lines() -> None:
    [block] = [b for b in of("python", needs_server=False) if "SchedulingPolicy" in b.code]
    assert len(block.code.splitlines()) <= 30
    told = "\nengine = llm.llm_engine\nprint('ranks by', engine.scheduler._policy._policy.__dict__)"
    output = run([sys.executable, "-"], block.code + told)
    assert "Tokyo" in output
    assert "ranks by {'patience': 16, 'num_arrived': 1}" in output


@pytest.mark.parametrize("block", of("python", needs_server=True), ids=lambda b: b.code.splitlines()[0])
def test_python_with_server(block: Block, server: str) -> None:
    output = run([sys.executable, "-"], block.code.replace(ADDRESS, server))
    assert len(output.split()) >= 3


@pytest.mark.parametrize("block", of("shell", needs_server=True), ids=lambda b: b.code.split()[0])
def test_shell_with_server(block: Block, server: str) -> None:
    output = run(["bash", "-euo", "pipefail", "-s"], block.code.replace(ADDRESS, server))
    choice = json.loads(output)["choices"][0]
    assert "5" in choice["message"]["content"]


def test_the_two_commands() -> None:
    """`.ci/run` installs and runs them in fresh environments; here only that it is these that it runs."""
    commands = [b.code.strip() for b in of("shell", needs_server=False)]
    assert commands == ["pip install . && python -m jaxllm.serve", 'pip install -e ".[test]" && pytest']
    assert re.search(r"""pip" install (--no-compile )?-e '\.\[test\]'""", (ROOT / ".ci/run").read_text())


def test_extras_exist() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = {
        name
        for install in INSTALLS
        for group in re.findall(r"\[(.+?)\]", install)
        for name in group.split(",")
    }
    assert {"test", "cuda", "tpu"} <= named <= extras


def test_links_and_modules_exist() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
    for module in re.findall(r"python -m ([\w.]+)", README):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    drawn = "".join(block.code for block in BLOCKS if block.language == "text")
    paths = re.findall(r"\b(?:jaxllm|pallas_kernels|sharding)/[\w/.]*", drawn)
    assert len(paths) > 5
    for path in paths:
        assert (ROOT / path).exists(), path

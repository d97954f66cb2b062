"""OpenAI servers under load: started in a process of their own, stopped while another has its turn."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx

from benchmarks.peers import ENVIRONMENTS, ROOT, EngineProcess

COMMANDS = {
    "jaxllm": ["-m", "jaxllm.serve"],
    "vllm": ["-m", "vllm.entrypoints.openai.api_server", "--model"],
}


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server(EngineProcess):
    """A running server. `url` is where it listens.

    Args:
        name: a key of `COMMANDS`.
        python: interpreter that has the engine installed.
        log: file that takes whatever it prints.
        flags: of the command line, after the model.
        seconds: that it may take to start.

    Raises:
        RuntimeError: it ended, or did not answer in time; with the end of what it printed.
    """

    def __init__(
        self, name: str, python: str, model: str, log: Path, flags: list[str], *, seconds: float = 600
    ) -> None:
        self.name = name
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._log = log
        where = ["--host", "127.0.0.1", "--port", str(port)]
        began = time.monotonic()
        with log.open("w") as output:
            process = subprocess.Popen(
                [python, *COMMANDS[name], model, *where, *flags],
                cwd=ROOT,
                env={**ENVIRONMENTS[name], **os.environ, "PYTHONUNBUFFERED": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        super().__init__(process)
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() - began > seconds:
                self.close()
                tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
                raise RuntimeError(f"the server {name} did not start:\n{tail}")
            time.sleep(0.1)
        self.start_seconds = time.monotonic() - began

    def _is_ready(self) -> bool:
        with suppress(httpx.HTTPError):
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        return False


def start_servers(
    stack: ExitStack, model: str, logs: Path, flags: list[str], peer_python: str | None
) -> Iterator[Server]:
    """Ours and, with an interpreter that has it, vLLM's; each is stopped once it was taken and warmed up.

    Both have compiled everything before they are measured, as vLLM always has when it says that it is ready.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for name, python, own in (("jaxllm", sys.executable, ["--forbid-recompile"]), ("vllm", peer_python, [])):
        if python is None:
            continue
        server = stack.enter_context(Server(name, python, model, logs / f"{name}.log", [*flags, *own]))
        print(f"{name} started in {server.start_seconds:.1f} s", flush=True)
        yield server
        server.pause()

"""OpenAI servers under load: started in a process of their own, stopped while another has its turn."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import httpx

from benchmarks.peers import ENVIRONMENTS, ROOT

COMMANDS = {
    "jaxllm": ["-m", "jaxllm.serve"],
    "vllm": ["-m", "vllm.entrypoints.openai.api_server", "--model"],
}


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A running server; a context manager. `url` is where it listens.

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
            self._process = subprocess.Popen(
                [python, *COMMANDS[name], model, *where, *flags],
                cwd=ROOT,
                env={**ENVIRONMENTS[name], **os.environ, "PYTHONUNBUFFERED": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
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

    def pause(self) -> None:
        """Keeps it off the cores, which some servers use while they wait."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it run again."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """Ends it: first as an operator would, then less gently."""
        self.resume()
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

"""Hosts as processes of this machine, each with simulated devices of its own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).parents[2]

# Of an engine for the models of `tests.parallel.models`. Compiling is what such tests wait for: two steps.
ENGINE = {
    "skip_tokenizer_init": True,
    "max_model_len": 256,
    "max_num_seqs": 1,
    "max_num_batched_tokens": 16,
    "block_size": 4,
    "num_gpu_blocks_override": 70,
    "max_logprobs": 4,
    "disable_log_stats": True,
    "compilation_cache_dir": "",
}


def flags(settings: dict[str, object]) -> list[str]:
    """A command line of settings."""
    words = []
    for name, value in settings.items():
        words += [f"--{name.replace('_', '-')}"] if value is True else [f"--{name.replace('_', '-')}={value}"]
    return words


def environment(devices: int = 1) -> dict[str, str]:
    # Like this process, they compile quickly.
    xla = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla}


def two_free_ports() -> int:
    """The first of two free ports in a row."""
    for _ in range(100):
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError), socket.create_server(("127.0.0.1", port + 1)):
                return port
    raise AssertionError("no two free ports in a row")


class Processes:
    """Processes that are killed at the end of a `with` block, whatever they wait for."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, command: Sequence[str], devices: int = 1) -> subprocess.Popen[bytes]:
        """Runs python with these arguments."""
        with self._log(len(self.started)).open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=ROOT,
                env=environment(devices),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def _log(self, number: int) -> Path:
        return self._directory / f"process-{number}.log"

    def said(self, number: int) -> str:
        """What a process has written so far."""
        return self._log(number).read_text(errors="replace")

    def wait(self, number: int, seconds: float) -> int:
        """A process's status, which must come in time."""
        try:
            return self.started[number].wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"process {number} goes on:\n{self.said(number)[-4000:]}") from None

    def wait_for_line(self, number: int, beginning: str, seconds: float) -> str:
        """The rest of a line that a process writes."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            for line in self.said(number).splitlines():
                if line.startswith(beginning):
                    return line.removeprefix(beginning)
            assert self.started[number].poll() is None, self.said(number)[-6000:]
            time.sleep(0.05)
        raise AssertionError(f"process {number} did not say {beginning!r}:\n{self.said(number)[-6000:]}")

    def __enter__(self) -> Processes:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, process in enumerate(self.started):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
            if kind is not None:
                print(f"--- process {number}: {process.returncode}\n{self.said(number)[-4000:]}")

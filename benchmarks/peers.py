"""An engine in a process of its own, spoken to through `benchmarks.protocol`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from benchmarks.workloads import Prompts

ROOT = Path(__file__).parent.parent

# What a peer needs in its environment to be at its best beside another engine.
ENVIRONMENTS: dict[str, dict[str, str]] = {
    "jaxllm": {},
    "transformers": {"HF_HUB_OFFLINE": "1"},
    "vllm": {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        "VLLM_CPU_OMP_THREADS_BIND": f"0-{(os.cpu_count() or 1) - 1}",
    },
}


class PeerError(RuntimeError):
    """A peer's process ended before it answered; the message holds the end of what it printed."""


class EngineProcess:
    """A process that leads a group of its own, stopped while another engine has its turn; a context manager.

    Some engines keep the cores busy while they wait, which the others would pay for.
    """

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def pause(self) -> None:
        """Stops it, with all its processes."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Lets it run again."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _ask_to_end(self) -> None:
        """What makes it end of its own accord."""
        self._signal(signal.SIGTERM)

    def close(self) -> None:
        """Ends it: first by asking, then less gently."""
        self.resume()
        self._ask_to_end()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Peer(EngineProcess):
    """One running engine, which is stopped whenever it is not asked anything.

    Args:
        name: a key of `ENVIRONMENTS`; `benchmarks/peer_<name>.py` is what runs.
        python: interpreter that has the engine installed.
        log: file that takes whatever the engine prints.
    """

    def __init__(self, name: str, python: str, log: Path) -> None:
        self.name = name
        self._log = log
        # What is set outside wins over our choice.
        environment = {**ENVIRONMENTS[name], **os.environ, "PYTHONUNBUFFERED": "1"}
        with log.open("w") as output:
            process = subprocess.Popen(
                [python, "-m", f"benchmarks.peer_{name}"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                text=True,
                start_new_session=True,  # its processes are one group
            )
        super().__init__(process)

    def load(self, **options: Any) -> tuple[str, float]:
        """Loads a model; returns the engine's name with its version, and the seconds it took."""
        reply = self._ask({"load": options})
        return reply["engine"], reply["seconds"]

    def generate(self, prompts: Prompts, max_tokens: int) -> float:
        """Seconds to answer all prompts with `max_tokens` tokens each.

        Raises:
            PeerError: if it generated another number of tokens, or died.
        """
        reply = self._ask({"prompts": prompts, "max_tokens": max_tokens})
        if reply["num_output_tokens"] != len(prompts) * max_tokens:
            raise PeerError(
                f"{self.name} generated {reply['num_output_tokens']} tokens, not {len(prompts) * max_tokens}"
            )
        return float(reply["seconds"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self.resume()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._process.wait(timeout=60)
            tail = "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
            raise PeerError(f"{self.name} ended with exit code {code}:\n{tail}")
        self.pause()
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _ask_to_end(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def close(self) -> None:
        """Ends the process: first by ending its input, then less gently."""
        super().close()
        assert self._process.stdout is not None
        self._process.stdout.close()

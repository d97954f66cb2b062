"""What a runner has its devices do, as plain data: it can be done here, or sent to other hosts as well."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxllm.errors import EngineDeadError
from jaxllm.execution.batch import StepShape
from jaxllm.scheduling.plan import Copies


class RunStep(NamedTuple):
    """Compute a batch.

    Attributes:
        shape: of the compiled step.
        integers, floats: see `HostBatch`.
    """

    shape: StepShape
    integers: np.ndarray
    floats: np.ndarray


class SampleLate(NamedTuple):
    """Sample for those sequences of the step before that it left out.

    Attributes:
        num_seqs: of that step's shape.
        integers, floats: see `HostBatch.late_arrays`.
        token_masks: int32[S, words], see `TokenMasks`; None where nothing is forbidden by one.
    """

    num_seqs: int
    integers: np.ndarray
    floats: np.ndarray
    token_masks: np.ndarray | None


class WriteCounts(NamedTuple):
    """Set a slot's row of the sampler's state: int32[V] counts of its output, bool[V] its prompt's tokens."""

    slot: int
    counts: np.ndarray
    in_prompt: np.ndarray


class WriteBias(NamedTuple):
    """Set a slot's row of the sampler's state: float32[V] added to its logits."""

    slot: int
    bias: np.ndarray


class CopyPages(NamedTuple):
    """Copy KV pages, those to the host first, see `Plan`."""

    out: Copies
    into: Copies


class SleepAt(NamedTuple):
    """Let go of device memory, see `Runner.sleep`."""

    level: int


class WakeUp(NamedTuple):
    """Take device memory again, see `Runner.wake_up`."""

    tags: tuple[str, ...] | None


Command = RunStep | SampleLate | WriteCounts | WriteBias | CopyPages | SleepAt | WakeUp


class Executor(Protocol):
    """Has commands done, in the order given."""

    def launch(self, command: Command) -> Callable[[], Any]:
        """Begins a command; what is returned waits until its result can be read, and gives it.

        Raises:
            EngineDeadError: here or from the result: somebody who takes part is gone.
        """

    def on_failure(self, callback: Callable[[EngineDeadError], None]) -> None:
        """Has somebody told, from any thread, when one who takes part is gone."""

    def close(self) -> None:
        """Lets go of whoever takes part."""


class InProcess:
    """This process has all the devices.

    Args:
        run: does a command.
    """

    def __init__(self, run: Callable[[Command], Any]) -> None:
        self._run = run

    def launch(self, command: Command) -> Callable[[], Any]:
        result = self._run(command)
        return lambda: result

    def on_failure(self, callback: Callable[[EngineDeadError], None]) -> None:
        pass  # Whoever could tell would be gone himself.

    def close(self) -> None:
        pass

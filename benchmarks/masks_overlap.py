"""How long a device waits for the host in steps of constrained sequences: masks first, or meanwhile.

The engine is the real one, with its scheduler, batches, matchers, masks and detokenization, over a large
vocabulary. The device is a clock: every step keeps it busy for a set time, in the order in which it is told,
and the tokens it gives are those of documents that fit. What counts is how long it has nothing to do.
"""

from __future__ import annotations

import queue
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from benchmarks.host_overhead import TINY

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from jaxllm.engine import Engine
    from jaxllm.structured_outputs import StructuredOutputsParams

# Of the second program: masks, a draw and an argmax over 64 x 128,000 logits.
_SAMPLE_MS = 0.3
_WARM_UP = 5


@dataclass(frozen=True, slots=True)
class Waiting:
    """What a device did in steps of one kind.

    Attributes:
        form: of what the sequences write.
        masks_first: whether masks are made before a step begins, or while it runs.
        idle_ms: of each step, between its end and the end of the one before, less the device's own time.
    """

    form: str
    masks_first: bool
    idle_ms: list[float]


class ClockDevice:
    """An executor whose commands take a set time, one after the other.

    Args:
        step_ms: of a step.
        masks_first: a step takes its masks as an input, and so begins once they are there; as it is where
            one program does all.
    """

    def __init__(self, engine: Engine, documents: dict[str, list[int]], step_ms: float, masks_first: bool):
        self._slots = engine.runner._slots
        self._documents = documents
        self._step_ms = step_ms
        self._masks_first = masks_first
        self._held: Any = None
        self._commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._free_at = 0.0
        self.idle_ms: list[float] = []
        self._idle = 0.0
        threading.Thread(target=self._run, daemon=True).start()

    def launch(self, command: Any) -> Callable[[], Any]:
        from jaxllm.execution.batch import INTEGERS, SAMPLES_LATE, HostBatch
        from jaxllm.execution.commands import RunStep, SampleLate

        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        if isinstance(command, RunStep):
            batch = HostBatch(command.shape, 0)
            batch.integers[:] = command.integers
            columns = batch.seq_integers
            waits = self._masks_first and bool((batch.column["samples"] == SAMPLES_LATE).any())
            item = (self._step_ms, columns, done)
            if waits:
                self._held = item
            else:
                self._commands.put(item)
        elif isinstance(command, SampleLate):
            if self._held is not None:
                self._commands.put(self._held)
                self._held = None
            columns = command.integers[1:].reshape(len(INTEGERS), -1)
            self._commands.put((_SAMPLE_MS, columns, done))
        return done.get

    def _run(self) -> None:
        while (item := self._commands.get()) is not None:
            milliseconds, columns, done = item
            begin = time.perf_counter()
            if self._free_at:
                self._idle += max(begin - self._free_at, 0.0)
            if milliseconds == self._step_ms:
                self.idle_ms.append(self._idle * 1000)
                self._idle = 0.0
            end = begin + milliseconds / 1000
            while (left := end - time.perf_counter()) > 0:
                time.sleep(left)
            self._free_at = time.perf_counter()
            done.put(self._output(columns))

    def _output(self, columns: np.ndarray) -> Any:
        from jaxllm.execution.batch import INTEGERS
        from jaxllm.execution.step import StepOutput

        column = dict(zip(INTEGERS, columns, strict=True))
        request_of = {slot: request for request, slot in list(self._slots._slot_of.items())}
        tokens = np.zeros(columns.shape[1], np.int32)
        for row in np.flatnonzero(column["samples"]):
            request = request_of.get(int(column["slots"][row]))
            if request is not None:
                tokens[row] = self._documents[request.request_id][column["positions"][row]]
        return StepOutput(tokens, None, None)  # type: ignore[arg-type]

    def on_failure(self, callback: Callable[..., None]) -> None:
        pass

    def close(self) -> None:
        self._commands.put(None)


@contextmanager
def _engine(tokenizer: PreTrainedTokenizerFast, sequences: int, overlapped: bool) -> Iterator[Engine]:
    """An engine that compiles nothing: its device is put in place of what would."""
    import json

    from jaxllm import LLM
    from jaxllm.execution.runner import Runner

    with tempfile.TemporaryDirectory(prefix="jaxllm-masks-") as scratch:
        config = {**TINY, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        (Path(scratch) / "config.json").write_text(json.dumps(config))
        tokenizer.save_pretrained(scratch)
        with mock.patch.object(Runner, "_compile", lambda self, program: None):
            llm = LLM(
                scratch,
                load_format="dummy",
                max_num_seqs=sequences,
                max_model_len=1024,
                async_scheduling=overlapped,
                enable_prefix_caching=False,
                disable_log_stats=True,
            )
        try:
            yield llm.llm_engine
        finally:
            llm.shutdown()


def measure(
    tokenizer: PreTrainedTokenizerFast,
    form: str,
    constraint: StructuredOutputsParams | None,
    write: Callable[[random.Random], str],
    *,
    sequences: int,
    steps: int,
    step_ms: float,
    masks_first: bool,
    seed: int,
) -> Waiting:
    """Steps in which all sequences write documents of a form, token by token.

    Raises:
        RuntimeError: a document ended too early, or does not fit.
    """
    from jaxllm import SamplingParams, TokensPrompt
    from jaxllm.sampling_params import RequestOutputKind

    rng = random.Random(seed)
    documents = {
        f"r{i}": list(tokenizer.encode(write(rng), add_special_tokens=False)) for i in range(sequences)
    }
    steps += _WARM_UP
    if (shortest := min(map(len, documents.values()))) <= steps + 2:
        raise RuntimeError(f"a document of {shortest} tokens is too short for {steps} steps")
    with _engine(tokenizer, sequences, overlapped=not masks_first) as engine:
        device = ClockDevice(engine, documents, step_ms, masks_first)
        engine.runner.executor = device
        params = SamplingParams(
            temperature=0.0,
            max_tokens=steps + 2,
            ignore_eos=True,
            structured_outputs=constraint,
            output_kind=RequestOutputKind.DELTA,
        )
        for name in documents:
            engine.add_request(name, TokensPrompt(prompt_token_ids=[1, 2]), params)
        failed = None
        while engine.has_unfinished_requests():
            for output in engine.step():
                failed = failed or output.error
        if failed is not None:
            raise RuntimeError(f"a document of {form} does not fit its own form: {failed}")
    return Waiting(form, masks_first, device.idle_ms[_WARM_UP:steps])

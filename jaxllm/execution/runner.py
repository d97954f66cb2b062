"""Runs plans: packs one into a batch, calls the compiled step, and hands the result back as plain data."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.execution.abstract import (
    abstract_cache,
    abstract_parameters,
    abstract_state,
    empty_cache,
    everywhere,
    lower_step,
    shardings_of,
)
from jaxllm.execution.batch import FLOATS, INTEGERS, HostBatch, StepShape
from jaxllm.execution.buckets import step_shapes
from jaxllm.execution.compiler import StepCompiler
from jaxllm.execution.host_pages import HostPages
from jaxllm.execution.sampler import Logprobs, LogprobsMode, SamplerState
from jaxllm.execution.sleep import Sleep
from jaxllm.execution.slots import SlotTable
from jaxllm.execution.step import StepOutput, step
from jaxllm.execution.token_masks import TokenMasks
from jaxllm.models.decoder import Decoder
from jaxllm.models.parameters import Parameters
from jaxllm.scheduling.plan import Plan, RequestUpdate, ScheduledRequest, StepResult, TokenLogprobs

_COLUMN = {name: row for row, name in enumerate(INTEGERS)}


class PendingResult:
    """A step that was launched; `result` waits for the device.

    Attributes:
        shape: what it was compiled for.
    """

    def __init__(
        self,
        plan: Plan,
        shape: StepShape,
        output: StepOutput,
        wants_logprobs: bool,
        prompt_rows: dict[int, int],
    ) -> None:
        self.shape = shape
        self._plan = plan
        self._output = output
        self._wants_logprobs = wants_logprobs
        self._prompt_rows = prompt_rows

    def result(self) -> StepResult:
        """The sampled tokens, and the log-probabilities that somebody asked for."""
        scheduled = self._plan.scheduled
        sampled = np.asarray(self._output.token_ids).tolist()
        token_ids = [
            [token] if entry.samples else [] for entry, token in zip(scheduled, sampled, strict=False)
        ]
        logprobs: list[list[TokenLogprobs] | None] = [None] * len(scheduled)
        if self._wants_logprobs:
            rows = _LogprobRows(self._output.logprobs)
            for row, entry in enumerate(scheduled):
                wanted = entry.request.sampling_params.logprobs
                if wanted is not None and entry.samples:
                    logprobs[row] = [rows.at(row, wanted)]
        result = StepResult(token_ids, logprobs)
        if self._prompt_rows and self._output.prompt_logprobs is not None:
            rows = _LogprobRows(self._output.prompt_logprobs)
            for row, first in self._prompt_rows.items():
                entry = scheduled[row]
                count = min(entry.num_tokens, entry.request.num_prompt_tokens - 1 - entry.start)
                wanted = entry.request.sampling_params.prompt_logprobs or 0
                result.prompt_logprobs[row] = [rows.at(first + i, wanted) for i in range(count)]
        return result


class _LogprobRows:
    """Log-probabilities of a batch on the host."""

    def __init__(self, logprobs: Logprobs) -> None:
        self.chosen, self.rank, self.top_ids, self.top = (np.asarray(x) for x in logprobs)

    def at(self, row: int, wanted: int) -> TokenLogprobs:
        k = self.top.shape[1] if wanted < 0 else wanted
        return TokenLogprobs(
            float(self.chosen[row]), int(self.rank[row]), self.top_ids[row, :k], self.top[row, :k]
        )


class Runner:
    """The device's side of an engine: parameters, KV cache, sampler state and compiled steps.

    Args:
        decoder: the model's graph. Steps compile from the moment there is a runner, while the weights
            are still loading.
        num_pages: of the KV cache, with the null page.
        num_host_pages: kept in the host's memory for those who are preempted.
        num_logprobs: most probable tokens reported per position; requests may ask for up to so many.
        compile_all: compile every shape before the first step, and none after.

    Attributes:
        load: loads the parameters again, for a runner that slept without them.
    """

    load: Callable[[], Parameters]

    def __init__(
        self,
        decoder: Decoder,
        *,
        num_pages: int,
        num_host_pages: int,
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int,
        num_logprobs: int,
        logprobs_mode: LogprobsMode,
        compiler_options: dict[str, bool | str],
        compile_all: bool,
    ) -> None:
        model = decoder.config
        self._decoder = decoder
        self._num_logprobs = min(num_logprobs, model.vocab_size)
        self._logprobs_mode = logprobs_mode
        self._compiler_options = compiler_options
        pages_per_seq = -(-max_model_len // page_size)
        self._abstract_params = abstract_parameters(decoder)
        self._abstract_cache = abstract_cache(decoder, num_pages, page_size)
        self.num_host_pages = num_host_pages
        self._host_pages = HostPages(self._abstract_cache, num_host_pages) if num_host_pages else None
        self._create_state = self._state_factory(max_num_seqs)
        self._abstract_state = abstract_state(self._create_state, decoder.form.mesh)
        self._masks = TokenMasks(model.vocab_size, decoder.fitted.vocab_size, everywhere(decoder))
        self._slots = SlotTable(max_num_seqs, pages_per_seq, decoder.fitted.vocab_size)
        shapes = self._shapes(step_shapes(max_num_seqs, max_num_batched_tokens, pages_per_seq))
        self.compiler = StepCompiler(self._compile, shapes, complete=compile_all)

    # What a runner of another kind of model has otherwise

    def _shapes(self, shapes: list[StepShape]) -> list[StepShape]:
        """Those of all shapes that are needed."""
        return shapes

    def _step(self, shape: StepShape) -> Callable[..., Any]:
        """The function that a shape's executable computes."""
        return functools.partial(
            step,
            decoder=self._decoder,
            shape=shape,
            num_logprobs=self._num_logprobs,
            logprobs_mode=self._logprobs_mode,
        )

    def _state_factory(self, max_num_seqs: int) -> Callable[[], Any]:
        """What makes the state that steps hand on to one another."""
        return functools.partial(SamplerState.create, max_num_seqs, self._decoder.fitted.vocab_size)

    def _warm_up(self) -> None:
        """Compiles what runs beside the steps."""
        self._slots.warm_up(self._state)

    def _pending(
        self, plan: Plan, shape: StepShape, output: Any, wants_logprobs: bool, prompt_rows: dict[int, int]
    ) -> PendingResult:
        """What waits for a step's output."""
        return PendingResult(plan, shape, output, wants_logprobs, prompt_rows)

    def _compile(self, shape: StepShape) -> Any:
        arrays = (self._abstract_params, self._abstract_cache, self._abstract_state)
        masks = self._masks.abstract(shape.num_seqs)
        lowered = lower_step(self._step(shape), self._decoder, *arrays, masks, shape)
        return lowered.compile(self._compiler_options)

    def start(self, params: Parameters, *, progress: bool) -> None:
        """Takes the weights, makes the cache, and waits until every plan can run."""
        self._sleep: Sleep | None = None
        self._params = params
        self._kv_pages = empty_cache(self._abstract_cache)
        if self._host_pages is not None:
            self._kv_pages = self._host_pages.warm_up(self._kv_pages)
        self._state = jax.jit(self._create_state, out_shardings=shardings_of(self._abstract_state))()
        self._warm_up()
        self.compiler.wait(progress)

    def prepare(self, updates: Sequence[RequestUpdate]) -> None:
        """Begins what the next step of these requests needs, while the host does something else."""
        self._masks.begin(update.request for update in updates)

    def execute(self, plan: Plan) -> PendingResult:
        """Launches a plan and returns without waiting for the device."""
        for request in plan.released:
            self._slots.release(request)
        if self._host_pages is not None:
            self._kv_pages = self._host_pages.copy(self._kv_pages, plan.copies_out, plan.copies_in)
        self._state = self._slots.admit(self._state, plan.scheduled)
        reports_prompt = [
            entry.request.sampling_params.prompt_logprobs is not None
            and entry.start < entry.request.num_prompt_tokens - 1
            for entry in plan.scheduled
        ]
        decode_only = plan.num_tokens == len(plan.scheduled) and not any(reports_prompt)
        shape, run = self.compiler.executable(plan.num_tokens, len(plan.scheduled), decode_only)
        batch, wants_logprobs, prompt_rows = self._pack(plan.scheduled, shape, reports_prompt)
        masks, has_masks = self._masks.of(plan.scheduled, shape.num_seqs)
        batch.flags[:] = wants_logprobs, bool(prompt_rows), has_masks
        self._kv_pages, self._state, output = run(
            self._params, self._kv_pages, self._state, batch.integers, batch.floats, masks
        )
        return self._pending(plan, shape, output, wants_logprobs, prompt_rows)

    def _pack(
        self, scheduled: Sequence[ScheduledRequest], shape: StepShape, reports_prompt: list[bool]
    ) -> tuple[HostBatch, bool, dict[int, int]]:
        """A plan as arrays, whether it wants logprobs, and the first row of those with prompt logprobs."""
        batch = HostBatch(shape)
        count = len(scheduled)
        slots = self._slots.of(scheduled)
        starts, tokens, wants_logprobs = [0], [], False
        prompt_rows: dict[int, int] = {}
        lengths, rope_lengths, samples, drawn = [], [], [], []
        for row, (request, start, num_tokens, is_sampled) in enumerate(scheduled):
            end = start + num_tokens
            known = request.token_ids[start:end]
            tokens += known
            if len(known) < num_tokens:
                tokens.append(-1)  # its newest token is still on the device
            if reports_prompt[row]:
                first = starts[-1]
                targets = request.prompt_token_ids[start + 1 : end + 1]
                batch.targets[first : first + len(targets)] = targets
                prompt_rows[row] = first
            if request.token_type_ids is not None:
                types = request.token_type_ids[start:end]
                batch.targets[starts[-1] : starts[-1] + num_tokens] = types
            wants_logprobs |= request.sampling_params.logprobs is not None
            starts.append(starts[-1] + num_tokens)
            lengths.append(end)
            rope_lengths.append(request.num_prompt_tokens)
            samples.append(is_sampled)
            drawn.append(end - request.num_prompt_tokens)
        total = starts[-1]
        batch.token_ids[:total] = tokens
        batch.query_starts[: count + 1] = starts
        batch.query_starts[count + 1 :] = total
        query_lens = np.diff(batch.query_starts[: count + 1])
        first_positions = np.asarray(lengths, np.int32) - query_lens
        batch.positions[:total] = np.arange(total) + np.repeat(
            first_positions - batch.query_starts[:count], query_lens
        )
        columns = batch.seq_integers
        columns[_COLUMN["slots"], count:] = self._slots.padding_slot
        columns[_COLUMN["seq_lens"], :count] = lengths
        columns[_COLUMN["rope_lengths"], :count] = rope_lengths
        columns[_COLUMN["slots"], :count] = slots
        columns[_COLUMN["samples"], :count] = samples
        columns[_COLUMN["positions"], :count] = drawn
        for name in ("seeds", "top_k", "penalties", "bias"):
            columns[_COLUMN[name], :count] = self._slots.integers[name][slots]
        batch.seq_floats[:, count:] = np.ones((len(FLOATS), 1), np.float32)
        batch.seq_floats[:, :count] = self._slots.floats[:, slots]
        batch.page_table[:count] = self._slots.page_table[slots]
        return batch, wants_logprobs, prompt_rows

    def sleep(self, level: int) -> None:
        """Lets go of the cache and, to the host's memory (level 1) or for good (level 2), of the weights."""
        self._sleep = Sleep(self._params, self._kv_pages, keep_weights=level == 1, load=self.load)
        del self._params, self._kv_pages

    def wake_up(self, tags: Collection[str] | None = None) -> bool:
        """Brings back what the tags name, see `Sleep`; whether the runner is awake then."""
        if self._sleep is not None and (arrays := self._sleep.wake(tags)) is not None:
            self._params, self._kv_pages = arrays
            self._sleep = None
        return self._sleep is None

    def close(self) -> None:
        """Stops compiling, and filling masks."""
        self.compiler.close()
        self._masks.close()

"""Runs plans: packs one into a batch, calls the compiled step, and hands the result back as plain data."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np

from jaxllm.execution.abstract import (
    abstract_cache,
    abstract_hidden,
    abstract_parameters,
    abstract_state,
    by_replica,
    empty_cache,
    laid_out,
    lower_sample_late,
    lower_step,
    shardings_of,
)
from jaxllm.execution.batch import HostBatch, LateShape, Program, StepShape
from jaxllm.execution.buckets import step_shapes
from jaxllm.execution.commands import (
    Command,
    CopyPages,
    Executor,
    InProcess,
    RunStep,
    SampleLate,
    SleepAt,
    WakeUp,
    WriteBias,
    WriteCounts,
)
from jaxllm.execution.compiler import StepCompiler
from jaxllm.execution.host_pages import HostPages
from jaxllm.execution.packing import fill_batch, is_late, late_rows, reports_prompt
from jaxllm.execution.pending import HalfDone, Launched, Packed, Pending, PendingResult
from jaxllm.execution.sampler import LogprobsMode, SamplerState
from jaxllm.execution.sleep import Sleep, check_tags
from jaxllm.execution.slots import SlotTable
from jaxllm.execution.state_rows import StateRows
from jaxllm.execution.step import sample_late, step
from jaxllm.execution.token_masks import TokenMasks
from jaxllm.models.decoder import Decoder
from jaxllm.models.parameters import Parameters
from jaxllm.request import Request
from jaxllm.scheduling.plan import Plan, ScheduledRequest


def _one_after_the_other(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _stacked(of_stages: list[np.ndarray]) -> np.ndarray:
    return of_stages[0] if len(of_stages) == 1 else np.stack(of_stages)


def _as_taken(kv_pages: Any, hidden: Any) -> Any:
    """The cache as the decoder takes it: in a pipeline with what the stages hand to one another."""
    return kv_pages if hidden is None else (kv_pages, hidden)


class Runner:
    """The device's side of an engine: parameters, KV cache, sampler state and compiled steps.

    `execute` and whatever else its owner calls turn into commands, which `executor` has done by `run`:
    of this runner, and where several hosts share a model, of the runner of each.

    Where the decoder is a pipeline, each stage works on a batch of its own in every step: a plan enters
    the first stage in the step in which it is launched, and is complete with the step of the last one.
    A step runs in the shape that takes the largest of the batches under way.

    Args:
        decoder: the model's graph. Steps compile from the moment there is a runner, while the weights
            are still loading.
        num_pages: of the KV cache of each replica, with the null page.
        num_host_pages: kept in the host's memory for those who are preempted, for each replica.
        num_logprobs: most probable tokens reported per position; requests may ask for up to so many.
        compile_all: compile every shape before the first step, and none after.
        samples_late: requests may come whose next token depends on what only the host knows (a grammar).

    Attributes:
        load: loads the parameters again, for a runner that slept without them.
        executor: has commands done.
        samples: whether its steps end in tokens.
    """

    samples = True
    load: Callable[[], Parameters]
    executor: Executor

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
        samples_late: bool,
    ) -> None:
        model = decoder.config
        self.executor = InProcess(self.run)
        self._decoder = decoder
        self._num_logprobs = min(num_logprobs, model.vocab_size)
        self._logprobs_mode = logprobs_mode
        self._compiler_options = compiler_options
        pages_per_seq = -(-max_model_len // page_size)
        self._abstract_params = abstract_parameters(decoder)
        self._abstract_cache = abstract_cache(decoder, num_pages, page_size)
        self._abstract_hidden = abstract_hidden(decoder, max_num_batched_tokens)
        # What is in each stage, from the first: a plan or None. That of the last one is complete.
        self._stages: deque[Launched | None] = deque([None] * decoder.form.num_stages)
        self._half_done: HalfDone | None = None
        self.num_host_pages = num_host_pages
        self._replicas = decoder.form.axis_size("data")
        self._host_pages = (
            HostPages(self._abstract_cache, num_host_pages * self._replicas) if num_host_pages else None
        )
        self._create_state = self._state_factory(max_num_seqs)
        self._abstract_state = abstract_state(self._create_state, decoder.form.mesh)
        vocab_size = decoder.fitted.vocab_size
        self._masks = TokenMasks(model.vocab_size, vocab_size, by_replica(decoder), self._replicas)
        self._slots = SlotTable(max_num_seqs, pages_per_seq, vocab_size, self._replicas)
        shapes = self._shapes(step_shapes(max_num_seqs, max_num_batched_tokens, pages_per_seq))
        self.compiler = StepCompiler(
            self._compile, shapes, complete=compile_all, late=self.samples and samples_late
        )

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
        vocab_size = self._decoder.fitted.vocab_size
        return functools.partial(SamplerState.create, max_num_seqs, vocab_size, self._replicas)

    def _wants_more(self, request: Request) -> bool:
        """Whether a request wants what a step computes only where somebody does: logprobs."""
        return request.sampling_params.logprobs is not None

    def _warm_up(self) -> None:
        """Compiles what runs beside the steps."""
        self._rows = StateRows(self._state, self._decoder.fitted.vocab_size)

    def _pending(self, plan: Plan, shape: StepShape, packed: Packed) -> Pending:
        """What waits for a plan's output."""
        return PendingResult(plan, shape, packed, self.advance)

    def _compile(self, program: Program) -> Any:
        decoder, state = self._decoder, self._abstract_state
        run: Callable[..., Any]
        if isinstance(program, LateShape):
            run = functools.partial(
                sample_late,
                num_logprobs=self._num_logprobs,
                logprobs_mode=self._logprobs_mode,
                top_k=decoder.top_k,
            )
            masks = self._masks.abstract(program.num_seqs)
            lowered = lower_sample_late(run, decoder, state, masks, self._num_logprobs)
        else:
            cache = _as_taken(self._abstract_cache, self._abstract_hidden)
            run = self._step(program)
            lowered = lower_step(run, decoder, self._abstract_params, cache, state, program)
        return lowered.compile(self._compiler_options)

    def start(self, params: Parameters, *, progress: bool) -> None:
        """Takes the weights, makes the cache, and waits until every plan can run."""
        self._sleep: Sleep | None = None
        # What `sample_late` completes: the last step's output, and its logits.
        self._sampled: Any = None
        self._params = laid_out(params, self._abstract_params)
        self._kv_pages = empty_cache(self._abstract_cache)
        if self._host_pages is not None:
            self._kv_pages = self._host_pages.warm_up(self._kv_pages)
        self._hidden = None if self._abstract_hidden is None else empty_cache(self._abstract_hidden)
        self._state = jax.jit(self._create_state, out_shardings=shardings_of(self._abstract_state))()
        self._warm_up()
        self.compiler.wait(progress)

    def prepare(self) -> None:
        """Begins the masks of the step under way, on a thread: every plan before it has been applied."""
        half = self._half_done
        if half is not None and half.masks is None:
            half.masks = self._masks.begin(half.late_rows(), half.num_seqs)

    def execute(self, plan: Plan) -> Pending:
        """Launches a plan and returns without waiting for the device."""
        self._complete()
        for request in plan.released:
            self._release(request)
        if plan.copies_out or plan.copies_in:
            # Later stages have yet to write to pages that the first one is done with.
            self._empty_stages()
            self.executor.launch(CopyPages(plan.copies_out, plan.copies_in))
        parts = [() if part is None else part.scheduled for part in plan.of_replicas]
        for replica, scheduled in enumerate(parts):
            if not self._slots.has_room_for(scheduled, replica):
                self._empty_stages()
            for write in self._slots.admit(scheduled, replica):
                self.executor.launch(write)
        launched = self._pack(plan, parts)
        self._launch_step(launched)
        return launched.pending

    def advance(self) -> None:
        """Completes a step that is half done, or else takes what is under way on by one stage."""
        if self._half_done is not None:
            self._complete()
        else:
            self._launch_step(None)

    def _complete(self) -> None:
        """Samples what the last step left out; nothing happens where it left out nobody."""
        half, self._half_done = self._half_done, None
        if half is None:
            return
        late = half.late_rows()
        for write in self._slots.admit_late(row.request for row in late):
            self.executor.launch(write)
        masks = self._masks.of(late, half.num_seqs) if half.masks is None else half.masks.result()
        arrays = zip(*(batch.late_arrays() for batch in half.batches), strict=True)
        integers, floats = (_one_after_the_other(list(of_replicas)) for of_replicas in arrays)
        output = self.executor.launch(SampleLate(half.num_seqs, integers, floats, masks))
        half.pending.output = output

    def _launch_step(self, entering: Launched | None) -> None:
        """One step of all stages; the plan in the last of them is complete with it, but for its late rows."""
        stages = self._stages
        stages.pop()
        stages.appendleft(entering)
        under_way = [launched for launched in stages if launched is not None]
        if not under_way:
            return
        shape = under_way[0].shape
        if any(launched.shape != shape for launched in under_way):
            shape = self.compiler.choose(
                max(launched.num_tokens for launched in under_way),
                max(launched.num_seqs for launched in under_way),
                all(launched.decode_only for launched in under_way),
                late=any(launched.late for launched in under_way),
            )
        batches = [
            [HostBatch(shape, self._slots.padding_slot)] * self._replicas
            if launched is None
            else [batch.resized(shape) for batch in launched.batches]
            for launched in stages
        ]
        integers = [_one_after_the_other([batch.integers for batch in of_stage]) for of_stage in batches]
        floats = [_one_after_the_other([batch.floats for batch in of_stage]) for of_stage in batches]
        output = self.executor.launch(RunStep(shape, _stacked(integers), _stacked(floats)))
        leaving = stages[-1]
        if leaving is not None:
            if leaving.shape != shape:
                leaving.packed.move(leaving.shape, shape)
            if leaving.late:
                rows = late_rows(leaving.plan, leaving.packed)
                self._half_done = HalfDone(leaving.pending, batches[-1], rows)
            else:
                leaving.pending.output = output
            self._slots.free(leaving.slots)

    def _empty_stages(self) -> None:
        """Takes everything that is under way through the last stage."""
        while any(launched is not None for launched in list(self._stages)[:-1]):
            self.advance()
        self._complete()

    def _release(self, request: Request) -> None:
        """Frees the slot of a request that stopped running: now, or once a token still wanted was sampled.

        What other batches under way would write to the slot, they write to that of padding.
        """
        slot = self._slots.release(request)
        if slot is None:
            return
        freed_by: list[int] | None = None
        for launched in list(self._stages)[:-1]:
            for row, entry in enumerate(launched.plan.scheduled if launched is not None else ()):
                if launched is None or entry.request is not request:
                    continue
                if entry.samples and not request.status.is_finished:
                    freed_by = launched.slots
                else:
                    replica, at = divmod(launched.packed.rows[row], launched.shape.num_seqs)
                    column = launched.batches[replica].column
                    column["samples"][at] = False
                    column["slots"][at] = self._slots.padding_slot
        if freed_by is None:
            self._slots.free([slot])
        else:
            freed_by.append(slot)

    def _pack(self, plan: Plan, parts: Sequence[Sequence[ScheduledRequest]]) -> Launched:
        """A plan as arrays, for each replica its part; all in the shape that the fullest of them needs."""
        num_tokens = max(0 if part is None else part.num_tokens for part in plan.of_replicas)
        num_seqs = max(map(len, parts))
        packed = Packed(self._replicas, any(map(reports_prompt, plan.scheduled)))
        decode_only = plan.num_tokens == len(plan.scheduled) and not packed.reports_prompts
        late = any(map(is_late, plan.scheduled))
        shape = self.compiler.choose(num_tokens, num_seqs, decode_only, late=late)
        batches = []
        for replica, scheduled in enumerate(parts):
            batch = HostBatch(shape, self._slots.padding_slot)
            fill_batch(batch, scheduled, self._slots, packed, replica)
            batches.append(batch)
        packed.wants_logprobs = any(self._wants_more(entry.request) for entry in plan.scheduled)
        for batch in batches:
            batch.flags[:] = packed.wants_logprobs, packed.reports_prompts
        pending = self._pending(plan, shape, packed)
        return Launched(plan, shape, batches, num_tokens, num_seqs, decode_only, late, packed, pending)

    def run(self, command: Command) -> Any:
        """Does a command on the devices of this process, without waiting for them.

        Returns:
            The output of a step; of `WakeUp` whether all is awake; otherwise None.
        """
        match command:
            case RunStep(shape, integers, floats):
                run = self.compiler.executable(shape)
                cache = _as_taken(self._kv_pages, self._hidden)
                self._sampled = None  # Its memory is what the next logits take.
                cache, self._state, *self._sampled = run(self._params, cache, self._state, integers, floats)
                self._kv_pages, self._hidden = (cache, None) if self._hidden is None else cache
                return self._sampled[0]
            case SampleLate(num_seqs, integers, floats, masks):
                run, (output, logits) = self.compiler.executable(LateShape(num_seqs)), self._sampled
                self._sampled = None
                allowed = self._masks.unrestricted(num_seqs) if masks is None else masks
                sampled = output.token_ids, output.logprobs
                self._state, *sampled = run(self._state, logits, integers, floats, allowed, *sampled)
                return output._replace(token_ids=sampled[0], logprobs=sampled[1])
            case WriteCounts() | WriteBias():
                self._state = self._rows.write(self._state, command)
            case CopyPages(out, into):
                assert self._host_pages is not None  # Nobody plans copies otherwise.
                self._kv_pages = self._host_pages.copy(self._kv_pages, out, into)
            case SleepAt(level):
                weights_stay = level == 1
                self._sleep = Sleep(self._params, self._kv_pages, keep_weights=weights_stay, load=self.load)
                del self._params, self._kv_pages
            case WakeUp(tags):
                if self._sleep is not None and (awake := self._sleep.wake(tags)) is not None:
                    params, self._kv_pages = awake
                    self._params = laid_out(params, self._abstract_params)
                    self._sleep = None
                return self._sleep is None
        return None

    def sleep(self, level: int) -> None:
        """Lets go of the cache and, to the host's memory (level 1) or for good (level 2), of the weights."""
        self.executor.launch(SleepAt(level))()

    def wake_up(self, tags: Collection[str] | None = None) -> bool:
        """Brings back what the tags name, see `Sleep`; whether the runner is awake then.

        Raises:
            InvalidRequestError: an unknown tag.
        """
        check_tags(tags)
        return self.executor.launch(WakeUp(None if tags is None else tuple(tags)))()

    def close(self) -> None:
        """Stops compiling, and filling masks."""
        self.executor.close()
        self.compiler.close()
        self._masks.close()

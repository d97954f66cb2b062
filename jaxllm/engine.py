"""The engine: requests in, outputs out. `step` is the main loop's one turn."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable
from typing import Any

import jax

from jaxllm.config import EngineConfig, SchedulerConfig
from jaxllm.errors import EngineDeadError, InvalidRequestError
from jaxllm.execution.build import build_runner, read_model
from jaxllm.execution.hosts.connect import connected_hosts, execute_on_hosts
from jaxllm.execution.hosts.group import HostGroup
from jaxllm.execution.pending import Pending
from jaxllm.execution.platform import current_platform
from jaxllm.execution.resolve import resolve
from jaxllm.execution.runner import Runner
from jaxllm.input_processor import InputProcessor
from jaxllm.inputs import PromptType
from jaxllm.models.config import ModelConfig
from jaxllm.models.hub import read_generation_config
from jaxllm.output_processor import OutputProcessor
from jaxllm.outputs import RequestOutput
from jaxllm.pooling_processor import PoolingProcessor
from jaxllm.request import NO_TERMS, Request, RequestStatus, SchedulingTerms
from jaxllm.sampling_params import SamplingParams
from jaxllm.scheduling import ReplicatedScheduler, Scheduler, SchedulingPolicy, load_policy, make_scheduler
from jaxllm.scheduling.plan import Plan, RequestUpdate
from jaxllm.scheduling.recording.lines import check_writable
from jaxllm.scheduling.recording.recorder import Recorder, TraceRecorder
from jaxllm.scheduling.recording.schedule_recorder import ScheduleRecorder
from jaxllm.stats import EngineStats, ReplicaStats, record_end, record_step
from jaxllm.text.tokenizer import get_tokenizer
from jaxllm.tracing import make_exporter, start_tracing

logger = logging.getLogger(__name__)


class Engine:
    """Completes requests in one continuous batch. Synchronous, and for one thread at a time.

    Attributes:
        config: resolved: nothing in it is left to be decided.
        model_config: the model's architecture.
        tokenizer: of Hugging Face, or None with `skip_tokenizer_init`.
        input_processor: turns prompts into requests; may be called from any thread.
        is_sleeping: whether it has let go of its device memory, see `sleep`.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_config: ModelConfig,
        runner: Runner,
        scheduler: Scheduler | ReplicatedScheduler,
        input_processor: InputProcessor,
        tokenizer: Any,
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.tokenizer = tokenizer
        self.input_processor = input_processor
        self.runner = runner
        self.scheduler = scheduler
        self._output_processor: OutputProcessor | PoolingProcessor = (
            OutputProcessor(tokenizer) if model_config.pooler is None else PoolingProcessor(model_config)
        )
        self._in_flight: deque[tuple[Plan, Pending]] = deque()
        # One to each stage, and one that waits while the host takes in the oldest one's result.
        self._max_in_flight = config.pipeline_parallel_size + int(config.async_scheduling)
        self._stats = EngineStats()
        self.is_sleeping = False
        self._recorders = self._start_recorders()

    def _start_recorders(self) -> list[Recorder]:
        config, start = self.config, time.monotonic()
        recorders: list[Recorder] = []
        if config.record_schedule is not None:
            about = {
                "model": config.model,
                "dtype": config.dtype,
                "device": jax.devices()[0].device_kind,
                "policy": config.scheduling_policy,
                "policy_config": config.scheduling_config,
                "max_in_flight": self._max_in_flight,
                "shapes": [(s.num_tokens, s.num_seqs, s.decode_only) for s in self.runner.compiler.shapes],
            }
            recorders.append(ScheduleRecorder(config.record_schedule, self.scheduler, about, start))
        if config.record_trace is not None:
            recorders.append(TraceRecorder(config.record_trace, config.block_size, start))
        if config.otlp_traces_endpoint is not None:
            recorders.append(start_tracing(config.otlp_traces_endpoint, config.model))
        return recorders

    def add_recorder(self, recorder: Recorder) -> None:
        """Tell a recorder what happens from now on; what runs already, it has to ask the scheduler."""
        self._recorders.append(recorder)

    def remove_recorder(self, recorder: Recorder) -> None:
        """Tell a recorder nothing more, and close it; nothing happens where it was never added."""
        if recorder in self._recorders:
            self._recorders.remove(recorder)
            recorder.close()

    @classmethod
    def from_config(cls, config: EngineConfig) -> Engine:
        """Loads the model and compiles the steps that every plan needs; see `EngineConfig`.

        Raises:
            ConfigError, UnsupportedError, ModelNotFoundError, CheckpointError, InsufficientMemoryError:
                what their names say, with what to do about it.
            HostError: another host did not come, or failed.
        """
        policy = load_policy(config.scheduling_policy, config.scheduling_config)
        for name in ("record_schedule", "record_trace"):
            if getattr(config, name) is not None:
                check_writable(getattr(config, name), name)
        if config.otlp_traces_endpoint is not None:
            make_exporter(config.otlp_traces_endpoint).shutdown()
        with connected_hosts(config) as hosts:
            return cls._load(config, policy, hosts)

    @classmethod
    def _load(cls, config: EngineConfig, policy: SchedulingPolicy, hosts: HostGroup | None) -> Engine:
        path, model_config = read_model(config)
        platform = current_platform()
        config = resolve(config, model_config, platform)
        tokenizer = None
        if not config.skip_tokenizer_init:
            tokenizer = get_tokenizer(
                config.tokenizer or str(path),
                revision=config.tokenizer_revision or config.revision,
                trust_remote_code=config.trust_remote_code,
                download_dir=config.download_dir,
            )
        input_processor = InputProcessor(tokenizer, model_config, config, read_generation_config(path))
        runner, num_pages = build_runner(
            config, model_config, path, platform, progress=not config.disable_log_stats, hosts=hosts
        )
        if hosts is not None:
            execute_on_hosts(runner, hosts, config)
        scheduler = make_scheduler(
            SchedulerConfig(
                max_num_seqs=config.max_num_seqs or 1,
                max_num_batched_tokens=config.max_num_batched_tokens or 1,
                max_model_len=config.max_model_len or 1,
                page_size=config.block_size,
                num_pages=num_pages,
                num_host_pages=runner.num_host_pages,
                enable_prefix_caching=config.enable_prefix_caching,
                enable_chunked_prefill=config.enable_chunked_prefill,
                long_prefill_token_threshold=config.long_prefill_token_threshold,
                policy=config.scheduling_policy,
                reschedule_in_flight=config.async_scheduling,
                num_stages=config.pipeline_parallel_size,
                data_parallel_size=config.data_parallel_size,
            ),
            policy,
        )
        engine = cls(config, model_config, runner, scheduler, input_processor, tokenizer)
        engine._stats.cache_config = {
            "block_size": str(config.block_size),
            "num_gpu_blocks": str(num_pages - 1),
            "enable_prefix_caching": str(config.enable_prefix_caching),
            "cache_dtype": config.dtype,
        }
        return engine

    def step(self) -> list[RequestOutput]:
        """One turn: launch what can be launched, then take in the oldest step's result.

        While the host applies one step, the device computes the next.
        """
        while len(self._in_flight) < self._max_in_flight and (plan := self.scheduler.schedule()) is not None:
            pending = self.runner.execute(plan)
            self._in_flight.append((plan, pending))
            self._note_launch(plan, pending)
        if not self._in_flight:
            return []
        plan, pending = self._in_flight.popleft()
        updates = self.scheduler.apply(plan, pending.result())
        self.runner.prepare()
        return self._process(plan, updates, time.monotonic())

    def _note_launch(self, plan: Plan, pending: Pending) -> None:
        now = time.monotonic()
        for entry in plan.scheduled:
            if entry.request.first_scheduled_time is None:
                entry.request.first_scheduled_time = now
        for recorder in self._recorders:
            recorder.planned(plan, pending.shape, now)

    def _process(self, plan: Plan, updates: list[RequestUpdate], now: float) -> list[RequestOutput]:
        record_step(self._stats, plan, updates, now)
        for recorder in self._recorders:
            recorder.applied(plan, updates, now)
        outputs, stopped = self._output_processor.process(updates, now)
        for request, stop_string in stopped:
            self.scheduler.finish(request, RequestStatus.FINISHED_STOPPED, stop_string)
            self._note_end(request, now)
        return outputs

    def _note_end(self, request: Request, now: float) -> None:
        record_end(self._stats, request, now)
        for recorder in self._recorders:
            recorder.ended(request, now)

    def add_request(
        self,
        request_id: str,
        prompt: PromptType,
        params: SamplingParams,
        *,
        terms: SchedulingTerms = NO_TERMS,
        arrival_time: float | None = None,
    ) -> None:
        """Checks and takes in a user's request.

        Raises:
            InvalidRequestError: it cannot be served as it stands.
        """
        processed = self.input_processor.process(
            request_id, prompt, params, terms=terms, arrival_time=arrival_time
        )
        self.submit(processed.requests, processed.prompt)

    def submit(self, requests: list[Request], prompt: str | None) -> None:
        """Takes in the n sequences of a user's request that has been processed already."""
        if self.is_sleeping:
            raise InvalidRequestError("The engine is asleep: wake it with wake_up (POST /wake_up) first.")
        request_id = requests[0].group_id or requests[0].request_id
        self._output_processor.add(requests, prompt, requests[0].sampling_params, request_id)
        added: list[Request] = []
        try:
            for request in requests:
                self.scheduler.add(request)
                added.append(request)
        except Exception:
            for request in added:
                self.scheduler.finish(request, RequestStatus.FINISHED_ABORTED)
            self._output_processor.abort([request_id])
            raise
        for recorder in self._recorders:
            for request in requests:
                recorder.arrived(request)

    def abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        """Ends users' requests; unknown ids are ignored. Returns a last output for each."""
        ids, now = list(request_ids), time.monotonic()
        requests = [request for request_id in ids for request in self._output_processor.requests(request_id)]
        outputs = self._output_processor.abort(ids, now)
        for request in requests:
            if not request.status.is_finished:
                self.scheduler.finish(request, RequestStatus.FINISHED_ABORTED)
                self._note_end(request, now)
        return outputs

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything left to do."""
        return bool(self._in_flight) or self.scheduler.has_unfinished()

    def stats(self) -> EngineStats:
        """What the engine has counted; one object, which goes on changing."""
        scheduler, stats = self.scheduler, self._stats
        stats.num_requests_running = scheduler.num_running
        stats.num_requests_waiting = scheduler.num_waiting
        stats.kv_cache_usage = scheduler.kv_cache_usage
        stats.prefix_cache_queries = scheduler.prefix_cache_queries
        stats.prefix_cache_hits = scheduler.prefix_cache_hits
        stats.num_preemptions = scheduler.num_preemptions
        if isinstance(scheduler, ReplicatedScheduler):
            stats.replicas = [
                ReplicaStats(
                    replica.num_running,
                    replica.num_waiting,
                    replica.kv_cache_usage,
                    replica.prefix_cache_queries,
                    replica.prefix_cache_hits,
                    replica.num_preemptions,
                )
                for replica in scheduler.replicas
            ]
        return stats

    def reset_prefix_cache(self) -> bool:
        """Forgets all cached prefixes; False while requests hold pages."""
        done = self.scheduler.reset_prefix_cache()
        if done:
            for recorder in self._recorders:
                recorder.forgotten(time.monotonic())
        return done

    def sleep(self, level: int = 1) -> None:
        """Lets go of device memory until `wake_up`; the compiled steps stay, and no request is taken.

        Args:
            level: 1 keeps the weights in the host's memory; 2 does not, and they are loaded anew.

        Raises:
            InvalidRequestError: requests are running, or there is no such level.
        """
        if level not in (1, 2):
            raise InvalidRequestError(f"level={level!r}: there are levels 1 and 2.", param="level")
        while self._in_flight and not self.scheduler.has_unfinished():
            self.step()  # A step that was launched before its requests were known to have ended.
        if self.has_unfinished_requests():
            raise InvalidRequestError(
                "The engine has unfinished requests; let them end, or abort them, first."
            )
        if not self.is_sleeping:
            self.reset_prefix_cache()
            self.runner.sleep(level)
            self.is_sleeping = True

    def wake_up(self, tags: Collection[str] | None = None) -> bool:
        """Takes the device memory again, all of it or what the tags name.

        Args:
            tags: of "weights" and "kv_cache"; None is both.

        Returns:
            Whether the engine is awake, which takes both.
        """
        if self.is_sleeping:
            self.is_sleeping = not self.runner.wake_up(tags)
        return not self.is_sleeping

    def start_profile(self, directory: str) -> None:
        """Starts JAX's profiler, on this host; `stop_profile` writes a trace into the directory.

        Raises:
            InvalidRequestError: a profile is under way.
        """
        try:
            jax.profiler.start_trace(directory)
        except RuntimeError as error:
            raise InvalidRequestError(f"No profile can start ({error}); call stop_profile first.") from error

    def stop_profile(self) -> None:
        """Ends the profile that `start_profile` began.

        Raises:
            InvalidRequestError: none is under way.
        """
        try:
            jax.profiler.stop_trace()
        except RuntimeError as error:
            raise InvalidRequestError(
                f"There is no profile to stop ({error}); call start_profile first."
            ) from error

    def on_failure(self, callback: Callable[[EngineDeadError], None]) -> None:
        """Has somebody told, from any thread, when another host is gone; the next `step` raises it."""
        self.runner.executor.on_failure(callback)

    def shutdown(self) -> None:
        """Stops background compilation and recording; the engine takes no further steps."""
        self.runner.close()
        for recorder in self._recorders:
            recorder.close()

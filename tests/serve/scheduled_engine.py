"""The fake engine with a real scheduler: it pages, queues and preempts as the real one does."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from jaxllm.config import SchedulerConfig
from jaxllm.outputs import RequestOutput
from jaxllm.request import Request, RequestStatus
from jaxllm.scheduling import Scheduler, StepResult
from jaxllm.scheduling.plan import TokenLogprobs
from jaxllm.scheduling.recording.recorder import Recorder
from tests.serve.fake_engine import MAX_MODEL_LEN, FakeEngine


class ScheduledFakeEngine(FakeEngine):
    """Says what a script says, in steps that a scheduler plans."""

    def __init__(self, *, num_pages: int = 129, max_num_seqs: int = 8, **config: Any) -> None:
        super().__init__(**config)
        limits = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=64,
            max_model_len=MAX_MODEL_LEN,
            page_size=4,
            num_pages=num_pages,
        )
        self.scheduler = Scheduler(limits)
        self.recorders: list[Recorder] = []

    def add_recorder(self, recorder: Recorder) -> None:
        self.recorders.append(recorder)

    def remove_recorder(self, recorder: Recorder) -> None:
        self.recorders.remove(recorder)
        recorder.close()

    def submit(self, requests: list[Request], prompt: str | None) -> None:
        super().submit(requests, prompt)
        for request in requests:
            self.scheduler.add(request)
            for recorder in self.recorders:
                recorder.arrived(request)

    def abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        ids = set(request_ids)
        for request in [r for r in self._running if (r.group_id or r.request_id) in ids]:
            self._end(request, RequestStatus.FINISHED_ABORTED)
        return super().abort(ids)

    def _end(self, request: Request, status: RequestStatus) -> None:
        self.scheduler.finish(request, status)
        for recorder in self.recorders:
            recorder.ended(request, time.monotonic())

    def step(self) -> list[RequestOutput]:
        self.num_steps += 1
        assert self.gate.wait(30), "the test never opened the gate"
        if self.fail is not None:
            raise self.fail
        plan = self.scheduler.schedule()
        assert plan is not None
        for recorder in self.recorders:
            recorder.planned(plan, (64 if plan.num_tokens > 8 else 8, 8, False), time.monotonic())
        if self.step_time:
            time.sleep(self.step_time)
        result = StepResult([], [])
        for entry in plan.scheduled:
            request, params = entry.request, entry.request.sampling_params
            script = self._scripts[request.request_id]
            tokens = [script[request.num_output_tokens % len(script) - 1]] if entry.samples else []
            result.token_ids.append(tokens)
            wanted: list[TokenLogprobs] | None = None
            if params.logprobs is not None:
                wanted = [self._logprobs(token, params.logprobs) for token in tokens]
            result.logprobs.append(wanted)
        updates = self.scheduler.apply(plan, result)
        now = time.monotonic()
        for recorder in self.recorders:
            recorder.applied(plan, updates, now)
        outputs, stopped = self._outputs.process(updates, now)
        for request, _ in stopped:
            self._end(request, RequestStatus.FINISHED_STOPPED)
        self._running = [request for request in self._running if not request.status.is_finished]
        return outputs

    def has_unfinished_requests(self) -> bool:
        return self.scheduler.has_unfinished()

    def reset_prefix_cache(self) -> bool:
        done = self.scheduler.reset_prefix_cache()
        for recorder in self.recorders:
            recorder.forgotten(time.monotonic())
        return done

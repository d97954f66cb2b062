"""An engine without a model: it says what a script says, one token a step, through the real text path."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxllm.config import EngineConfig
from jaxllm.demo import demo_model_path
from jaxllm.input_processor import InputProcessor
from jaxllm.models.config import ModelConfig
from jaxllm.output_processor import OutputProcessor
from jaxllm.outputs import RequestOutput
from jaxllm.request import Request, RequestStatus
from jaxllm.scheduling.plan import RequestUpdate, TokenLogprobs
from jaxllm.stats import EngineStats, FinishedRequestStats
from jaxllm.text.tokenizer import get_tokenizer

MAX_MODEL_LEN = 256
REPLY = "The sky is blue, and so is the sea."

_tokenizer = None


def demo_tokenizer() -> Any:
    """The demo model's tokenizer, loaded once: tests must not depend on which tokens it makes."""
    global _tokenizer
    if _tokenizer is None:
        _tokenizer = get_tokenizer(demo_model_path())
    return _tokenizer


class FakeEngine:
    """Has the interface of `jaxllm.engine.Engine`.

    Attributes:
        reply: what a sequence says, unless its stops or its max_tokens end it before.
        step_time: seconds that a step takes.
        fail: raised by the next step.
        gate: steps wait until it is set.
        aborted: ids of requests that were aborted.
        submitted: every engine request ever submitted.
        threads: idents of the threads that called in.
    """

    def __init__(self, **config: Any) -> None:
        self.config = EngineConfig(**{"max_model_len": MAX_MODEL_LEN, **config})
        self.tokenizer = None if self.config.skip_tokenizer_init else demo_tokenizer()
        vocab_size = json.loads((demo_model_path() / "config.json").read_text())["vocab_size"]
        self.model_config = ModelConfig(
            architecture="Fake",
            vocab_size=vocab_size,
            hidden_size=8,
            intermediate_size=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            max_position_embeddings=MAX_MODEL_LEN,
        )
        self.input_processor = InputProcessor(self.tokenizer, self.model_config, self.config, {})
        self.reply: Callable[[Request], str] = lambda request: REPLY
        self.step_time = 0.0
        self.fail: BaseException | None = None
        self.gate = threading.Event()
        self.gate.set()
        self.refuse_submit: Exception | None = None
        self.aborted: list[str] = []
        self.submitted: list[Request] = []
        self.threads: set[int] = set()
        self.num_steps = 0
        self.resets = 0
        self.is_shut_down = False
        self._outputs = OutputProcessor(self.tokenizer)
        self._running: list[Request] = []
        self._scripts: dict[str, list[int]] = {}
        self._stats = EngineStats(cache_config={"block_size": "16", "num_gpu_blocks": "64"})

    def submit(self, requests: list[Request], prompt: str | None) -> None:
        self.threads.add(threading.get_ident())
        if self.refuse_submit is not None:
            raise self.refuse_submit
        user_id = requests[0].group_id or requests[0].request_id
        self._outputs.add(requests, prompt, requests[0].sampling_params, user_id)
        for request in requests:
            eos = next(iter(request.eos_token_ids), None)
            script = self._encode(self.reply(request))
            self._scripts[request.request_id] = script if eos is None else [*script, eos]
            self._running.append(request)
            self.submitted.append(request)

    def _encode(self, text: str) -> list[int]:
        return list(demo_tokenizer().encode(text, add_special_tokens=False))

    def abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        ids = list(request_ids)
        self.threads.add(threading.get_ident())
        self.aborted += ids
        outputs = self._outputs.abort(ids)
        self._running = [r for r in self._running if (r.group_id or r.request_id) not in ids]
        return outputs

    def step(self) -> list[RequestOutput]:
        self.threads.add(threading.get_ident())
        self.num_steps += 1
        assert self.gate.wait(30), "the test never opened the gate"
        if self.fail is not None:
            raise self.fail
        if self.step_time:
            time.sleep(self.step_time)
        now = time.monotonic()
        updates = [self._advance(request) for request in self._running]
        self._stats.record_step(num_tokens=len(updates), prompt_tokens=0, generation_tokens=len(updates))
        outputs, stopped = self._outputs.process(updates, now)
        for request, stop in stopped:
            request.status, request.stop_reason = RequestStatus.FINISHED_STOPPED, stop
        for request in self._running:
            if request.status.is_finished:
                self._record(request, now)
        self._running = [request for request in self._running if not request.status.is_finished]
        return outputs

    def _advance(self, request: Request) -> RequestUpdate:
        params = request.sampling_params
        first = request.num_output_tokens == 0
        script = self._scripts[request.request_id]
        token = script[request.num_output_tokens % len(script)]
        request.token_ids.append(token)
        request.first_token_time = request.first_token_time or time.monotonic()
        if token in request.eos_token_ids and not params.ignore_eos:
            request.status = RequestStatus.FINISHED_STOPPED
        elif token in (params.stop_token_ids or ()):
            request.status, request.stop_reason = RequestStatus.FINISHED_STOPPED, token
        elif request.num_output_tokens >= request.max_tokens:
            request.status = RequestStatus.FINISHED_LENGTH
        logprobs = None if params.logprobs is None else [self._logprobs(token, params.logprobs)]
        prompt_logprobs = None
        if first and params.prompt_logprobs is not None:
            count = params.prompt_logprobs
            prompt_logprobs = [self._logprobs(i, count) for i in request.prompt_token_ids[1:]]
        return RequestUpdate(request, [token], logprobs, prompt_logprobs)

    def _logprobs(self, token: int, count: int) -> TokenLogprobs:
        """The token is second best after its neighbour; the worst is impossible."""
        size = self.model_config.vocab_size
        ids = [(token + 1) % size, token, *((token + 2 + i) % size for i in range(max(0, count - 2)))][:count]
        values = [-0.25, -1.5, *(-3.0 - i for i in range(max(0, count - 2)))][:count]
        if count > 3:
            values[-1] = -np.inf
        return TokenLogprobs(-1.5, 2, np.array(ids, np.int32), np.array(values, np.float32))

    def _record(self, request: Request, now: float) -> None:
        self._stats.record_finished(
            FinishedRequestStats.from_times(
                finish_reason=request.status.finish_reason or "",
                num_prompt_tokens=request.num_prompt_tokens,
                num_generation_tokens=request.num_output_tokens,
                max_tokens=request.max_tokens,
                n=request.sampling_params.n,
                arrival_time=request.arrival_time,
                first_scheduled_time=request.arrival_time,
                first_token_time=now,
                last_token_time=now,
                finished_time=now,
            )
        )

    def has_unfinished_requests(self) -> bool:
        self.threads.add(threading.get_ident())
        return bool(self._running)

    def stats(self) -> EngineStats:
        self._stats.num_requests_running = len(self._running)
        return self._stats

    def shutdown(self) -> None:
        self.is_shut_down = True

    def reset_prefix_cache(self) -> bool:
        self.threads.add(threading.get_ident())
        self.resets += 1
        return True


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Poll until something holds; fails the test where it never does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def texts(outputs: Sequence[RequestOutput]) -> str:
    """What the first completion's deltas say together."""
    return "".join(c.text for output in outputs for c in output.outputs if c.index == 0)

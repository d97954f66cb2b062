"""An engine whose scheduler, input and output are the real ones, and whose model is a table of numpy's.

The logits at a position follow from the tokens up to it and nothing else, so that a test can compute
what every completion must be.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import numpy as np

from jaxllm.config import EngineConfig, SchedulerConfig
from jaxllm.input_processor import InputProcessor
from jaxllm.models.config import ModelConfig
from jaxllm.output_processor import OutputProcessor
from jaxllm.outputs import RequestOutput
from jaxllm.request import Request, RequestStatus
from jaxllm.sampling_params import SamplingParams
from jaxllm.scheduling import Plan, Scheduler, StepResult, TokenLogprobs
from jaxllm.stats import EngineStats

EOS = 1


@lru_cache(maxsize=100_000)
def log_probabilities(tokens: tuple[int, ...], vocab_size: int) -> np.ndarray:
    """float64[vocab_size] of the token that follows; distinct values."""
    seed = zlib.crc32(repr(tokens).encode())
    logits = np.random.default_rng(seed).normal(scale=2.0, size=vocab_size)
    return np.asarray(logits - np.log(np.sum(np.exp(logits))))


def next_token(tokens: tuple[int, ...], vocab_size: int, params: SamplingParams, seed: int) -> int:
    """Greedy, or a draw that depends on seed and position alone."""
    logprobs = log_probabilities(tokens, vocab_size)
    if params.is_greedy:
        return int(logprobs.argmax())
    noise = np.random.default_rng((seed, len(tokens))).gumbel(size=vocab_size)
    return int((logprobs / params.temperature + noise).argmax())


def token_logprobs(tokens: tuple[int, ...], token_id: int, vocab_size: int, count: int) -> TokenLogprobs:
    logprobs = log_probabilities(tokens, vocab_size)
    top = np.argsort(-logprobs)[:count]
    rank = int((logprobs > logprobs[token_id]).sum()) + 1
    return TokenLogprobs(float(logprobs[token_id]), rank, top, logprobs[top])


class TinyEngine:
    """What `jaxllm.engine.Engine` is to an `LLM`.

    Args:
        before_step: called at the start of every step; what it raises, the step raises.
    """

    def __init__(
        self,
        tokenizer: Any = None,
        *,
        vocab_size: int = 12,
        eos_token_ids: tuple[int, ...] = (EOS,),
        num_pages: int = 64,
        before_step: Callable[[], object] = lambda: None,
        generation_config: dict[str, Any] | None = None,
        **config: Any,
    ) -> None:
        settings = {"max_model_len": 64, "max_num_seqs": 4, "max_num_batched_tokens": 16, "block_size": 4}
        self.config = EngineConfig(**{**settings, **config})
        self.model_config = ModelConfig(
            "LlamaForCausalLM", vocab_size, 8, 16, 1, 1, 1, 8, 64, eos_token_ids=eos_token_ids
        )
        self.tokenizer = tokenizer
        self.input_processor = InputProcessor(tokenizer, self.model_config, self.config, generation_config)
        self.before_step = before_step
        self.submitted: list[str] = []
        self.num_steps = 0
        self._stats = EngineStats()
        self._outputs = OutputProcessor(tokenizer)
        self.scheduler = Scheduler(
            SchedulerConfig(
                max_num_seqs=self.config.max_num_seqs or 4,
                max_num_batched_tokens=self.config.max_num_batched_tokens or 16,
                max_model_len=self.config.max_model_len or 64,
                page_size=self.config.block_size,
                num_pages=num_pages,
                policy=self.config.scheduling_policy,
            )
        )

    def submit(self, requests: list[Request], prompt: str | None) -> None:
        request_id = requests[0].group_id or requests[0].request_id
        for request in requests:
            self.scheduler.add(request)
        self._outputs.add(requests, prompt, requests[0].sampling_params, request_id)
        self.submitted.append(request_id)

    def abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        request_ids = list(request_ids)
        for request_id in request_ids:
            for request in self._outputs.requests(request_id):
                self.scheduler.finish(request, RequestStatus.FINISHED_ABORTED)
        return self._outputs.abort(request_ids)

    def has_unfinished_requests(self) -> bool:
        return bool(self._outputs.unfinished_request_ids)

    def step(self) -> list[RequestOutput]:
        self.before_step()
        self.num_steps += 1
        plan = self.scheduler.schedule()
        if plan is None:
            return []
        updates = self.scheduler.apply(plan, self._execute(plan))
        outputs, stopped = self._outputs.process(updates, time.monotonic())
        for request, stop in stopped:
            self.scheduler.finish(request, RequestStatus.FINISHED_STOPPED, stop)
        self.scheduler.check_integrity()
        self._stats.record_step(num_tokens=plan.num_tokens, prompt_tokens=0, generation_tokens=len(updates))
        return outputs

    def stats(self) -> EngineStats:
        return self._stats

    def reset_prefix_cache(self) -> bool:
        return self.scheduler.reset_prefix_cache()

    def start_profile(self, directory: str) -> None:
        self.profiled = directory

    def stop_profile(self) -> None:
        self.profiled = f"{self.profiled}, done"

    def shutdown(self) -> None:
        self.is_shut_down = True

    def _execute(self, plan: Plan) -> StepResult:
        result = StepResult([], [])
        vocab_size = self.model_config.vocab_size
        for row, (request, start, num_tokens, samples) in enumerate(plan.scheduled):
            tokens, params = tuple(request.token_ids), request.sampling_params
            if params.prompt_logprobs is not None:
                ends = range(start + 1, min(start + num_tokens + 1, request.num_prompt_tokens))
                result.prompt_logprobs[row] = [
                    token_logprobs(tokens[:i], tokens[i], vocab_size, params.prompt_logprobs) for i in ends
                ]
            if not samples:
                result.token_ids.append([])
                result.logprobs.append(None)
                continue
            token_id = next_token(tokens, vocab_size, params, request.seed)
            result.token_ids.append([token_id])
            wanted = params.logprobs
            result.logprobs.append(
                None if wanted is None else [token_logprobs(tokens, token_id, vocab_size, wanted)]
            )
        return result


def alone(prompt: list[int], params: SamplingParams, vocab_size: int = 12) -> list[int]:
    """The output tokens of one request, computed directly."""
    tokens = list(prompt)
    for _ in range(params.max_tokens or 0):
        tokens.append(next_token(tuple(tokens), vocab_size, params, params.seed or 0))
        if tokens[-1] == EOS and not params.ignore_eos:
            break
    return tokens[len(prompt) :]

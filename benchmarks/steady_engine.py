"""A server whose engine is a clock: one token for every request, a set number of times a second.

    python -m benchmarks.steady_engine STEPS_A_SECOND [flags of python -m jaxllm.serve]

Everything around the engine is real: `AsyncEngine`, the application, uvicorn. A token's text is the moment at
which the engine had it, `@NANOSECONDS@` of the monotonic clock that all processes of a machine share.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable

from jaxllm.async_engine import AsyncEngine
from jaxllm.config import EngineConfig
from jaxllm.demo import demo_model_path
from jaxllm.input_processor import InputProcessor
from jaxllm.models.config import ModelConfig
from jaxllm.outputs import CompletionOutput, RequestOutput
from jaxllm.request import Request
from jaxllm.serve.arguments import parse_arguments
from jaxllm.serve.launcher import launch
from jaxllm.stats import EngineStats
from jaxllm.text.tokenizer import get_tokenizer

MAX_MODEL_LEN = 1 << 20


class SteadyEngine:
    """Has the interface of `jaxllm.engine.Engine`, and no model: requests end by their max_tokens alone.

    Args:
        steps_a_second: how often every request gets a token; a step that is late makes none up.
    """

    def __init__(self, steps_a_second: float) -> None:
        path = demo_model_path()
        self.config = EngineConfig(max_model_len=MAX_MODEL_LEN, disable_log_stats=True)
        self.tokenizer = get_tokenizer(path)
        self.model_config = ModelConfig(
            architecture="Steady",
            vocab_size=json.loads((path / "config.json").read_text())["vocab_size"],
            hidden_size=8,
            intermediate_size=8,
            num_layers=1,
            num_heads=1,
            num_kv_heads=1,
            head_dim=8,
            max_position_embeddings=MAX_MODEL_LEN,
        )
        self.input_processor = InputProcessor(self.tokenizer, self.model_config, self.config, {})
        self._interval = 1 / steps_a_second
        self._next_step = 0.0
        self._running: dict[str, Request] = {}
        self._num_output_tokens: dict[str, int] = {}

    def submit(self, requests: list[Request], prompt: str | None) -> None:
        for request in requests:
            self._running[request.request_id] = request
            self._num_output_tokens[request.request_id] = 0

    def abort(self, request_ids: Iterable[str]) -> list[RequestOutput]:
        for request_id in request_ids:
            self._running.pop(request_id, None)
        return []

    def step(self) -> list[RequestOutput]:
        now = time.monotonic()
        time.sleep(max(0.0, self._next_step - now))
        self._next_step = max(self._next_step, now) + self._interval
        text = f"@{time.monotonic_ns()}@"
        return [self._advance(request, text) for request in list(self._running.values())]

    def _advance(self, request: Request, text: str) -> RequestOutput:
        name = request.request_id
        self._num_output_tokens[name] += 1
        finished = self._num_output_tokens[name] >= request.max_tokens
        if finished:
            del self._running[name], self._num_output_tokens[name]
        completion = CompletionOutput(0, text, [5], finish_reason="length" if finished else None)
        return RequestOutput(name, None, request.prompt_token_ids, None, [completion], finished)

    def has_unfinished_requests(self) -> bool:
        return bool(self._running)

    def stats(self) -> EngineStats:
        return EngineStats(num_requests_running=len(self._running))

    def shutdown(self) -> None:
        self._running.clear()


def main() -> int:
    steps_a_second = float(sys.argv[1])

    def load(config: EngineConfig) -> AsyncEngine:
        return AsyncEngine(SteadyEngine(steps_a_second))  # type: ignore[arg-type]

    return launch(parse_arguments(sys.argv[2:]), load)


if __name__ == "__main__":
    sys.exit(main())

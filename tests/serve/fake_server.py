"""`python -m tests.serve.fake_server [flags]`: a server from start to end, around an engine without a model.

The model's name scripts it: "slow" takes 50 ms a step and never stops by itself, "broken" does not load.
"""

from __future__ import annotations

import sys

from jaxllm.async_engine import AsyncEngine
from jaxllm.config import EngineConfig
from jaxllm.errors import ModelNotFoundError
from jaxllm.serve.arguments import parse_arguments
from jaxllm.serve.launcher import launch
from tests.serve.fake_engine import FakeEngine


def load(config: EngineConfig) -> AsyncEngine:
    if config.model == "broken":
        raise ModelNotFoundError("there is no model at 'broken'")
    fake = FakeEngine(model=config.model)
    if config.model == "slow":
        fake.step_time = 0.05
        fake.reply = lambda request: "on and on " * 30
    return AsyncEngine(fake)  # type: ignore[arg-type]


if __name__ == "__main__":
    sys.exit(launch(parse_arguments(sys.argv[1:]), load))

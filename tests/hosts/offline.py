"""Run on host 0 by the tests: an `LLM` that completes prompts, says what came out, and may go on for ever.

The one argument is JSON: model, settings, prompts (token ids), params of each, regexes of some, forever.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np

from jaxllm import LLM, SamplingParams, StructuredOutputsParams
from jaxllm.models.safetensors_source import SafetensorsCheckpoint


def count_bytes() -> list[int]:
    """From now on, how much is copied out of checkpoints."""
    copied = [0]
    copy = SafetensorsCheckpoint.copy

    def counted(self: Any, tensor: str, factors: Any, order: Any, region: Any, out: np.ndarray) -> None:
        copied[0] += out.nbytes
        copy(self, tensor, factors, order, region, out)

    SafetensorsCheckpoint.copy = counted  # type: ignore[method-assign]
    return copied


def main() -> None:
    asked = json.loads(sys.argv[1])
    copied = count_bytes()
    llm = LLM(asked["model"], **asked["settings"])
    prompts = [{"prompt_token_ids": prompt} for prompt in asked["prompts"]]
    for each in asked["params"]:
        if "logit_bias" in each:  # JSON has no numbers for keys.
            each["logit_bias"] = {int(token): value for token, value in each["logit_bias"].items()}
    params = [SamplingParams(**each, ignore_eos=True, detokenize=False) for each in asked["params"]]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    said: dict[str, Any] = {"tokens": [[list(one.token_ids) for one in o.outputs] for o in outputs]}
    if asked.get("sleeps"):
        for level in (1, 2):
            llm.sleep(level)
            assert llm.wake_up()
        again = llm.generate(prompts, params, use_tqdm=False)
        said["again"] = [[list(one.token_ids) for one in o.outputs] for o in again]
    executor = llm.llm_engine.runner.executor
    stats = llm.llm_engine.stats()
    said |= {
        "preemptions": stats.num_preemptions,
        "swaps": llm.llm_engine.scheduler.num_swaps,
        "hits": stats.prefix_cache_hits,
        "copied": copied[0],
        "sent": getattr(executor, "num_bytes", 0),
        "commands": getattr(executor, "_next", 0),
    }
    if regexes := asked.get("regexes"):
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=params[0].max_tokens,
                ignore_eos=True,
                structured_outputs=None if regex is None else StructuredOutputsParams(regex=regex),
            )
            for regex in regexes
        ]
        outputs = llm.generate(prompts[: len(regexes)], params, use_tqdm=False)
        said["formed"] = [
            {name: getattr(o.outputs[0], name) for name in ("token_ids", "finish_reason")} for o in outputs
        ]
    print("SAID", json.dumps(said), flush=True)
    while asked.get("forever"):
        llm.generate(prompts, params, use_tqdm=False)
    llm.shutdown()


if __name__ == "__main__":
    main()

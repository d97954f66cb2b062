"""How the benchmarks talk to an engine in a process of its own: one JSON object a line, each answered by one.

    {"load": {"model": DIR, "dtype": "float32", "max_model_len": 2048, "max_num_seqs": 64}}
        -> {"seconds": 12.3, "engine": "name version"}
    {"prompts": [[ids], ...], "max_tokens": 64}
        -> {"seconds": 1.23, "num_output_tokens": 512}

The process ends when its input does. This module is imported by the interpreters of other engines, so
it needs nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# generate(prompts, max_tokens): number of tokens generated, always max_tokens for each prompt.
Generate = Callable[[list[list[int]], int], int]
# load(options): the name and version of the engine, and its generate function.
Load = Callable[[dict[str, Any]], tuple[str, Generate]]


def serve(load: Load) -> None:
    """Answers requests until the input ends; whatever the engine itself prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    generate: Generate | None = None
    for line in sys.stdin:
        request = json.loads(line)
        start = time.perf_counter()
        if "load" in request:
            engine, generate = load(request["load"])
            reply: dict[str, Any] = {"engine": engine}
        else:
            if generate is None:
                raise RuntimeError("asked for prompts before a model was loaded")
            reply = {"num_output_tokens": generate(request["prompts"], request["max_tokens"])}
        reply["seconds"] = time.perf_counter() - start
        print(json.dumps(reply), file=replies, flush=True)

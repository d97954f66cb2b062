"""Host time of the scheduler: per step, and per token of a prefix look-up.

    python -m benchmarks.scheduler_overhead [--json FILE]

A step is one `schedule` and one `apply`, with two plans in flight and every running request decoding.
A look-up hashes a prompt that the scheduler has not seen and finds all of its pages.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections import deque
from pathlib import Path

from jaxllm.config import SchedulerConfig
from jaxllm.request import Request
from jaxllm.sampling_params import SamplingParams
from jaxllm.scheduling import BlockPool, PageHasher, Plan, Scheduler, StepResult

RUNNING = (1, 16, 64, 256)
LOOKUP_TOKENS = (1_000, 10_000, 100_000, 1_000_000)
PAGE_SIZE = 16
PROMPT_TOKENS = 128


def decode_step_times(num_running: int, num_steps: int) -> list[float]:
    """Seconds of `schedule` and `apply` together, for each of `num_steps` decoding steps."""
    max_tokens = num_steps + 64
    pages = -(-(PROMPT_TOKENS + max_tokens) // PAGE_SIZE)
    config = SchedulerConfig(
        max_num_seqs=num_running,
        max_num_batched_tokens=num_running * PROMPT_TOKENS,
        max_model_len=PROMPT_TOKENS + max_tokens + 1,
        page_size=PAGE_SIZE,
        num_pages=num_running * pages + 1,
    )
    scheduler = Scheduler(config)
    for index in range(num_running):
        scheduler.add(
            Request(
                request_id=str(index),
                prompt_token_ids=[index, *range(PROMPT_TOKENS - 1)],
                sampling_params=SamplingParams(max_tokens=max_tokens),
                eos_token_ids=frozenset([2]),
                max_tokens=max_tokens,
            )
        )
    outstanding: deque[Plan] = deque()
    times = []
    for step in range(num_steps + 2):
        started = time.perf_counter()
        plan = scheduler.schedule()
        elapsed = time.perf_counter() - started
        if plan is None:
            raise RuntimeError("every request is decoding, yet nothing was scheduled")
        outstanding.append(plan)
        if len(outstanding) == 2:
            plan = outstanding.popleft()
            rows = len(plan.scheduled)
            result = StepResult([[1000 + step] for _ in range(rows)], [None] * rows)
            started = time.perf_counter()
            scheduler.apply(plan, result)
            elapsed += time.perf_counter() - started
        if step >= 2:  # the prompts, and the first step that has a result to apply
            times.append(elapsed)
    return times


def lookup_time(num_tokens: int) -> float:
    """Seconds to hash a prompt of `num_tokens` and find its pages, all of which are cached."""
    tokens = [(7919 * index) % 50_000 for index in range(num_tokens)]
    known = PageHasher(PAGE_SIZE)
    known.extend(tokens)
    pool = BlockPool(len(known.digests) + 1)
    for page, digest in zip(pool.allocate(len(known.digests)), known.digests, strict=True):
        pool.register(page, digest)
    started = time.perf_counter()
    hasher = PageHasher(PAGE_SIZE)
    hasher.extend(tokens)
    found = pool.find_prefix(hasher.digests)
    elapsed = time.perf_counter() - started
    if len(found) != num_tokens // PAGE_SIZE:
        raise RuntimeError(f"found {len(found)} of {num_tokens // PAGE_SIZE} pages")
    return elapsed


def measure(num_steps: int) -> dict[str, list[dict[str, float]]]:
    """All rows of both tables."""
    steps = []
    for num_running in RUNNING:
        gc.collect()
        times = sorted(decode_step_times(num_running, num_steps))
        steps.append(
            {
                "running": num_running,
                "median_ms": statistics.median(times) * 1e3,
                "mean_ms": statistics.fmean(times) * 1e3,
                "p99_ms": times[int(0.99 * len(times))] * 1e3,
            }
        )
    lookups = []
    for num_tokens in LOOKUP_TOKENS:
        gc.collect()
        best = min(lookup_time(num_tokens) for _ in range(3))
        lookups.append(
            {"tokens": num_tokens, "ms": best * 1e3, "ns_per_token": best * 1e9 / num_tokens},
        )
    return {"steps": steps, "lookups": lookups}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="decoding steps to time (default 1000)")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error(f"--steps is {arguments.steps}; it must be at least 1")
    figures = measure(arguments.steps)
    print("schedule + apply   median        mean         p99")
    for row in figures["steps"]:
        print(
            f"{row['running']:>7} running  {row['median_ms']:>7.3f} ms  {row['mean_ms']:>7.3f} ms"
            f"  {row['p99_ms']:>7.3f} ms"
        )
    print("\nprefix look-up          time      per token")
    for row in figures["lookups"]:
        print(f"{row['tokens']:>9} tokens {row['ms']:>9.3f} ms {row['ns_per_token']:>8.1f} ns")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()

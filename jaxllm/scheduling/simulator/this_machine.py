"""The CPU at hand as a device, measured in a second or two: what it can do at best."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from jaxllm.scheduling.simulator.devices import Device


def best_seconds(run: Callable[[], object], *, repeats: int = 7) -> float:
    """The shortest of several runs, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def host_bandwidth(num_bytes: int) -> tuple[float, float]:
    """Read and copy bandwidth of main memory, one thread a core: a single one does not saturate it."""
    threads = os.cpu_count() or 1
    source = [np.ones(num_bytes // threads // 8) for _ in range(threads)]
    target = [np.zeros_like(part) for part in source]
    with ThreadPoolExecutor(threads) as pool:
        read = best_seconds(lambda: list(pool.map(np.max, source)))
        copy = best_seconds(lambda: list(pool.map(np.copyto, target, source)))
    return num_bytes / read, 2 * num_bytes / copy


def this_cpu(*, num_bytes: int = 256 << 20, size: int = 2048) -> Device:
    """This machine's processor: float32 products and memory bandwidth as measured, its physical memory.

    Args:
        num_bytes: of the array that is read; far larger than any cache.
        size: of the square matrices that are multiplied.
    """
    bandwidth, _ = host_bandwidth(num_bytes)
    a = np.ones((size, size), np.float32)
    out = np.empty_like(a)
    flops = 2 * size**3 / best_seconds(lambda: np.matmul(a, a, out=out), repeats=3)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # What is swapped out is copied within the same memory.
    return Device("cpu", flops, bandwidth, float(memory), bandwidth / 2)

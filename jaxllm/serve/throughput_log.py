"""A line in the log every few seconds while there is work: how fast, how full, how well cached."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from jaxllm.stats import EngineStats

logger = logging.getLogger(__name__)


class ThroughputLog:
    """Logs what the engine did since the last line; says nothing while it is idle.

    Args:
        interval: seconds between two lines.
        clock: the time in seconds.
    """

    def __init__(self, interval: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._interval = interval
        self._clock = clock
        self._last = clock()
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._cache_queries = 0
        self._cache_hits = 0

    def tick(self, read: Callable[[], EngineStats]) -> None:
        """Log a line if it is time for one; costs next to nothing otherwise.

        Args:
            read: gives the engine's statistics.
        """
        elapsed = self._clock() - self._last
        if elapsed < self._interval:
            return
        stats = read()
        prompt = stats.prompt_tokens - self._prompt_tokens
        generation = stats.generation_tokens - self._generation_tokens
        queries = stats.prefix_cache_queries - self._cache_queries
        hits = stats.prefix_cache_hits - self._cache_hits
        self._last += elapsed
        self._prompt_tokens, self._generation_tokens = stats.prompt_tokens, stats.generation_tokens
        self._cache_queries, self._cache_hits = stats.prefix_cache_queries, stats.prefix_cache_hits
        if not (prompt or generation or stats.num_requests_running or stats.num_requests_waiting):
            return
        logger.info(
            "Prompt %.1f tokens/s, generation %.1f tokens/s, %d running, %d waiting, KV cache %.1f %% in use,"
            " prefix cache hits %.1f %%",
            prompt / elapsed,
            generation / elapsed,
            stats.num_requests_running,
            stats.num_requests_waiting,
            100 * stats.kv_cache_usage,
            100 * hits / queries if queries else 0.0,
        )

"""KV pages of preempted requests in the host's memory: copied out and back, a fixed number at a time."""

from __future__ import annotations

from collections import deque
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm.errors import ConfigError
from jaxllm.execution.platform import host_memory
from jaxllm.scheduling.plan import Copies

# Pages that one copy moves: of a size, so that two compiled functions do for all copies.
_PAGES_AT_ONCE = 16
# Copies that may be under way, each of which holds its pages on the device a second time.
_COPIES_UNDER_WAY = 4


class HostPages:
    """The host's side of the KV cache.

    Copies out are begun and not waited for: the device gathers the pages, goes on, and sends them while
    it computes. They are in place before anything is copied back.

    Args:
        abstract_cache: the cache on the device, [layers, pages, page_size, rows, width].
        num_pages: pages on the host.

    Raises:
        ConfigError: the machine has not so much memory.
    """

    def __init__(self, abstract_cache: jax.ShapeDtypeStruct, num_pages: int) -> None:
        layers, _, *page = abstract_cache.shape
        size = num_pages * layers * int(np.prod(page)) * abstract_cache.dtype.itemsize
        if size > host_memory():
            raise ConfigError(
                f"swap_space is {size / 2**30:.1f} GiB, and this machine has {host_memory() / 2**30:.1f} GiB "
                "of memory. Lower swap_space.",
                param="swap_space",
            )
        # Memory that is never written to is never taken.
        self._pages = np.empty((num_pages, layers, *page), abstract_cache.dtype)
        self._under_way: deque[tuple[list[int], jax.Array]] = deque()
        self._gather: Any = jax.jit(_gather)
        # What comes back lies as the cache lies, on one device or on several.
        self._scatter: Any = jax.jit(_scatter, donate_argnums=0, out_shardings=abstract_cache.format)

    def warm_up(self, kv_pages: jax.Array) -> jax.Array:
        """Compiles both copies; gives the cache back."""
        null = np.zeros(_PAGES_AT_ONCE, np.int32)
        return self._scatter(kv_pages, null, np.asarray(self._gather(kv_pages, null)))

    def copy(self, kv_pages: jax.Array, copies_out: Copies, copies_in: Copies) -> jax.Array:
        """Makes a plan's copies, those out first. The cache is donated and returned.

        Args:
            copies_out: from pages of the device to pages of the host.
            copies_in: from pages of the host to pages of the device.
        """
        for first in range(0, len(copies_out), _PAGES_AT_ONCE):
            devices, hosts = zip(*copies_out[first : first + _PAGES_AT_ONCE], strict=True)
            gathered = self._gather(kv_pages, _padded(devices))
            gathered.copy_to_host_async()
            self._under_way.append((list(hosts), gathered))
            self._settle(_COPIES_UNDER_WAY)
        if copies_in:
            self._settle(0)
        for first in range(0, len(copies_in), _PAGES_AT_ONCE):
            hosts, devices = zip(*copies_in[first : first + _PAGES_AT_ONCE], strict=True)
            pages = np.zeros((_PAGES_AT_ONCE, *self._pages.shape[1:]), self._pages.dtype)
            pages[: len(hosts)] = self._pages[list(hosts)]
            kv_pages = self._scatter(kv_pages, _padded(devices), pages)
        return kv_pages

    def _settle(self, most: int) -> None:
        """Waits until at most so many copies out are under way."""
        while len(self._under_way) > most:
            hosts, gathered = self._under_way.popleft()
            self._pages[hosts] = np.asarray(gathered)[: len(hosts)]


def _padded(pages: tuple[int, ...]) -> np.ndarray:
    """int32[_PAGES_AT_ONCE]; what is left is the null page, which nobody reads."""
    padded = np.zeros(_PAGES_AT_ONCE, np.int32)
    padded[: len(pages)] = pages
    return padded


def _gather(kv_pages: jax.Array, pages: jax.Array) -> jax.Array:
    """[n, layers, page_size, rows, width] of the pages int32[n]."""
    return jnp.moveaxis(kv_pages[:, pages], 1, 0)


def _scatter(kv_pages: jax.Array, pages: jax.Array, content: jax.Array) -> jax.Array:
    """The inverse of `_gather`."""
    return kv_pages.at[:, pages].set(jnp.moveaxis(content, 0, 1))

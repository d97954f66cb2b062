"""KV pages of preempted requests in the host's memory: copied out and back, a fixed number at a time."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.errors import ConfigError
from jaxllm.execution.platform import host_memory
from jaxllm.models.parameters import Region
from jaxllm.scheduling.plan import Copies

# Pages that one copy moves: of a size, so that two compiled functions do for all copies.
_PAGES_AT_ONCE = 16
# Copies that may be under way, each of which holds its pages on the device a second time.
_COPIES_UNDER_WAY = 4


class HostPages:
    """The host's side of the KV cache.

    Copies out are begun and not waited for: the device gathers the pages, goes on, and sends them while
    it computes. They are in place before anything is copied back.

    Of several hosts that share a model each keeps what its devices have of a page.

    Args:
        abstract_cache: the cache on the device, [layers, pages, page_size, rows, width].
        num_pages: pages on the host.

    Raises:
        ConfigError: the machine has not so much memory.
    """

    def __init__(self, abstract_cache: jax.ShapeDtypeStruct, num_pages: int) -> None:
        layers, _, *page = abstract_cache.shape
        self._shape = (_PAGES_AT_ONCE, layers, *page)
        self._sharding = _sharding_of_pages(abstract_cache.sharding)
        parts = _parts(self._sharding, self._shape)
        sizes = {part: [stop - start for start, stop in part] for part in parts}
        size = num_pages * sum(map(math.prod, sizes.values())) * abstract_cache.dtype.itemsize
        if size > host_memory():
            raise ConfigError(
                f"swap_space is {size / 2**30:.1f} GiB, and this machine has {host_memory() / 2**30:.1f} GiB "
                "of memory. Lower swap_space.",
                param="swap_space",
            )
        # Memory that is never written to is never taken.
        self._pages = {part: np.empty((num_pages, *sizes[part]), abstract_cache.dtype) for part in parts}
        self._under_way: deque[tuple[list[int], dict[Region, jax.Array]]] = deque()
        self._gather: Any = jax.jit(_gather, out_shardings=self._sharding)
        # What comes back lies as the cache lies, on one device or on several.
        self._scatter: Any = jax.jit(_scatter, donate_argnums=0, out_shardings=abstract_cache.format)

    def warm_up(self, kv_pages: jax.Array) -> jax.Array:
        """Compiles both copies; gives the cache back."""
        null = np.zeros(_PAGES_AT_ONCE, np.int32)
        for part, pages in self._shards(self._gather(kv_pages, null)).items():
            self._pages[part][:1] = np.asarray(pages)[:1]
        return self._scatter(kv_pages, null, self._on_devices([0] * _PAGES_AT_ONCE))

    def copy(self, kv_pages: jax.Array, copies_out: Copies, copies_in: Copies) -> jax.Array:
        """Makes a plan's copies, those out first. The cache is donated and returned.

        Args:
            copies_out: from pages of the device to pages of the host.
            copies_in: from pages of the host to pages of the device.
        """
        for first in range(0, len(copies_out), _PAGES_AT_ONCE):
            devices, hosts = zip(*copies_out[first : first + _PAGES_AT_ONCE], strict=True)
            shards = self._shards(self._gather(kv_pages, _padded(devices)))
            for shard in shards.values():
                shard.copy_to_host_async()
            self._under_way.append((list(hosts), shards))
            self._settle(_COPIES_UNDER_WAY)
        if copies_in:
            self._settle(0)
        for first in range(0, len(copies_in), _PAGES_AT_ONCE):
            hosts, devices = zip(*copies_in[first : first + _PAGES_AT_ONCE], strict=True)
            kv_pages = self._scatter(kv_pages, _padded(devices), self._on_devices(hosts))
        return kv_pages

    def _shards(self, pages: jax.Array) -> dict[Region, jax.Array]:
        """What this host's devices have of gathered pages, each part once."""
        return {_part(shard.index, self._shape): shard.data for shard in pages.addressable_shards}

    def _on_devices(self, hosts: Sequence[int]) -> Any:
        """Pages of the host as `_scatter` takes them; behind them whatever it may write to the null page."""

        def content(index: tuple[slice, ...] | None) -> np.ndarray:
            part = self._pages[_part(index, self._shape)]
            pages = np.zeros((_PAGES_AT_ONCE, *part.shape[1:]), part.dtype)
            pages[: len(hosts)] = part[list(hosts)]
            return pages

        if self._sharding is None:
            return content(None)
        return jax.make_array_from_callback(self._shape, self._sharding, content)

    def _settle(self, most: int) -> None:
        """Waits until at most so many copies out are under way."""
        while len(self._under_way) > most:
            hosts, shards = self._under_way.popleft()
            for part, shard in shards.items():
                self._pages[part][hosts] = np.asarray(shard)[: len(hosts)]


def _sharding_of_pages(of_cache: Any) -> NamedSharding | None:
    """Of pages that are gathered, [n, layers, page_size, rows, width]: replicas have all of them."""
    if not isinstance(of_cache, NamedSharding):
        return None
    layers, _, *page = (*of_cache.spec, *[None] * 5)[:5]
    return NamedSharding(of_cache.mesh, PartitionSpec(None, layers, *page))


def _parts(sharding: NamedSharding | None, shape: tuple[int, ...]) -> set[Region]:
    """What the devices of this host have of a page, all together."""
    if sharding is None:
        return {_part(None, shape)}
    return {_part(index, shape) for index in sharding.addressable_devices_indices_map(shape).values()}


def _part(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> Region:
    """What of each page an index takes out of several pages; None is all of them."""
    _, *rest = (
        one.indices(size)[:2] for one, size in zip(index or (slice(None),) * len(shape), shape, strict=True)
    )
    return tuple(rest)


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

"""Giving a device's memory back while an engine has nothing to do, and getting it again."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
import numpy as np

from jaxllm.errors import InvalidRequestError
from jaxllm.execution.abstract import empty_cache
from jaxllm.models.parameters import Parameters

TAGS = ("weights", "kv_cache")


def check_tags(tags: Collection[str] | None) -> None:
    """Raises InvalidRequestError for a tag that there is not."""
    unknown = [tag for tag in tags or () if tag not in TAGS]
    if unknown:
        raise InvalidRequestError(f"tags has {unknown[0]!r}; there are {' and '.join(TAGS)}.", param="tags")


class _OnHost:
    """What the devices of this process held of an array."""

    def __init__(self, array: jax.Array) -> None:
        self._shape, self._sharding = array.shape, array.sharding
        # Copies, where the device is the host itself as well: a view would keep the array alive.
        self._parts = {str(shard.index): np.array(shard.data) for shard in array.addressable_shards}

    def put(self) -> jax.Array:
        """The array, as it was."""
        return jax.make_array_from_callback(
            self._shape, self._sharding, lambda index: self._parts[str(index)]
        )


class Sleep:
    """What a runner has given up, and how it comes back. The compiled steps stay.

    Args:
        params, kv_pages: let go of here; nobody may hold them any longer.
        keep_weights: keep the weights in the host's memory; otherwise they are loaded anew.
        load: loads them.
    """

    def __init__(
        self, params: Parameters, kv_pages: jax.Array, *, keep_weights: bool, load: Callable[[], Parameters]
    ) -> None:
        self._cache = jax.ShapeDtypeStruct(kv_pages.shape, kv_pages.dtype, sharding=kv_pages.format)  # type: ignore[attr-defined]
        self._weights = jax.tree.map(_OnHost, params) if keep_weights else None
        self._load = load
        self._awake: dict[str, Any] = {}
        for array in (*jax.tree.leaves(params), kv_pages):
            array.delete()

    def wake(self, tags: Collection[str] | None) -> tuple[Parameters, jax.Array] | None:
        """Brings back what the tags name, all of it where they are None.

        Returns:
            Parameters and an empty cache once both are back, None before.
        """
        wanted = [tag for tag in TAGS if (tags is None or tag in tags) and tag not in self._awake]
        if "weights" in wanted:
            self._awake["weights"] = (
                self._load() if self._weights is None else jax.tree.map(_OnHost.put, self._weights)
            )
            self._weights = None
        if "kv_cache" in wanted:
            self._awake["kv_cache"] = empty_cache(self._cache)
        if len(self._awake) < len(TAGS):
            return None
        return self._awake["weights"], self._awake["kv_cache"]

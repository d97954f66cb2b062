"""Parts of parameters from where they are read to the devices that hold them."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxllm.models.parameters import ParameterSpec, Region, WeightSource

# Transfers under way at once: enough to overlap reading with copying, few enough to bound memory.
_TRANSFERS = 2
# XLA on CPU takes a host array as it is, without copying it, where it is aligned to this many bytes.
_ALIGNMENT = 64


class Placer:
    """Reads every part that a device of this process holds, once, and puts it there.

    Args:
        report: called with a number of bytes whenever so many have been placed.
    """

    def __init__(self, source: WeightSource, dtype: np.dtype[Any], report: Callable[[int], object]) -> None:
        self._source = source
        self._dtype = dtype
        self._report = report
        self._transfers: deque[jax.Array] = deque()

    def place(self, name: str, layer: int | None, spec: ParameterSpec, sharding: NamedSharding) -> jax.Array:
        """One parameter, or one layer's."""
        parts: dict[Region, np.ndarray] = {}
        arrays = [
            self._put(self._read(name, layer, region, parts), device)
            for device, region in regions_by_device(sharding, spec.shape)
        ]
        self._report(math.prod(spec.shape) * self._dtype.itemsize)
        return jax.make_array_from_single_device_arrays(spec.shape, sharding, arrays)

    def place_stacked(self, name: str, spec: ParameterSpec, sharding: NamedSharding) -> jax.Array:
        """All layers of a parameter as one array [layers, ...], filled a layer at a time in place."""
        shape = (len(spec.places), *spec.shape)
        regions = dict(regions_by_device(sharding, shape))
        stacks = {device: _Stack(device, region, self._dtype) for device, region in regions.items()}
        for place, layer in enumerate(spec.places):
            parts: dict[Region, np.ndarray] = {}
            for device, ((first, last), *rest) in regions.items():
                if not first <= place < last:
                    continue
                stack = stacks[device]
                if stack.on_host is None:
                    if layer is not None:
                        part = self._put(self._read(name, layer, tuple(rest), parts), device)
                        stack.set_layer(part, place - first)
                elif layer is not None:
                    self._source.read(name, layer, tuple(rest), stack.on_host[place - first])
                else:
                    stack.on_host[place - first] = 0
            self._report(math.prod(spec.shape) * self._dtype.itemsize)
        arrays = [stack.finish() for stack in stacks.values()]
        return jax.make_array_from_single_device_arrays(shape, sharding, arrays)

    def _read(
        self, name: str, layer: int | None, region: Region, parts: dict[Region, np.ndarray]
    ) -> np.ndarray:
        """A region on the host, read once for all the devices that hold the same one."""
        if region not in parts:
            parts[region] = _aligned_empty([stop - start for start, stop in region], self._dtype)
            self._source.read(name, layer, region, parts[region])
        return parts[region]

    def _put(self, part: np.ndarray, device: jax.Device) -> jax.Array:
        array = jax.device_put(part, device)
        self._transfers.append(array)
        if len(self._transfers) > _TRANSFERS:
            self._transfers.popleft().block_until_ready()
        return array


class _Stack:
    """One device's part of a stacked parameter while it is being filled.

    Where the device's memory is the host's, layers are written straight into it; elsewhere each
    goes over by itself and is put into the stack there, so that the host never holds a stack.
    """

    def __init__(self, device: jax.Device, region: Region, dtype: np.dtype[Any]) -> None:
        shape = [stop - start for start, stop in region]
        self._device = device
        self.on_host = _aligned_empty(shape, dtype) if _shares_host_memory(device) else None
        self._on_device = None if self.on_host is not None else jnp.zeros(shape, dtype, device=device)

    def set_layer(self, part: jax.Array, layer: int) -> None:
        assert self._on_device is not None
        self._on_device = set_layer(self._on_device, part, np.int32(layer))

    def finish(self) -> jax.Array:
        if self._on_device is None:
            return jax.device_put(self.on_host, self._device)
        return self._on_device


def _shares_host_memory(device: jax.Device) -> bool:
    return device.platform == "cpu"


@functools.partial(jax.jit, donate_argnums=0)
def set_layer(stack: jax.Array, part: jax.Array, layer: jax.Array | np.int32) -> jax.Array:
    """`stack` with one layer replaced, in the memory of the one given, which is gone afterwards."""
    return jax.lax.dynamic_update_index_in_dim(stack, part, layer, 0)


def regions_by_device(sharding: NamedSharding, shape: tuple[int, ...]) -> Iterable[tuple[jax.Device, Region]]:
    """What each device of this process holds of an array."""
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        yield device, tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))


def _aligned_empty(shape: list[int], dtype: np.dtype[Any]) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    offset = -raw.ctypes.data % _ALIGNMENT
    return raw[offset : offset + size].view(dtype).reshape(shape)

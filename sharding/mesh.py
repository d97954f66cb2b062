"""The device mesh that every array of a model is placed on."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from sharding.errors import ShardingError

# Outermost first: neighbours along `tensor`, which talk most, are neighbours in the machine.
MESH_AXES = ("data", "pipe", "tensor")


def make_mesh(
    data: int = 1, pipe: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of `data x pipe x tensor` devices.

    Args:
        data: replicas of attention and KV cache.
        pipe: pipeline stages.
        tensor: shards of every weight matrix.
        devices: devices to use, in this order. None takes the first of `jax.devices()` and lets
            JAX arrange them by the machine's topology where all of them are used.

    Raises:
        ShardingError: an axis is smaller than 1, there are fewer devices than the mesh needs, or
            `devices` holds more than it needs.
    """
    sizes = (data, pipe, tensor)
    for axis, size in zip(MESH_AXES, sizes, strict=True):
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ShardingError(f"mesh axis {axis!r} has size {size!r}; it must be an integer of at least 1")
    needed = data * pipe * tensor
    available = list(jax.devices() if devices is None else devices)
    if needed > len(available):
        raise ShardingError(
            f"a mesh of data={data} x pipe={pipe} x tensor={tensor} needs {needed} devices, and there are "
            f"{len(available)} ({available[0].platform if available else 'none'}); make an axis smaller. On "
            f"a CPU, XLA_FLAGS=--xla_force_host_platform_device_count={needed} simulates that many"
        )
    if devices is not None and len(available) > needed:
        raise ShardingError(
            f"{len(available)} devices were given for a mesh of data={data} x pipe={pipe} x tensor={tensor}, "
            f"which takes {needed}; give exactly {needed}"
        )
    if devices is None and needed == len(available):
        grid = mesh_utils.create_device_mesh(sizes, available)
    else:
        grid = np.array(available[:needed], dtype=object).reshape(sizes)
    return Mesh(grid, MESH_AXES)

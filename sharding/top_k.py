"""The largest elements of rows that several devices share, without bringing a row together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from sharding.rules import MeshAxes


def sharded_top_k(
    x: jax.Array, k: int, mesh: Mesh | AbstractMesh, mesh_axes: MeshAxes
) -> tuple[jax.Array, jax.Array]:
    """`jax.lax.top_k` of x [rows, n], split along n: the k largest of each shard, and then of those.

    XLA would gather the rows first. Equal elements come in the order of their indices, as from `top_k`.
    """

    def of_shard(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        values, indices = lax.top_k(part, min(k, part.shape[1]))
        return values, indices + lax.axis_index(mesh_axes) * part.shape[1]

    split, whole = PartitionSpec(None, mesh_axes), PartitionSpec()
    candidates = jax.shard_map(of_shard, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)

    def of_all(values: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        top, at = lax.top_k(values, k)
        return top, jnp.take_along_axis(indices, at, axis=1)

    merge = jax.shard_map(of_all, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    return merge(*candidates(x))

"""The largest elements of rows that several devices share, without bringing a row together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from sharding.rules import MeshAxes
from sharding.shards import on_shards


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
    candidates = on_shards(of_shard, mesh, split, split)

    def of_all(values: jax.Array, indices: jax.Array) -> tuple[jax.Array, jax.Array]:
        top, at = lax.top_k(values, k)
        return top, jnp.take_along_axis(indices, at, axis=1)

    merge = on_shards(of_all, mesh, whole, whole)
    return merge(*candidates(x))

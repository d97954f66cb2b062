"""From the logical axes of an array to the mesh axes that split it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sharding.errors import ShardingError

Rules = Mapping[str, str | None]

# Logical axis -> mesh axis that splits it; None is held whole by every device. Megatron's split
# (Shoeybi et al. 2019, section 3): attention by heads, the MLP by its inner width, the vocabulary
# by rows; the residual stream ("embed") is whole everywhere. Every device has a part of each expert.
DEFAULT_RULES: Rules = {
    "embed": None,
    "experts": None,
    "kv_heads": "tensor",
    "layers": "pipe",
    "mlp": "tensor",
    "vocab": "tensor",
}

# Axes that every shard holds whole where there are fewer of them than shards: a KV head cannot be
# split, so the shards that share one keep a copy each.
REPLICATED_WHEN_FEWER = frozenset({"kv_heads"})


def partition_spec(
    axes: Sequence[str | None], *, name: str = "array", rules: Rules = DEFAULT_RULES
) -> PartitionSpec:
    """The mesh axis of each dimension of an array, whatever its size.

    Args:
        axes: logical axis of each dimension; None is never split.
        name: of the array, for messages.

    Raises:
        ShardingError: a logical axis that the rules do not know, or two dimensions that the rules
            split over the same mesh axis.
    """
    mesh_axes: list[str | None] = []
    for dimension, axis in enumerate(axes):
        if axis is not None and axis not in rules:
            raise ShardingError(
                f"{name}: dimension {dimension} has the logical axis {axis!r}, for which there is no rule; "
                f"known are {', '.join(sorted(rules))}"
            )
        mesh_axis = None if axis is None else rules[axis]
        if mesh_axis is not None and mesh_axis in mesh_axes:
            other = mesh_axes.index(mesh_axis)
            raise ShardingError(
                f"{name}: dimensions {other} ({axes[other]!r}) and {dimension} ({axis!r}) would both be "
                f"split over the mesh axis {mesh_axis!r}; an array can use a mesh axis once"
            )
        mesh_axes.append(mesh_axis)
    return PartitionSpec(*mesh_axes)


def named_sharding(
    mesh: Mesh,
    axes: Sequence[str | None],
    shape: Sequence[int],
    name: str = "array",
    *,
    rules: Rules = DEFAULT_RULES,
) -> NamedSharding:
    """How an array of that shape lies on the mesh.

    KV heads that are fewer than the shards, and divide them, are held whole by every shard.

    Raises:
        ShardingError: as `partition_spec`; or the number of axes is not that of dimensions, the
            mesh lacks an axis, or a dimension does not divide by the shards it is split into.
    """
    if len(axes) != len(shape):
        raise ShardingError(f"{name}: {len(axes)} logical axes {tuple(axes)} for the shape {tuple(shape)}")
    split: list[str | None] = []
    for axis, mesh_axis, size in zip(axes, partition_spec(axes, name=name, rules=rules), shape, strict=True):
        if mesh_axis is None:
            split.append(None)
            continue
        if mesh_axis not in mesh.shape:
            raise ShardingError(
                f"{name}: the axis {axis!r} is split over the mesh axis {mesh_axis!r}, which the mesh lacks; "
                f"it has {', '.join(map(str, mesh.axis_names))}"
            )
        shards = mesh.shape[mesh_axis]
        if axis in REPLICATED_WHEN_FEWER and size < shards and shards % size == 0:
            split.append(None)
        elif size % shards:
            raise ShardingError(
                f"{name}: the axis {axis!r} of size {size} does not divide by the {shards} shards of the "
                f"mesh axis {mesh_axis!r}; choose a size of {mesh_axis!r} that divides {size}"
            )
        else:
            split.append(mesh_axis)
    return NamedSharding(mesh, PartitionSpec(*split))

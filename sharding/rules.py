"""From the logical axes of an array to the mesh axes that split it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sharding.errors import ShardingError

MeshAxes = str | tuple[str, ...] | None
Rules = Mapping[str, MeshAxes]

# Logical axis -> mesh axis (or axes, the outermost first) that splits it; None is held whole by every
# device. Megatron's split (Shoeybi et al. 2019, section 3): attention by heads, the MLP by its inner
# width, the vocabulary by rows; the residual stream ("embed") is whole everywhere. Experts are split by
# their inner width, too, or with expert parallelism by their number, which replicas share as well.
# Pipeline stages share the vocabulary, so that none holds more than the others. Replicas have the rest of
# the weights each, and pages, slots, stages and a part of every batch ("batch") of their own.
DEFAULT_RULES: Rules = {
    "batch": "data",
    "embed": None,
    "experts": ("data", "tensor"),
    "heads": "tensor",
    "kv_heads": "tensor",
    "layers": "pipe",
    "mlp": "tensor",
    "pages": "data",
    "slots": "data",
    "stages": ("data", "pipe"),
    "vocab": ("pipe", "tensor"),
}


def partition_spec(
    axes: Sequence[str | None], *, name: str = "array", rules: Rules = DEFAULT_RULES
) -> PartitionSpec:
    """The mesh axes of each dimension of an array, whatever its size.

    Args:
        axes: logical axis of each dimension; None is never split.
        name: of the array, for messages.

    Raises:
        ShardingError: a logical axis that the rules do not know, or two dimensions that the rules
            split over the same mesh axis.
    """
    mesh_axes: list[MeshAxes] = []
    taken: dict[str, int] = {}
    for dimension, axis in enumerate(axes):
        if axis is not None and axis not in rules:
            raise ShardingError(
                f"{name}: dimension {dimension} has the logical axis {axis!r}, for which there is no rule; "
                f"known are {', '.join(sorted(rules))}"
            )
        split = None if axis is None else rules[axis]
        for mesh_axis in names_of(split):
            other = taken.setdefault(mesh_axis, dimension)
            if other != dimension:
                raise ShardingError(
                    f"{name}: dimensions {other} ({axes[other]!r}) and {dimension} ({axis!r}) would both be "
                    f"split over the mesh axis {mesh_axis!r}; an array can use a mesh axis once"
                )
        mesh_axes.append(split)
    return PartitionSpec(*mesh_axes)


def names_of(mesh_axes: MeshAxes) -> tuple[str, ...]:
    """The mesh axes that a rule names, one or several or none."""
    if mesh_axes is None:
        return ()
    return (mesh_axes,) if isinstance(mesh_axes, str) else mesh_axes


def named_sharding(
    mesh: Mesh | AbstractMesh,
    axes: Sequence[str | None],
    shape: Sequence[int],
    name: str = "array",
    *,
    rules: Rules = DEFAULT_RULES,
) -> NamedSharding:
    """How an array of that shape lies on the mesh.

    Raises:
        ShardingError: as `partition_spec`; or the number of axes is not that of dimensions, the
            mesh lacks an axis, or a dimension does not divide by the shards it is split into.
    """
    if len(axes) != len(shape):
        raise ShardingError(f"{name}: {len(axes)} logical axes {tuple(axes)} for the shape {tuple(shape)}")
    spec = partition_spec(axes, name=name, rules=rules)
    for axis, mesh_axes, size in zip(axes, spec, shape, strict=True):
        shards = 1
        for mesh_axis in names_of(mesh_axes):
            if mesh_axis not in mesh.shape:
                raise ShardingError(
                    f"{name}: the axis {axis!r} is split over the mesh axis {mesh_axis!r}, which the mesh "
                    f"lacks; it has {', '.join(map(str, mesh.axis_names))}"
                )
            shards *= mesh.shape[mesh_axis]
        if size % shards:
            over = " x ".join(map(repr, names_of(mesh_axes)))
            raise ShardingError(
                f"{name}: the axis {axis!r} of size {size} does not divide by the {shards} shards of the "
                f"mesh axis {over}; choose a size of {over} that divides {size}"
            )
    return NamedSharding(mesh, spec)

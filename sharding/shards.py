"""Functions of shards: each device runs them on what it has of the arrays."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from sharding.rules import MeshAxes, names_of


def on_shards(
    function: Callable[..., Any],
    mesh: Mesh | AbstractMesh,
    in_specs: Any,
    out_specs: Any,
    *,
    axes: Collection[str] | None = None,
) -> Callable[..., Any]:
    """`jax.shard_map` of the function, also within another one.

    Specs are those of whole arrays. Of the mesh axes that they name only those count over which the
    function is mapped here: an outer map has split the arrays over its own already.

    Args:
        mesh: of all devices; within another map it is the same.
        axes: mesh axes to map over; None is all that are not mapped over yet. Over the others arrays stay
            whole to look at, and XLA splits the work.
    """
    outer = jax.sharding.get_abstract_mesh()
    taken = set(outer.manual_axes)
    names = {name for name in axes or mesh.axis_names if name not in taken}

    def own(specs: Any) -> Any:
        return jax.tree.map(
            lambda spec: over_axes(spec, names), specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
        )

    # Not checked: what a psum makes equal everywhere, loops and kernels do not see to be.
    return jax.shard_map(
        function,
        mesh=outer if taken else mesh,
        in_specs=own(in_specs),
        out_specs=own(out_specs),
        axis_names=names,
        check_vma=False,
    )


def over_axes(spec: PartitionSpec, axes: Collection[str]) -> PartitionSpec:
    """What a spec says of some mesh axes."""

    def kept(split: MeshAxes) -> MeshAxes:
        names = tuple(name for name in names_of(split) if name in axes)
        return names if len(names) > 1 else names[0] if names else None

    return PartitionSpec(*map(kept, spec))

"""Checkpoints in our own layout, through Orbax: restored without translation, straight into place.

The parameters of one layer stand apart on disk, so that they are restored into stacked arrays and
into lists of arrays alike without a second copy of either. Orbax is imported where it is used: it
takes seconds to import, and most runs do not need it.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm.errors import CheckpointError
from jaxllm.models.parameters import Parameters, ParameterSpec
from jaxllm.models.placement import set_layer

DIRECTORY = "orbax"


def is_orbax_checkpoint(path: Path) -> bool:
    """Whether a model directory holds parameters in our own layout."""
    return (path / DIRECTORY).is_dir()


def save_parameters(path: Path, parameters: Mapping[str, jax.Array | list[jax.Array]]) -> None:
    """Saves parameters, those of layers as lists of arrays, in a new directory inside `path`.

    Raises:
        CheckpointError: there is one already.
    """
    import orbax.checkpoint as ocp

    directory = (path / DIRECTORY).absolute()
    if directory.exists():
        raise CheckpointError(f"{directory} exists already; remove it or choose another place")
    tree = {
        name: {str(layer): array for layer, array in enumerate(value)} if isinstance(value, list) else value
        for name, value in parameters.items()
    }
    with _checkpointer() as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(tree))


def restore_parameters(
    path: Path,
    specs: Mapping[str, ParameterSpec],
    fitted: Callable[[str, jax.Array], jax.Array],
    shardings: Mapping[str, NamedSharding],
    dtype: np.dtype[Any],
    *,
    stack_layers: bool,
    report: Callable[[int], object],
) -> Parameters:
    """Restores parameters with the dtype and the shardings given.

    Args:
        specs: of what is stored.
        fitted: a parameter's name and array to the array that the mesh splits.
        shardings: of each such array; with `stack_layers`, of the stacked one.
        report: called with a number of bytes whenever so many have been placed.

    Raises:
        CheckpointError: the directory does not hold what the decoder declares, or is damaged.
    """
    directory = (path / DIRECTORY).absolute()
    if not directory.is_dir():
        raise CheckpointError(
            f"{path} holds no parameters in the layout of jaxllm (no {DIRECTORY}/ in it); "
            "python -m jaxllm.convert MODEL OUT makes such a directory"
        )
    parameters: Parameters = {}
    with _checkpointer() as checkpointer:
        try:
            _check(directory, _stored_shapes(checkpointer, directory), specs)
            for layer in _groups(specs):
                group = {name: spec for name, spec in specs.items() if _belongs(spec, layer)}
                restored = _restore(
                    checkpointer, directory, group, fitted, layer, shardings, dtype, stack_layers
                )
                for name, array in restored.items():
                    _keep(parameters, name, array, layer, specs[name], shardings[name], stack_layers)
                    report(array.nbytes)
                del restored, array
                _return_freed_memory()
        except (OSError, ValueError, KeyError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{directory} cannot be restored ({error}); it is damaged or was not written whole: convert "
                "the model again"
            ) from error
    return {name: parameters[name] for name in specs}


def _return_freed_memory() -> None:
    """What a group was read through is free; glibc would keep a fifth of a small model's weights of it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _checkpointer() -> Any:
    import orbax.checkpoint as ocp

    # Weights hardly compress, and decompressing is what restoring would wait for.
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False))


def _stored_shapes(checkpointer: Any, directory: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every stored array; those of layers are named `parameter/layer`."""
    metadata = checkpointer.metadata(directory).item_metadata
    if metadata is None:
        raise ValueError("its metadata are missing or cannot be read")
    shapes = {}
    for name, value in metadata.tree.items():
        if isinstance(value, Mapping):
            shapes.update({f"{name}/{layer}": tuple(leaf.shape) for layer, leaf in value.items()})
        else:
            shapes[name] = tuple(value.shape)
    return shapes


def _check(
    directory: Path, stored: Mapping[str, tuple[int, ...]], specs: Mapping[str, ParameterSpec]
) -> None:
    expected = {}
    for name, spec in specs.items():
        layers = [""] if spec.num_layers is None else [f"/{layer}" for layer in range(spec.num_layers)]
        expected.update({f"{name}{layer}": spec.shape for layer in layers})
    problems = [f"{name} is missing" for name in expected.keys() - stored.keys()]
    problems += [f"{name} is not part of this model" for name in stored.keys() - expected.keys()]
    problems += [
        f"{name} is {list(stored[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in stored and stored[name] != shape
    ]
    if problems:
        raise CheckpointError(
            f"{directory} does not hold the parameters of this model: {'; '.join(sorted(problems)[:8])} "
            f"({len(problems)} in all); convert the model again with this version of jaxllm"
        )


def _groups(specs: Mapping[str, ParameterSpec]) -> Iterator[int | None]:
    """What is restored at a time: what is not per layer, then layer by layer."""
    yield None
    yield from range(max((spec.num_layers or 0 for spec in specs.values()), default=0))


def _belongs(spec: ParameterSpec, layer: int | None) -> bool:
    return spec.num_layers is None if layer is None else layer < (spec.num_layers or 0)


def _restore(
    checkpointer: Any,
    directory: Path,
    specs: Mapping[str, ParameterSpec],
    fitted: Callable[[str, jax.Array], jax.Array],
    layer: int | None,
    shardings: Mapping[str, NamedSharding],
    dtype: np.dtype[Any],
    stacked: bool,
) -> dict[str, jax.Array]:
    """The arrays of one group, each where it will stay or as one layer of a stack is split."""
    import orbax.checkpoint as ocp

    items: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    fitting: dict[str, Any] = {}
    for name, spec in specs.items():
        sharding, held = shardings[name], spec.dtype(dtype)
        if stacked and layer is not None:
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        fit = functools.partial(fitted, name)
        if jax.eval_shape(fit, jax.ShapeDtypeStruct(spec.shape, held)).shape != spec.shape:
            # What is stored does not divide as the fitted array does: every device restores the whole of it.
            fitting[name] = jax.jit(fit, out_shardings=sharding)
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        item: Any = jax.ShapeDtypeStruct(spec.shape, held, sharding=sharding)
        argument: Any = ocp.ArrayRestoreArgs(dtype=held, sharding=sharding, global_shape=spec.shape)
        items[name] = item if layer is None else {str(layer): item}
        arguments[name] = argument if layer is None else {str(layer): argument}
    restored = checkpointer.restore(
        directory,
        args=ocp.args.PyTreeRestore(item=items, restore_args=arguments, partial_restore=True),
    )
    arrays = {name: restored[name] if layer is None else restored[name][str(layer)] for name in specs}
    return arrays | {name: fit(arrays[name]) for name, fit in fitting.items()}


def _keep(
    parameters: Parameters,
    name: str,
    array: jax.Array,
    layer: int | None,
    spec: ParameterSpec,
    sharding: NamedSharding,
    stacked: bool,
) -> None:
    if layer is None:
        parameters[name] = array
    elif not stacked:
        layers = parameters.setdefault(name, [])
        assert isinstance(layers, list)
        layers.append(array)
    else:
        stack = parameters.get(name)
        if stack is None:
            stack = jnp.zeros((len(spec.places), *array.shape), array.dtype, device=sharding)
        assert isinstance(stack, jax.Array)
        parameters[name] = set_layer(stack, array, np.int32(spec.places.index(layer)))

"""Random weights of the right shapes, for benchmarks and tests of a model that is not at hand.

Scaled as a freshly initialised model's are: norms at one, biases at zero, everything else uniform
with a standard deviation of 0.02, so that activations and logits stay sane.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from jaxllm.models.parameters import Parameters, ParameterSpec, Region

_STANDARD_DEVIATION = 0.02
_BOUND = _STANDARD_DEVIATION * math.sqrt(3)


class DummySource:
    """Makes weights on the host; those of a layer depend on the seed and its number, on nothing else."""

    def __init__(self, specs: Mapping[str, ParameterSpec], seed: int) -> None:
        self._specs = specs
        self._seed = seed

    def read(self, parameter: str, layer: int | None, region: Region, out: np.ndarray) -> None:
        """Fills `out` with a region of one parameter."""
        constant = _constant(parameter)
        if constant is not None:
            out.fill(constant)
            return
        shape = self._specs[parameter].shape
        size = math.prod(shape)
        entropy = (self._seed, zlib.crc32(parameter.encode()), 0 if layer is None else layer + 1)
        # 16 random bits a weight are plenty, and four times as fast to make as floats.
        words = np.random.SFC64(np.random.SeedSequence(entropy)).random_raw(-(-size // 4))
        whole = words.view(np.int16)[:size].reshape(shape)
        part = whole[tuple(slice(*bounds) for bounds in region)]
        np.multiply(part, np.float32(_BOUND / 2**15), out=out, casting="unsafe", dtype=np.float32)


def dummy_parameters_on_device(
    specs: Mapping[str, ParameterSpec],
    fitted: Callable[[str, jax.Array], jax.Array],
    shardings: Mapping[str, NamedSharding],
    dtype: np.dtype[Any],
    seed: int,
    *,
    stack_layers: bool,
    report: Callable[[int], object],
) -> Parameters:
    """The same on the devices themselves, each making its own part: seconds at any size.

    Args:
        specs: of the model as a checkpoint would hold it.
        fitted: a parameter's name and array to the array that the mesh splits.
    """
    root = jax.random.key(seed)
    parameters: Parameters = {}
    for name, spec in specs.items():
        key = jax.random.fold_in(root, np.uint32(zlib.crc32(name.encode())))
        make = functools.partial(
            _make,
            dtype=spec.dtype(dtype),
            constant=_constant(name),
            fitted=functools.partial(fitted, name),
            sharding=shardings[name],
        )
        if spec.num_layers is None:
            parameters[name] = make(key, shape=spec.shape)
        elif stack_layers:
            parameters[name] = make(key, shape=(len(spec.places), *spec.shape))
        else:
            keys = jax.random.split(key, spec.num_layers)
            parameters[name] = [make(one, shape=spec.shape) for one in keys]
        report(spec.size * spec.dtype(dtype).itemsize)
    return parameters


def _make(
    key: jax.Array,
    *,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    constant: float | None,
    fitted: Callable[[jax.Array], jax.Array],
    sharding: NamedSharding,
) -> jax.Array:
    fitted_shape = jax.eval_shape(fitted, jax.ShapeDtypeStruct(shape, dtype)).shape
    if fitted_shape == shape:
        return _compiled_make(shape, dtype, constant, sharding)(key)
    make = functools.partial(_values, shape=shape, dtype=dtype, constant=constant)
    return jax.jit(lambda key: fitted(make(key)), out_shardings=sharding)(key)


def _values(
    key: jax.Array, *, shape: tuple[int, ...], dtype: np.dtype[Any], constant: float | None
) -> jax.Array:
    if constant is not None:
        return jnp.full(shape, constant, dtype)
    return jax.random.uniform(key, shape, dtype, -_BOUND, _BOUND)


@functools.cache
def _compiled_make(
    shape: tuple[int, ...], dtype: np.dtype[Any], constant: float | None, sharding: NamedSharding
) -> Callable[[jax.Array], jax.Array]:
    make = functools.partial(_values, shape=shape, dtype=dtype, constant=constant)
    return jax.jit(make, out_shardings=sharding)


def _constant(parameter: str) -> float | None:
    """What a parameter is filled with; None where it is random."""
    if parameter.endswith(".bias"):
        return 0.0
    return 1.0 if parameter.endswith("norm.weight") else None

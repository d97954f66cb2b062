"""Weights into place: from a checkpoint, or made up, straight to the devices that hold them."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm.auto import tqdm

from jaxllm.errors import ConfigError
from jaxllm.models.config import ModelConfig
from jaxllm.models.decoder import parameter_specs
from jaxllm.models.dummy import DummySource, dummy_parameters_on_device
from jaxllm.models.fitting import FittedSource, fitted_array, parameter_shardings
from jaxllm.models.orbax_checkpoint import is_orbax_checkpoint, restore_parameters
from jaxllm.models.parameters import Parameters, ParameterSpec, WeightSource
from jaxllm.models.placement import Placer
from jaxllm.models.safetensors_source import SafetensorsSource
from sharding import make_mesh

logger = logging.getLogger(__name__)

LOAD_FORMATS = ("auto", "safetensors", "orbax", "dummy")
DTYPES = ("float32", "bfloat16", "float16")


def load_parameters(
    path: Path,
    config: ModelConfig,
    specs: Mapping[str, ParameterSpec],
    *,
    dtype: Any,
    mesh: Mesh | None = None,
    stack_layers: bool = False,
    load_format: str = "auto",
    seed: int = 0,
    progress: bool = False,
) -> Parameters:
    """Loads every parameter of a model onto a mesh.

    Weights stream part by part: a process reads only what its devices hold, and host memory beyond
    the weights themselves stays near one tensor of one layer.

    Args:
        path: the model's directory; "dummy" does not read it.
        specs: what the decoder declares; KV heads and vocabulary may be fitted to the mesh.
        dtype: float32, bfloat16 or float16, whatever the checkpoint holds.
        mesh: where to; None is the first device.
        stack_layers: per-layer parameters as one array [layers, ...] rather than a list of arrays.
        load_format: "safetensors"; "orbax", which `python -m jaxllm.convert` writes; "dummy", which
            is random weights of the right shapes; "auto" is whichever of the first two is there.
        seed: of "dummy"; the same seed gives the same weights on the same platform.
        progress: show a progress bar.

    Raises:
        CheckpointError: weights that are missing, unknown, duplicate, misshapen, of a wrong type,
            truncated or corrupt; before anything is placed.
        ConfigError: an unknown `load_format` or `dtype`, or a model that the mesh cannot split.
    """
    if load_format not in LOAD_FORMATS:
        raise ConfigError(
            f"load_format={load_format!r}; supported: {', '.join(LOAD_FORMATS)}", param="load_format"
        )
    dtype = _float_dtype(dtype)
    mesh = make_mesh(devices=jax.devices()[:1]) if mesh is None else mesh
    shardings = parameter_shardings(specs, mesh, stack_layers)
    declared = parameter_specs(config)
    # As a checkpoint has them, in the places that the stages of a pipeline have for them.
    stored = {name: replace(declared[name], stack=spec.stack) for name, spec in specs.items()}
    queries = config.queries_per_kv_head

    def fitted(name: str, array: jax.Array) -> jax.Array:
        return fitted_array(array, stored[name], specs[name], queries)

    if load_format == "auto":
        load_format = "orbax" if is_orbax_checkpoint(path) else "safetensors"
    logger.info("loading the weights of %s (%s) as %s", path, load_format, dtype)

    total = sum(spec.size * spec.dtype(dtype).itemsize for spec in specs.values())
    with tqdm(total=total, desc="Loading weights", unit="B", unit_scale=True, disable=not progress) as bar:
        if load_format == "orbax":
            return restore_parameters(
                path, stored, fitted, shardings, dtype, stack_layers=stack_layers, report=bar.update
            )
        if load_format == "dummy" and mesh.devices.flat[0].platform != "cpu":
            return dummy_parameters_on_device(
                stored, fitted, shardings, dtype, seed, stack_layers=stack_layers, report=bar.update
            )
        source: WeightSource = (
            DummySource(stored, seed) if load_format == "dummy" else SafetensorsSource(path, config, stored)
        )
        if stored != specs:
            source = FittedSource(source, stored, specs, queries)
        held = {spec.dtype(dtype) for spec in specs.values()}
        placers = {each: Placer(source, each, bar.update) for each in held}
        parameters: Parameters = {}
        for name, spec in specs.items():
            placer = placers[spec.dtype(dtype)]
            if spec.num_layers is None:
                parameters[name] = placer.place(name, None, spec, shardings[name])
            elif stack_layers:
                parameters[name] = placer.place_stacked(name, spec, shardings[name])
            else:
                parameters[name] = [
                    placer.place(name, layer, spec, shardings[name]) for layer in range(spec.num_layers)
                ]
        return parameters


def _float_dtype(dtype: Any) -> np.dtype[Any]:
    try:
        found = jnp.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}; supported: {', '.join(DTYPES)}", param="dtype")
    return found

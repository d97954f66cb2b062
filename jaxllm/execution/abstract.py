"""What a step takes and gives as shapes, dtypes and shardings: it is compiled before any of it exists."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxllm.execution.batch import FLOATS, INTEGERS, StepShape
from jaxllm.execution.sampler import no_logprobs
from jaxllm.models.decoder import Decoder
from jaxllm.models.fitting import parameter_shardings
from jaxllm.models.parameters import Parameters
from jaxllm.models.pipelined_decoder import HIDDEN_AXES
from sharding import named_sharding, on_shards, partition_spec


def abstract_parameters(decoder: Decoder) -> dict[str, Any]:
    """Every parameter, those of layers stacked or listed as the decoder's form has them.

    Raises:
        ConfigError: a size does not divide by the shards it is split into; with both and the array's name.
    """
    form, specs = decoder.form, decoder.parameter_specs()
    # On one device the compiler sees no mesh at all.
    shardings = {} if form.mesh is None else parameter_shardings(specs, form.mesh, form.stack_layers)
    arrays: dict[str, Any] = {}
    for name, spec in specs.items():
        stacked = form.stack_layers and spec.num_layers is not None
        shape = (len(spec.places), *spec.shape) if stacked else spec.shape
        sharding: Any = shardings.get(name)
        if form.attention_backend == "tpu" and is_read_in_rows(name):
            sharding = _row_major(len(shape), sharding)
        array = jax.ShapeDtypeStruct(shape, spec.dtype(form.dtype), sharding=sharding)
        arrays[name] = array if stacked or spec.num_layers is None else [array] * spec.num_layers
    return arrays


def is_read_in_rows(name: str) -> bool:
    """Whether a lookup or a kernel reads a parameter, where it lies, as rows."""
    return name == "embed.weight" or name.startswith("layers.mlp.experts.")


def _row_major(dimensions: int, sharding: Any) -> Format:
    """A TPU left to itself swaps dimensions where the last ones are short; each step would swap them back."""
    return Format(Layout(tuple(range(dimensions))), sharding or SingleDeviceSharding(jax.devices()[0]))


def laid_out(params: Parameters, abstract: dict[str, Any]) -> Parameters:
    """Parameters as the steps are compiled for them; what lies otherwise moves, and its old array is gone."""

    def lay_out(array: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        layout = wanted.format.layout
        if layout is None or layout.major_to_minor == array.format.layout.major_to_minor:  # type: ignore[union-attr, attr-defined]
            return array
        return jax.device_put(array, wanted.format, donate=True)

    return jax.tree.map(lay_out, params, abstract)


def abstract_cache(decoder: Decoder, num_pages: int, page_size: int) -> jax.ShapeDtypeStruct:
    """The KV cache, with so many pages for each replica."""
    spec, mesh = decoder.cache_spec(num_pages, page_size), decoder.form.mesh
    sharding: Any = None if mesh is None else named_sharding(mesh, spec.axes, spec.shape, "the KV cache")
    if decoder.form.attention_backend == "tpu":
        sharding = _row_major(len(spec.shape), sharding)
    return jax.ShapeDtypeStruct(spec.shape, decoder.form.dtype, sharding=sharding)


def abstract_hidden(decoder: Decoder, max_num_tokens: int) -> jax.ShapeDtypeStruct | None:
    """What the stages of a pipeline hand to one another after each step; None where there is no pipeline.

    Args:
        max_num_tokens: of the largest step.
    """
    form, mesh = decoder.form, decoder.form.mesh
    if mesh is None or form.num_stages == 1:
        return None
    width = decoder.config.hidden_size
    of_stage = (width, max_num_tokens) if form.feature_major else (max_num_tokens, width)
    shape = (form.axis_size("data") * form.num_stages, *of_stage)
    sharding = named_sharding(mesh, HIDDEN_AXES, shape, "the hidden states")
    return jax.ShapeDtypeStruct(shape, form.dtype, sharding=sharding)


def empty_cache(abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """A cache of zeros, laid out as the abstract one."""
    zeros = functools.partial(jnp.zeros, abstract.shape, abstract.dtype)
    return jax.jit(zeros, out_shardings=abstract.format)()


def abstract_state(create: Callable[[], Any], mesh: Mesh | AbstractMesh | None) -> Any:
    """What steps hand on to one another; its class says the LOGICAL_AXES of each field."""
    state = jax.eval_shape(create)
    if mesh is None:
        return state
    arrays: dict[str, Any] = {}
    for name, axes in type(state).LOGICAL_AXES.items():
        array = getattr(state, name)
        sharding = named_sharding(mesh, axes, array.shape, f"the state's {name}")
        arrays[name] = jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
    return type(state)(**arrays)


def everywhere(decoder: Decoder) -> NamedSharding | None:
    """Where what every device has whole lies; None on one device."""
    mesh = decoder.form.mesh
    return None if mesh is None else NamedSharding(mesh, PartitionSpec())


def by_replica(decoder: Decoder, dimension: int = 0) -> NamedSharding | None:
    """Where what replicas have one after the other, and the host gives or takes, lies; None on one device.

    On every device what is of its replica. A host of several has to know all of it, and so has each device.

    Args:
        dimension: that replicas share.
    """
    mesh = decoder.form.mesh
    if mesh is None or mesh.shape["data"] == 1 or (isinstance(mesh, Mesh) and mesh.is_multi_process):
        return everywhere(decoder)
    return NamedSharding(mesh, partition_spec((None,) * dimension + ("batch",)))


def shardings_of(arrays: Any) -> Any:
    """The sharding of each array of a tree, abstract or not."""
    return jax.tree.map(lambda array: array.sharding, arrays)


def lower_step(
    run: Callable[..., Any],
    decoder: Decoder,
    params: dict[str, Any],
    kv_pages: Any,
    state: Any,
    shape: StepShape,
) -> jax.stages.Lowered:
    """The step `run` of a shape, lowered for the devices that the abstract arrays lie on.

    Cache and state are donated and stay as they lie; what goes to the host is whole on every device of a
    replica. Each replica runs `run` on its own part of everything, one after the other in the arrays' first
    dimension (the second of the cache, and of batches that stages have), and hears of the others only where
    they share experts.

    Args:
        kv_pages: the cache as the decoder takes it.
    """
    stages = () if decoder.form.num_stages == 1 else (decoder.form.num_stages,)
    batch, packed = by_replica(decoder), by_replica(decoder, len(stages))
    replicas = decoder.form.axis_size("data")
    if batch is not None and replicas > 1:
        arrays = jax.tree.map(lambda array: array.sharding.spec, (params, kv_pages, state))
        _, cache, of_state = arrays
        part = partition_spec(("batch",))
        of_stages = partition_spec((None,) * len(stages) + ("batch",))
        inputs = (*arrays, of_stages, of_stages)
        run = on_shards(run, batch.mesh, inputs, (cache, of_state, part, part), axes=("data",))
    # A float32 model is computed in float32: by default a GPU would take TF32, and a TPU bfloat16.
    precision = "highest" if decoder.form.dtype == jnp.float32 else "default"
    with jax.default_matmul_precision(precision):
        stays = (jax.tree.map(lambda array: array.format, kv_pages), shardings_of(state))
        gives = (*stays, batch, _logits_sharding(decoder))
        return jax.jit(run, donate_argnums=(1, 2), out_shardings=gives).lower(
            params,
            kv_pages,
            state,
            jax.ShapeDtypeStruct((*stages, replicas * shape.num_integers), jnp.int32, sharding=packed),
            jax.ShapeDtypeStruct((*stages, replicas * shape.num_floats), jnp.float32, sharding=packed),
        )


def lower_sample_late(
    run: Callable[..., Any],
    decoder: Decoder,
    state: Any,
    token_masks: jax.ShapeDtypeStruct,
    num_logprobs: int,
) -> jax.stages.Lowered:
    """`sample_late` for steps with as many sequences as the masks have, see `lower_step`."""
    batch, replicas = by_replica(decoder), decoder.form.axis_size("data")
    rows = token_masks.shape[0]
    if batch is not None and replicas > 1:
        of_state = jax.tree.map(lambda array: array.sharding.spec, state)
        part = partition_spec(("batch",))
        run = on_shards(run, batch.mesh, (of_state, *[part] * 6), (of_state, part, part), axes=("data",))

    def array(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch)

    logits = array(jnp.float32, rows, decoder.fitted.vocab_size)
    logprobs = jax.eval_shape(lambda: no_logprobs(rows, num_logprobs))
    return jax.jit(run, donate_argnums=0, out_shardings=(shardings_of(state), batch, batch)).lower(
        state,
        logits.update(sharding=_logits_sharding(decoder)),
        array(jnp.int32, replicas + len(INTEGERS) * rows),
        array(jnp.float32, len(FLOATS) * rows),
        token_masks,
        array(jnp.int32, rows),
        jax.tree.map(lambda x: array(x.dtype, *x.shape), logprobs),
    )


def _logits_sharding(decoder: Decoder) -> NamedSharding | None:
    """How a step's logits lie, float32[S, V] of each replica; None on one device."""
    mesh = decoder.form.mesh
    return None if mesh is None else NamedSharding(mesh, partition_spec(("batch", "vocab")))

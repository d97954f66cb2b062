"""Weights laid out for shards: every query meets its own key, whichever shard it went to."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from jaxllm.errors import ConfigError
from jaxllm.models.blocks import DecoderForm
from jaxllm.models.config import ModelConfig
from jaxllm.models.decoder import Decoder, parameter_specs
from jaxllm.models.dummy import DummySource
from jaxllm.models.fitting import FittedSource, fit_to_shards, fitted_array, shard_of, shard_specs
from jaxllm.models.parameters import ParameterSpec
from sharding import MESH_AXES

MODEL = ModelConfig("LlamaForCausalLM", 19, 6, 12, 3, 4, 2, 2, 64, qkv_bias=True)


class ArraySource:
    """Parameters from arrays at hand."""

    def __init__(self, arrays: dict[str, np.ndarray]) -> None:
        self.arrays = arrays
        self.read_elements = 0

    def read(
        self, parameter: str, layer: int | None, region: tuple[tuple[int, int], ...], out: np.ndarray
    ) -> None:
        array = self.arrays[parameter]
        array = array if layer is None else array[layer]
        out[...] = array[tuple(slice(*bounds) for bounds in region)]
        self.read_elements += out.size


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tensor", "fitted"),
    [(8, 4, 2, 4), (8, 2, 4, 4), (8, 1, 8, 8), (24, 6, 4, 12), (6, 2, 4, 2), (5, 5, 2, 5), (8, 2, 1, 2)],
)
def test_kv_heads_are_copied_where_queries_can_be_shared(
    heads: int, kv_heads: int, tensor: int, fitted: int
) -> None:
    model = replace(MODEL, num_heads=heads, num_kv_heads=kv_heads)
    assert fit_to_shards(model, tensor).num_kv_heads == fitted


def test_a_vocabulary_is_whole_chunks_for_every_shard() -> None:
    assert fit_to_shards(MODEL, 1) is MODEL
    assert fit_to_shards(MODEL, 2).vocab_size == 512
    assert fit_to_shards(replace(MODEL, vocab_size=512), 2).vocab_size == 512
    assert fit_to_shards(replace(MODEL, vocab_size=513), 2).vocab_size == 1024
    assert fit_to_shards(MODEL, 2, 4).vocab_size == 2048


@settings(max_examples=40)
@given(
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 6),
    tensor=st.integers(2, 8),
    data=st.data(),
)
def test_fitted_heads_are_those_of_the_model(
    kv_heads: int, group: int, tensor: int, data: st.DataObject
) -> None:
    heads = kv_heads * group
    model = replace(MODEL, num_heads=heads, num_kv_heads=kv_heads)
    fitted = fit_to_shards(model, tensor)
    rng = np.random.default_rng(0)
    # The norm of keys, which has no queries, is copied whole.
    norm = ParameterSpec((kv_heads, 2), ("kv_heads", None), 2)
    fitted_norm = ParameterSpec((fitted.num_kv_heads, 2), ("kv_heads", None), 2)
    whole = rng.normal(size=norm.shape).astype(np.float32)
    want = whole[np.arange(fitted.num_kv_heads) * kv_heads // fitted.num_kv_heads]
    np.testing.assert_array_equal(fitted_array(jnp.asarray(whole), norm, fitted_norm, group), want)
    out = np.empty(want.shape, np.float32)
    source = FittedSource(ArraySource({"norm": whole}), {"norm": norm}, {"norm": fitted_norm}, group)
    source.read("norm", None, ((0, fitted.num_kv_heads), (0, 2)), out)
    np.testing.assert_array_equal(out, want)
    for name, extra in (("qkv", 2), ("q_norm", 0)):
        axes = ("kv_heads", None, None)
        stored = ParameterSpec((kv_heads, group + extra, 2), axes, 2)
        per_head = fitted.queries_per_kv_head
        spec = ParameterSpec((fitted.num_kv_heads, per_head + extra, 2), axes, 2)
        whole = rng.normal(size=(2, *stored.shape)).astype(np.float32)

        # By definition: query i of all the model's, and the key and value that it attends with.
        want = np.empty((2, *spec.shape), np.float32)
        for head in range(fitted.num_kv_heads):
            for j in range(per_head):
                query = head * per_head + j
                want[..., head, j, :] = whole[..., query // group, query % group, :]
            for j in range(extra):
                want[..., head, per_head + j, :] = whole[..., head * per_head // group, group + j, :]

        got = fitted_array(jnp.asarray(whole), stored, spec, group)
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(fitted_array(jnp.asarray(whole[1]), stored, spec, group), want[1])

        region = []
        for size in spec.shape:
            start = data.draw(st.integers(0, size - 1))
            region.append((start, data.draw(st.integers(start + 1, size))))
        arrays = ArraySource({name: whole})
        out = np.full([stop - start for start, stop in region], np.nan, np.float32)
        FittedSource(arrays, {name: stored}, {name: spec}, group).read(name, 1, tuple(region), out)
        np.testing.assert_array_equal(out, want[1][tuple(slice(*bounds) for bounds in region)])
        assert arrays.read_elements == out.size


@settings(max_examples=30)
@given(size=st.integers(1, 40), padded=st.integers(0, 40), start=st.integers(0, 60), count=st.integers(1, 40))
def test_rows_past_the_vocabulary_are_zeros(size: int, padded: int, start: int, count: int) -> None:
    stored = ParameterSpec((size, 3), ("vocab", "embed"))
    fitted = ParameterSpec((size + padded, 3), ("vocab", "embed"))
    whole = np.random.default_rng(0).normal(size=stored.shape).astype(np.float32)
    want = np.concatenate([whole, np.zeros((padded, 3), np.float32)])
    np.testing.assert_array_equal(fitted_array(jnp.asarray(whole), stored, fitted, 1), want)
    start = min(start, size + padded - 1)
    stop = min(start + count, size + padded)
    out = np.full((stop - start, 2), np.nan, np.float32)
    source = ArraySource({"embed": whole})
    FittedSource(source, {"embed": stored}, {"embed": fitted}, 1).read(
        "embed", None, ((start, stop), (1, 3)), out
    )
    np.testing.assert_array_equal(out, want[start:stop, 1:])


def test_a_parameter_that_is_as_stored_passes_through() -> None:
    specs = parameter_specs(MODEL)
    source = FittedSource(DummySource(specs, 0), specs, specs, 2)
    name = "layers.mlp.down.weight"
    region = ((1, 4), (2, 7))
    got, want = np.empty((3, 5), np.float32), np.empty((3, 5), np.float32)
    source.read(name, 2, region, got)
    DummySource(specs, 0).read(name, 2, region, want)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("tensor", "pipe"), [(2, 1), (4, 1), (1, 2), (2, 2)])
def test_a_shard_is_the_model_that_one_device_holds(tensor: int, pipe: int) -> None:
    """Its parameters have the shapes of the shards, layers rounded up where stages differ."""
    mesh = AbstractMesh((1, pipe, tensor), MESH_AXES)
    form = DecoderForm(jnp.float32, False, False, "reference", mesh)
    decoder = Decoder(MODEL, form)
    shard = shard_of(decoder.fitted, tensor, pipe)
    assert shard_specs(decoder.parameter_specs(), mesh) == parameter_specs(shard)
    assert shard.num_layers == -(-3 // pipe)


def test_what_does_not_divide_is_named() -> None:
    for changes, message in (
        (
            {"num_heads": 6},
            r"attention.qkv.(bias|weight): the axis 'kv_heads' of size 2 .* 4 shards .*'tensor'",
        ),
        ({"intermediate_size": 10}, r"mlp.down.weight: the axis 'mlp' of size 10 .* 4 shards .*'tensor'"),
    ):
        mesh = AbstractMesh((1, 1, 4), MESH_AXES)
        form = DecoderForm(jnp.float32, False, False, "reference", mesh)
        specs = Decoder(replace(MODEL, **changes), form).parameter_specs()
        with pytest.raises(ConfigError, match=message):
            shard_specs(specs, mesh)

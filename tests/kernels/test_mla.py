"""Latent attention on every portable backend: random ragged batches against float64, the cache exactly."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from pallas_kernels.mla_ragged_paged_attention import cache_rows, mla_ragged_paged_attention
from pallas_kernels.mla_ragged_paged_attention.shapes import LAYERS, LatentShape
from tests.kernels.latent_batches import Batch, Shape, check, oracle, random_batch

SHAPES = {
    "mixed": Shape(6, 16, 4, 4, 24, 5, 40, longest=30),
    "odd sizes, spare numbers": Shape(3, 7, 6, 3, 25, 3, 17, spare=5),
    "long prefill": Shape(2, 8, 4, 16, 30, 3, 400, longest=380),
    "page of one token": Shape(2, 8, 2, 1, 40, 4, 24),
    "decodes": Shape(6, 8, 4, 16, 20, 9, 9, decode_only=True),
    "soft cap": Shape(4, 16, 8, 8, 24, 4, 40, longest=30, soft_cap=5.0),
    "bfloat16": Shape(4, 16, 8, 8, 12, 4, 32, dtype=jnp.bfloat16),
    "bfloat16 pages": Shape(4, 16, 8, 8, 12, 4, 4, decode_only=True, cache_dtype=jnp.bfloat16, lse=False),
}
PROPERTY_SHAPES = {
    "mixed": Shape(2, 4, 2, 4, 20, 4, 24, soft_cap=20.0),
    "decodes": Shape(2, 4, 2, 4, 20, 6, 6, decode_only=True),
}
on_every_backend = pytest.mark.parametrize("backend", ["reference", "xla"])


@functools.partial(jax.jit, static_argnames=("shape", "backend"), donate_argnums=4)
def _jitted(*operands: Any, shape: Shape, backend: Any) -> Any:
    return mla_ragged_paged_attention(*operands, **shape.options, backend=backend)


def run(batch: Batch, shape: Shape, backend: str) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(x) for x in _jitted(*batch.operands, shape=shape, backend=backend))


@on_every_backend
@pytest.mark.parametrize("name", SHAPES)
def test_any_ragged_batch(name: str, backend: str) -> None:
    shape = SHAPES[name]
    for seed, logit_size in enumerate((1.0, 0.01, 8.0)):
        batch = random_batch(shape, seed, logit_size)
        check(batch, shape, *run(batch, shape, backend))


@st.composite
def lengths(draw: st.DrawFn, shape: Shape) -> list[tuple[int, int]]:
    """(tokens in the cache, new tokens) of each sequence, favouring the ends of pages and of the cache."""
    capacity, room, drawn = shape.pages_per_seq * shape.page_size, shape.num_tokens, []
    for _ in range(shape.num_seqs):
        new = draw(st.integers(0, min(room, 1 if shape.decode_only else capacity)))
        ends = st.sampled_from([n for n in (0, 3, 4, 5, 63, 64, 65, capacity - new) if n <= capacity - new])
        drawn.append((draw(ends | st.integers(0, capacity - new)) if new else 0, new))
        room -= new
    return drawn


@pytest.mark.parametrize("name", PROPERTY_SHAPES)
@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), logit_size=st.floats(0.01, 8.0))
def test_whatever_the_lengths(name: str, data: st.DataObject, seed: int, logit_size: float) -> None:
    shape = PROPERTY_SHAPES[name]
    batch = random_batch(shape, seed, logit_size, data.draw(lengths(shape)))
    check(batch, shape, *run(batch, shape, "xla"))


@on_every_backend
@pytest.mark.parametrize("layer", dict.fromkeys(LAYERS.values()), ids=lambda layer: f"{layer.heads} heads")
def test_layers_of_models(layer: LatentShape, backend: str) -> None:
    shape = Shape(layer.heads, layer.kv_lora_rank, layer.rope_dim, 16, 4, 3, 8, dtype=jnp.bfloat16)
    batch = random_batch(shape, 0, 1.0, [(40, 5), (63, 1), (0, 1)])
    check(batch, shape, *run(batch, shape, backend))


@on_every_backend
def test_an_empty_batch_leaves_the_cache_alone(backend: str) -> None:
    shape = replace(SHAPES["decodes"], decode_only=False)
    batch = replace(
        random_batch(shape, 0, 1.0), seq_lens=np.zeros(9, np.int32), query_starts=np.zeros(10, np.int32)
    )
    batch.latent[:] = batch.k_rope[:] = np.nan
    check(batch, shape, *run(batch, shape, backend))


def _shifted(name: str, shift: Callable[[np.ndarray], Any]) -> Callable[[Batch], Batch]:
    def change(batch: Batch) -> Batch:
        array = np.asarray(getattr(batch, name))
        return replace(batch, **{name: np.asarray(shift(array)).astype(array.dtype)})

    return change


OFF = replace(SHAPES["mixed"], soft_cap=6.0)
OFF_LENGTHS = [(40, 5), (60, 1), (37, 8), (70, 1), (0, 0)]
# Without a window, pages in another order would give the same sum.
_ONE_PAGE_TWICE = [0, 2, *range(2, 24)]
MISTAKES: dict[str, Shape | Callable[[Batch], Batch]] = {
    "scale": _shifted("q_latent", lambda q: q * 1.0005),
    "scale of the rotated part": _shifted("q_rope", lambda q: q * 1.001),
    "page": _shifted("page_table", lambda table: table[:, _ONE_PAGE_TWICE]),
    "layer": _shifted("layer", lambda layer: (layer + 1) % 3),
    "causal": _shifted("seq_lens", lambda lens: lens - (lens > 50)),
    "soft cap": replace(OFF, soft_cap=6.01),
}


@on_every_backend
@pytest.mark.parametrize("mistake", MISTAKES)
def test_off_by_one_shows(mistake: str, backend: str) -> None:
    batch, change = random_batch(OFF, 0, 1.0, OFF_LENGTHS), MISTAKES[mistake]
    _, right_cache, _ = oracle(batch, OFF)
    shape, changed = (change, batch) if isinstance(change, Shape) else (OFF, change(batch))
    out, _, lse = run(changed, shape, backend)
    with pytest.raises(AssertionError, match=r"relative error|not finite"):
        check(batch, OFF, out, right_cache, lse)


def _loop_of_layers(*operands: Any) -> Any:
    """Three layers, whose latents depend on the output of the layer before."""
    q, q_rope, pages, table, lens, starts = operands

    def layer(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q, pages = carry
        latent, k_rope = jnp.tanh(q[:, 0]), jnp.sin(q_rope[:, 0])
        out, pages = mla_ragged_paged_attention(
            q, q_rope, latent, k_rope, pages, index, table, lens, starts, scale=0.3
        )
        return q + out, pages

    return jax.lax.fori_loop(0, 3, layer, (q, pages))


def test_a_loop_of_layers_never_copies_the_cache() -> None:
    def array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    integers = [array(*shape, dtype=jnp.int32) for shape in ((8, 6), (8,), (9,))]
    arguments = (array(32, 4, 16), array(32, 4, 8), array(3, 1000, 64, 24), *integers)
    copies = re.compile(
        r"= f32\[3,1000,64,24\]\S* (copy|transpose|convert|copy-start)\(|= f32\[3,1000,64,24\]\S* "
        r"fusion\(.*calls=\S*copy"
    )
    donated = jax.jit(_loop_of_layers, donate_argnums=2).lower(*arguments).compile()
    assert not copies.findall(donated.as_text())
    # That the pattern finds a copy where there is one: a cache that is not given away must be kept.
    assert copies.findall(jax.jit(_loop_of_layers).lower(*arguments).compile().as_text())


def test_heads_are_shared_and_rows_are_not() -> None:
    """Under `shard_map` a device has its own heads, and writes the same rows as the others: no collective."""
    mesh = AbstractMesh((4,), ("tensor",), axis_types=(AxisType.Auto,))
    heads, whole = PartitionSpec(None, "tensor"), PartitionSpec()
    op = functools.partial(mla_ragged_paged_attention, scale=0.3, backend="xla")
    sharded = jax.shard_map(
        op, mesh=mesh, in_specs=(heads, heads, *[whole] * 7), out_specs=(heads, whole), check_vma=False
    )
    batch = random_batch(replace(SHAPES["mixed"], heads=8), 0, 1.0)
    jaxpr = jax.make_jaxpr(sharded)(*batch.operands)
    out, pages = jaxpr.out_avals
    assert out.shape == batch.q_latent.shape and pages.shape == batch.kv_pages.shape
    assert not re.search(r"psum|all_gather|ppermute|all_to_all", str(jaxpr))


def _valid() -> tuple[list[Any], dict[str, Any]]:
    integers = [jnp.zeros(shape, jnp.int32) for shape in ((3, 2), (3,), (4,))]
    floats = [jnp.zeros(shape) for shape in ((4, 2, 8), (4, 2, 4), (4, 8), (4, 4), (1, 5, 2, 12))]
    return [*floats, 0, *integers], {"scale": 1.0}


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, (4, 8), r"q_latent must be \[T, heads, kv_lora_rank\]"),
        (1, (4, 3, 4), r"got \(4, 2, 8\) and \(4, 3, 4\)"),
        (2, (4, 9), r"latent must be .* \[4, 8\]"),
        (3, (5, 4), r"k_rope .* \[4, 4\]; got \[4, 8\] and \[5, 4\]"),
        (4, (1, 5, 2, 11), r"kv_lora_rank \+ rope_dim = 12; got \[1, 5, 2, 11\]"),
        (4, (1, 5, 2, 1, 12), r"pages must be"),
        (7, (4,), r"page_table has 3 sequences"),
        ("soft_cap", 0.0, r"soft_cap=0.0 must be positive"),
        ("decode_only", True, r"4 rows and 3 sequences"),
        ("backend", "cuda", r"backend='cuda' is not one of reference, xla, tpu, gpu, triton"),
    ],
)
def test_what_does_not_fit_is_refused(index: int | str, value: Any, message: str) -> None:
    arrays, options = _valid()
    if isinstance(index, int):
        arrays[index] = jnp.zeros(value, arrays[index].dtype)
    else:
        options[index] = value
    with pytest.raises(ValueError, match=message):
        mla_ragged_paged_attention(*arrays, **options)


def test_other_refusals() -> None:
    arrays, options = _valid()
    with pytest.raises(ValueError, match="no tiles"):
        mla_ragged_paged_attention(*arrays, **options, backend="reference", tiling=1)
    arrays[4] = arrays[4].astype(jnp.int8)
    with pytest.raises(ValueError, match=r"pages are int8; a cache is one of float32"):
        mla_ragged_paged_attention(*arrays, **options)


def test_how_the_cache_is_held() -> None:
    assert cache_rows("xla", 512, 64) == (1, 576)
    assert cache_rows("tpu", 512, 64) == (2, 384)

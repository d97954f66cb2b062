"""One suite over every backend: random ragged batches against a float64 oracle, the cache bit for bit."""

from __future__ import annotations

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

from pallas_kernels.ragged_paged_attention import ragged_paged_attention
from tests.kernels.backends import (
    BackendUnderTest,
    on_every_backend,
    on_every_backend_and,
    on_every_fast_backend,
)
from tests.kernels.oracle import TOLERANCE, oracle
from tests.kernels.ragged_batches import Batch, Shape, random_batch

SHAPES = {
    "grouped heads": Shape(6, 2, 16, 4, 24, 5, 40, longest=30),
    "odd head, odd page": Shape(3, 1, 7, 3, 25, 3, 17),
    "page wider than a block": Shape(4, 2, 5, 64, 3, 4, 32),
    "long prefill": Shape(2, 1, 8, 16, 30, 3, 400, longest=380),
    "long prefill, window": Shape(2, 1, 8, 16, 30, 3, 400, longest=380, window=37),
    "window of one, page of one token": Shape(2, 2, 8, 1, 40, 4, 24, window=1),
    "window over blocks": Shape(4, 2, 8, 8, 32, 4, 40, longest=30, window=70),
    "decodes": Shape(6, 3, 8, 16, 20, 9, 9, decode_only=True),
    "decodes, window": Shape(2, 1, 11, 5, 60, 6, 6, window=65, decode_only=True),
    "a lone decode": Shape(4, 1, 8, 16, 9, 1, 1, decode_only=True),
    "more sequences than lanes, page of one token": Shape(2, 1, 4, 1, 100, 48, 48, decode_only=True),
    "decodes of many keys, all together": Shape(
        16, 8, 128, 16, 12, 4, 4, decode_only=True, window=150, soft_cap=9.0, sinks=True, alibi=True,
        tree_width=3, lse=True,
    ),
    "many heads of a key, head wider than a vector": Shape(10, 1, 72, 5, 30, 3, 70, longest=60, lse=True),
    "mixed, with many keys": Shape(16, 8, 128, 16, 12, 4, 30, lse=True),
    "bfloat16": Shape(4, 2, 16, 8, 12, 4, 32, dtype=jnp.bfloat16),
    "bfloat16 decodes": Shape(4, 2, 16, 8, 12, 4, 4, decode_only=True, dtype=jnp.bfloat16),
    "sinks, window": Shape(4, 2, 8, 16, 12, 5, 40, longest=30, sinks=True, window=40, lse=True),
    "soft cap, window": Shape(4, 2, 16, 8, 24, 4, 40, longest=30, soft_cap=5.0, window=50, lse=True),
    "ALiBi": Shape(4, 4, 8, 8, 24, 4, 40, longest=30, alibi=True, lse=True),
    "spans over tiles": Shape(2, 1, 8, 8, 40, 4, 120, longest=110, spans=True),
    "spans, window": Shape(2, 1, 8, 4, 40, 4, 40, longest=30, spans=True, window=9, lse=True),
    "trees": Shape(4, 2, 8, 4, 24, 5, 40, longest=16, tree_width=12, lse=True),
    "trees over tiles, window": Shape(
        2, 1, 8, 8, 40, 3, 100, longest=90, tree_width=80, window=20, sinks=True
    ),
    "int8 pages": Shape(4, 2, 16, 8, 24, 4, 40, longest=30, cache_dtype=jnp.int8),
    "fp8 pages": Shape(4, 2, 16, 8, 12, 4, 32, dtype=jnp.bfloat16, cache_dtype=jnp.float8_e4m3fn, lse=True),
    "bfloat16 pages": Shape(4, 2, 16, 8, 12, 4, 4, decode_only=True, cache_dtype=jnp.bfloat16),
    "long prefill, much together": Shape(
        2, 1, 8, 16, 30, 3, 400, longest=380, window=200, soft_cap=9.0, sinks=True, alibi=True, spans=True,
        cache_dtype=jnp.float8_e5m2, lse=True,
    ),
    "decodes, all together": Shape(
        6, 2, 8, 8, 24, 6, 6, decode_only=True, window=90, soft_cap=9.0, sinks=True, alibi=True, tree_width=3,
        cache_dtype=jnp.int8, lse=True,
    ),
}  # fmt: skip


@on_every_backend_and(SHAPES)
def test_any_ragged_batch(shape: Shape, backend: BackendUnderTest) -> None:
    for seed, logit_size in zip(range(backend.batches), (1.0, 0.01, 8.0, 1.0), strict=False):
        backend.check(random_batch(shape, seed, logit_size), shape)


# Few shapes, each with many options, since every shape is compiled.
PROPERTY_SHAPES = {
    "causal": Shape(2, 1, 4, 4, 20, 4, 24, window=30, sinks=True, soft_cap=20.0, lse=True),
    "trees": Shape(2, 1, 4, 4, 20, 4, 24, tree_width=5, alibi=True, cache_dtype=jnp.int8, lse=True),
    "decodes": Shape(2, 1, 4, 4, 20, 6, 6, decode_only=True, window=30, sinks=True, lse=True),
}


@st.composite
def lengths(draw: st.DrawFn, shape: Shape) -> list[tuple[int, int]]:
    """(tokens in the cache, new tokens) of each sequence, favouring the ends of pages and of the cache."""
    capacity, room, drawn = shape.pages_per_seq * shape.page_size, shape.num_tokens, []
    for _ in range(shape.num_seqs):
        new = draw(st.integers(0, min(room, 1 if shape.decode_only else capacity)))
        most = capacity - new
        ends = st.sampled_from([n for n in (0, 3, 4, 5, 63, 64, 65, most - 1, most) if 0 <= n <= most])
        drawn.append((draw(ends | st.integers(0, most)) if new else 0, new))
        room -= new
    return drawn


@on_every_fast_backend
@pytest.mark.parametrize("name", PROPERTY_SHAPES)
@settings(max_examples=25)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1), logit_size=st.floats(0.01, 8.0))
def test_whatever_the_lengths(
    name: str, backend: BackendUnderTest, data: st.DataObject, seed: int, logit_size: float
) -> None:
    shape = PROPERTY_SHAPES[name]
    backend.check(random_batch(shape, seed, logit_size, data.draw(lengths(shape))), shape)


@on_every_backend
def test_edges_of_trees(backend: BackendUnderTest) -> None:
    """As many new tokens as the mask is wide, one more, and queries that see nothing at all."""
    shape = PROPERTY_SHAPES["trees"]
    batch = random_batch(shape, 0, 1.0, [(10, 5), (10, 6), (0, 4), (0, 1)])
    assert batch.tree_mask is not None
    tree_mask = batch.tree_mask.copy()
    tree_mask[batch.query_starts[2] :] = False
    backend.check(replace(batch, tree_mask=tree_mask), shape)


@on_every_backend
def test_a_sink_of_minus_infinity_is_none(backend: BackendUnderTest) -> None:
    shape = SHAPES["sinks, window"]
    batch = random_batch(shape, 0, 1.0)
    assert batch.sinks is not None
    backend.check(replace(batch, sinks=np.where(np.arange(shape.heads) % 2, batch.sinks, -np.inf)), shape)


@on_every_backend
@pytest.mark.parametrize("decode_only", [False, True])
def test_empty_batch_leaves_the_cache_alone(backend: BackendUnderTest, decode_only: bool) -> None:
    shape = replace(SHAPES["decodes"], decode_only=decode_only)
    full = random_batch(shape, 0, 1.0)
    batch = replace(full, seq_lens=np.zeros(9, np.int32), query_starts=np.zeros(10, np.int32))
    batch = replace(batch, k=np.full_like(full.k, np.nan), v=np.full_like(full.v, np.nan))
    backend.check(batch, shape)


@on_every_backend
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extreme_logits_stay_finite(backend: BackendUnderTest, size: float) -> None:
    """Logits that vanish weigh all alike; those that are huge choose one key."""
    shape = SHAPES["grouped heads"]
    batch = random_batch(shape, 3, size)
    out, _ = backend.run(batch, shape)
    exact, _, _ = oracle(batch, shape)
    assert np.isfinite(out).all()
    real = batch.query_starts[-1]
    if size < 1:
        error = np.linalg.norm(out[:real] - exact[:real])
        assert error <= TOLERANCE[shape.dtype] * np.linalg.norm(exact[:real])


@on_every_backend
def test_many_steps_fill_the_cache(backend: BackendUnderTest) -> None:
    """Chunks of a prompt, then decodes, each on the cache that the last one left, equal one prefill."""
    shape = Shape(4, 2, 8, 4, 8, 2, 24, longest=24)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(24, h, 8)).astype(np.float32) for h in (4, 2, 2))
    cache = np.full((1, 20, 4, 4, 8), np.nan, np.float32)
    table = np.array([[3, 7, 2, 9, 11, 5, 0, 0], [0] * 8], np.int32)
    whole = Batch(q, k, v, cache, 0, table, np.array([24, 0], np.int32), np.array([0, 24, 24], np.int32))
    expected, _ = backend.run(whole, shape)
    outs, done = [], 0
    for size in (7, 1, 9, 1, 1, 5):
        new = slice(done, done + size)
        done += size

        def padded(x: np.ndarray, new: slice = new) -> np.ndarray:
            return np.pad(x[new], ((0, 24 - (new.stop - new.start)), (0, 0), (0, 0)))

        part = replace(
            whole,
            q=padded(q),
            k=padded(k),
            v=padded(v),
            kv_pages=cache,
            seq_lens=np.array([done, 0], np.int32),
            query_starts=np.array([0, size, size], np.int32),
        )
        out, cache = backend.run(part, shape)
        outs.append(out[:size])
    error = np.linalg.norm(np.concatenate(outs) - expected)
    assert error <= TOLERANCE[shape.dtype] * np.linalg.norm(expected)


def _layers_over_the_op(backend: str, decode_only: bool) -> Callable[..., Any]:
    """Three layers, whose keys depend on the output of the layer before."""

    def layers(
        x: jax.Array, kv_pages: jax.Array, table: jax.Array, lens: jax.Array, starts: jax.Array
    ) -> Any:
        def layer(index: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            x, kv_pages = carry
            k, v = jnp.tanh(x[:, ::2]), jnp.sin(x[:, ::2])
            out, kv_pages = ragged_paged_attention(
                x, k, v, kv_pages, index, table, lens, starts, scale=0.3, decode_only=decode_only,
                backend=backend,  # type: ignore[arg-type]
            )  # fmt: skip
            return x + out, kv_pages

        return jax.lax.fori_loop(0, 3, layer, (x, kv_pages))

    return layers


@pytest.mark.parametrize("backend", ["reference", "xla", "cpu"])
@pytest.mark.parametrize("decode_only", [False, True])
def test_a_loop_of_layers_never_copies_the_cache(backend: str, decode_only: bool) -> None:
    cache = jax.ShapeDtypeStruct((3, 1000, 64, 4, 16), jnp.float32)
    num_seqs, num_tokens = 8, 8 if decode_only else 32
    arguments = (
        jax.ShapeDtypeStruct((num_tokens, 4, 16), jnp.float32),
        cache,
        jax.ShapeDtypeStruct((num_seqs, 6), jnp.int32),
        jax.ShapeDtypeStruct((num_seqs,), jnp.int32),
        jax.ShapeDtypeStruct((num_seqs + 1,), jnp.int32),
    )
    layers = _layers_over_the_op(backend, decode_only)
    shape = re.escape(f"f32[{','.join(map(str, cache.shape))}]")
    copies = re.compile(
        rf"= {shape}\S* (copy|transpose|convert|copy-start)\(|= {shape}\S* fusion\(.*calls=\S*copy"
    )

    donated = jax.jit(layers, donate_argnums=1).lower(*arguments).compile()
    assert not copies.findall(donated.as_text())
    memory = donated.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < cache.size * 4 / 2

    # That the pattern finds a copy where there is one: a cache that is not given away must be kept.
    kept = jax.jit(layers).lower(*arguments).compile()
    assert copies.findall(kept.as_text())

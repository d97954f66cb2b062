"""The named shapes: what they count, and that every layer of a model is right on every backend."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_kernels.ragged_paged_attention.shapes import LAYERS, WORKS, Work
from tests.kernels.backends import BackendUnderTest, on_every_backend
from tests.kernels.ragged_batches import Shape, random_batch


@on_every_backend
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_models(name: str, backend: BackendUnderTest) -> None:
    layer = LAYERS[name]
    shape = Shape(
        layer.heads, layer.kv_heads, layer.head_dim, 16, 10, 3, 8, window=layer.window, dtype=jnp.bfloat16,
        soft_cap=layer.soft_cap, sinks=layer.sinks, alibi=layer.alibi, spans=layer.spans,
    )  # fmt: skip
    backend.check(random_batch(shape, 0, 1.0, [(140, 5), (159, 1), (0, 1)]), shape)


@given(
    sequences=st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), max_size=3),
    window=st.none() | st.integers(1, 50),
)
def test_work_counts_what_the_mask_allows(sequences: list[tuple[int, int]], window: int | None) -> None:
    pairs = keys = 0
    for cached, new in sequences:
        query, key = np.arange(cached, cached + new)[:, None], np.arange(cached + new)
        mask = (key <= query) & (key > query - (window or 10**9))
        pairs, keys = pairs + mask.sum(), keys + mask.any(axis=0).sum()
    work = Work(tuple(sequences))
    assert work.pairs(window) == pairs
    assert work.keys_read(window) == keys


def test_works_and_layers_by_hand() -> None:
    work = WORKS["decode 64 x 8k"]
    assert work.decode_only and work.num_tokens == 64 and work.keys_read() == 64 * 8192
    assert work.keys_read() * LAYERS["llama-3.1-8b"].kv_bytes_per_token(2) == 2 * 1024**3  # 4 KiB a token
    assert work.flops(LAYERS["llama-3.1-8b"]) == 4 * 32 * 128 * 64 * 8192
    assert not WORKS["prefill 8k"].decode_only
    assert WORKS["prefill 8k"].pairs() == 8192 * 8193 // 2
    assert WORKS["mixed 64 x 2k and 1984"].num_tokens == 2048

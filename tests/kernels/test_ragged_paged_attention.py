"""One suite over every backend: random ragged batches against a float64 oracle, the cache bit for bit."""

from __future__ import annotations

import functools
import itertools
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import BACKENDS, ragged_paged_attention

# Float32 keeps 6e-8 of each number; logits of up to 40 in size carry 40 times that into the exponent,
# a few e-6 of a weight, and sums average it. A key too many or too few is off by 1e-3 and more.
TOLERANCE = {jnp.float32: 5e-6, jnp.bfloat16: 2**-8}  # bfloat16: rounding of the output, 2**-9 a number


@dataclass(frozen=True)
class Shape:
    """What a backend compiles for; query lengths of a batch are drawn up to `longest`."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    pages_per_seq: int
    num_seqs: int
    num_tokens: int
    longest: int = 12
    window: int | None = None
    decode_only: bool = False
    dtype: Any = jnp.float32


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
    "bfloat16": Shape(4, 2, 16, 8, 12, 4, 32, dtype=jnp.bfloat16),
    "bfloat16 decodes": Shape(4, 2, 16, 8, 12, 4, 4, decode_only=True, dtype=jnp.bfloat16),
}


@dataclass(frozen=True)
class Batch:
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    kv_pages: np.ndarray
    layer: int
    page_table: np.ndarray
    seq_lens: np.ndarray
    query_starts: np.ndarray
    scale: float

    @property
    def arrays(self) -> tuple[Any, ...]:
        """What the op takes by position; copies, since the cache is donated."""
        names = ("q", "k", "v", "kv_pages", "layer", "page_table", "seq_lens", "query_starts")
        return tuple(jnp.array(getattr(self, name)) for name in names)


def random_batch(shape: Shape, seed: int, logit_size: float) -> Batch:
    """Prefills, decodes and empty sequences in random order, with NaN wherever nothing may be read."""
    rng = np.random.default_rng([seed, zlib.crc32(repr(shape).encode())])
    capacity = shape.pages_per_seq * shape.page_size
    query_lens, room = [], shape.num_tokens
    for _ in range(shape.num_seqs):
        kind = rng.choice(["empty", "decode", "prefill"], p=[0.2, 0.4, 0.4])
        if shape.decode_only:
            kind = rng.choice(["empty", "decode"], p=[0.2, 0.8])
        wanted = {"empty": 0, "decode": 1, "prefill": int(rng.integers(2, shape.longest + 1))}[kind]
        query_lens.append(min(wanted, room, capacity))
        room -= query_lens[-1]
    contexts = [0 if n == 0 else int(rng.integers(0, capacity - n + 1)) for n in query_lens]
    query_starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    if shape.decode_only:
        # Row s is sequence s: only the last ones may be empty.
        order = np.argsort([n == 0 for n in query_lens], kind="stable")
        query_lens = [query_lens[i] for i in order]
        contexts = [contexts[i] for i in order]
        query_starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    seq_lens = np.array(contexts, np.int32) + np.array(query_lens, np.int32)

    def normal(*size: int) -> np.ndarray:
        return rng.normal(size=size).astype(np.float32).astype(shape.dtype)

    layers, num_pages = 3, shape.num_seqs * shape.pages_per_seq + 3
    kv_pages = np.full(
        (layers, num_pages, shape.page_size, 2 * shape.kv_heads, shape.head_dim), np.nan, np.float32
    ).astype(shape.dtype)
    layer = int(rng.integers(layers))
    free = rng.permutation(np.arange(1, num_pages)).astype(np.int32)
    # Past a sequence's pages the table may say anything, pages that do not exist included.
    page_table = rng.choice(
        np.array([0, 1, num_pages - 1, -1, 10**9], np.int32), (shape.num_seqs, shape.pages_per_seq)
    )
    for s, (context, length) in enumerate(zip(contexts, seq_lens, strict=True)):
        count = -(-int(length) // shape.page_size)
        page_table[s, :count], free = free[:count], free[count:]
        for position in range(context):
            page, offset = page_table[s, position // shape.page_size], position % shape.page_size
            kv_pages[layer, page, offset] = normal(2 * shape.kv_heads, shape.head_dim)
    tokens = shape.num_tokens
    k, v = normal(tokens, shape.kv_heads, shape.head_dim), normal(tokens, shape.kv_heads, shape.head_dim)
    k[query_starts[-1] :] = np.nan
    v[query_starts[-1] :] = np.nan
    return Batch(
        normal(tokens, shape.heads, shape.head_dim),
        k,
        v,
        kv_pages,
        layer,
        page_table.astype(np.int32),
        seq_lens,
        query_starts,
        scale=logit_size / shape.head_dim**0.5,
    )


@dataclass(frozen=True)
class Mistakes:
    """What a wrong implementation could do; the oracle makes them on request."""

    causal: int = 0
    window: int = 0
    scale: float = 1.0
    page: int = 0
    offset: int = 0
    swap_heads: bool = False
    skip_last_page: bool = False


def oracle(batch: Batch, shape: Shape, wrong: Mistakes = Mistakes()) -> tuple[np.ndarray, np.ndarray]:
    """(out float64, cache) by the definition, a query and a head at a time; padding rows are zero."""
    cache = batch.kv_pages.copy()
    out = np.zeros(batch.q.shape)
    group, size = shape.heads // shape.kv_heads, shape.page_size
    for s, length in enumerate(batch.seq_lens):
        first, last = batch.query_starts[s], batch.query_starts[s + 1]
        table = batch.page_table[s]
        for row in range(first, last):
            position = length - (last - row)
            slot = cache[batch.layer, table[position // size], position % size]
            slot[0::2], slot[1::2] = batch.k[row], batch.v[row]
        count = -(-int(length) // size)
        pages = np.roll(table[:count], wrong.page)
        own = cache[batch.layer, pages].reshape(-1, 2 * shape.kv_heads, shape.head_dim)
        own = np.roll(own[:length], wrong.offset, axis=0).astype(np.float64)
        for row in range(first, last):
            position = int(length - (last - row))
            end = min(position + 1 + wrong.causal, int(length))
            if wrong.skip_last_page:
                end = min(end, max(1, (count - 1) * size))
            begin = 0 if shape.window is None else max(0, position + 1 - shape.window - wrong.window)
            for head in range(shape.heads):
                j = head % shape.kv_heads if wrong.swap_heads else head // group
                keys, values = own[begin:end, 2 * j], own[begin:end, 2 * j + 1]
                logits = keys @ batch.q[row, head].astype(np.float64) * (batch.scale * wrong.scale)
                weights = np.exp(logits - logits.max(initial=-np.inf))
                out[row, head] = weights @ values / weights.sum() if len(weights) else 0
    return out, cache


def check(batch: Batch, shape: Shape, out: np.ndarray, cache: np.ndarray) -> None:
    """Raises AssertionError unless the result is what the definition says."""
    exact, expected_cache = oracle(batch, shape)
    real = batch.query_starts[-1]
    assert out.dtype == batch.q.dtype and out.shape == batch.q.shape
    assert np.isfinite(out.astype(np.float32)).all()
    # The null page may hold anything in the layer that was written, but it must be harmless.
    null = cache[batch.layer, 0].astype(np.float32)
    assert np.isfinite(null[~np.isnan(batch.kv_pages[batch.layer, 0].astype(np.float32))]).all()
    cache, expected_cache = cache.astype(np.float32), expected_cache.astype(np.float32)
    cache[batch.layer, 0] = expected_cache[batch.layer, 0] = 0
    np.testing.assert_array_equal(cache, expected_cache)
    error = np.linalg.norm(out[:real].astype(np.float64) - exact[:real])
    assert error <= TOLERANCE[shape.dtype] * np.linalg.norm(exact[:real]), error / np.linalg.norm(
        exact[:real]
    )


@functools.partial(jax.jit, static_argnames=("window", "decode_only", "backend"), donate_argnums=3)
def _jitted(*arrays: Any, scale: Any, window: int | None, decode_only: bool, backend: Any) -> Any:
    return ragged_paged_attention(
        *arrays, scale=scale, window=window, decode_only=decode_only, backend=backend
    )


def run(batch: Batch, shape: Shape, backend: str) -> tuple[np.ndarray, np.ndarray]:
    out, cache = _jitted(
        *batch.arrays, scale=batch.scale, window=shape.window, decode_only=shape.decode_only, backend=backend
    )
    return np.asarray(out), np.asarray(cache)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SHAPES)
def test_any_ragged_batch(name: str, backend: str) -> None:
    shape = SHAPES[name]
    for seed, logit_size in enumerate((1.0, 0.01, 8.0, 1.0)):
        batch = random_batch(shape, seed, logit_size)
        check(batch, shape, *run(batch, shape, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decode_only", [False, True])
def test_empty_batch_leaves_the_cache_alone(backend: str, decode_only: bool) -> None:
    shape = replace(SHAPES["decodes"], decode_only=decode_only)
    full = random_batch(shape, 0, 1.0)
    batch = replace(full, seq_lens=np.zeros(9, np.int32), query_starts=np.zeros(10, np.int32))
    batch = replace(batch, k=np.full_like(full.k, np.nan), v=np.full_like(full.v, np.nan))
    check(batch, shape, *run(batch, shape, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extreme_logits_stay_finite(backend: str, size: float) -> None:
    """Logits that vanish weigh all alike; those that are huge choose one key."""
    shape = SHAPES["grouped heads"]
    batch = random_batch(shape, 3, 1.0)
    batch = replace(batch, scale=size)
    out, _ = run(batch, shape, backend)
    exact, _ = oracle(batch, shape)
    assert np.isfinite(out).all()
    real = batch.query_starts[-1]
    if size < 1:
        assert np.linalg.norm(out[:real] - exact[:real]) <= 5e-6 * np.linalg.norm(exact[:real])


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_steps_fill_the_cache(backend: str) -> None:
    """Chunks of a prompt, then decodes, each on the cache that the last one left, equal one prefill."""
    shape = Shape(4, 2, 8, 4, 8, 2, 24, longest=24)
    rng = np.random.default_rng(0)
    q, k, v = (rng.normal(size=(24, h, 8)).astype(np.float32) for h in (4, 2, 2))
    cache = np.full((1, 20, 4, 4, 8), np.nan, np.float32)
    table = np.array([[3, 7, 2, 9, 11, 5, 0, 0], [0] * 8], np.int32)
    whole = Batch(
        q, k, v, cache, 0, table, np.array([24, 0], np.int32), np.array([0, 24, 24], np.int32), 0.35
    )
    expected, _ = run(whole, shape, backend)
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
        out, cache = run(part, shape, backend)
        outs.append(out[:size])
    error = np.linalg.norm(np.concatenate(outs) - expected)
    assert error <= 5e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    "wrong",
    [
        Mistakes(causal=1),
        Mistakes(causal=-1),
        Mistakes(window=1),
        Mistakes(window=-1),
        Mistakes(scale=1.0005),
        Mistakes(page=1),
        Mistakes(offset=1),
        Mistakes(swap_heads=True),
        Mistakes(skip_last_page=True),
    ],
    ids=str,
)
def test_the_check_catches(wrong: Mistakes) -> None:
    shape = Shape(6, 2, 16, 4, 24, 5, 40, longest=30, window=30)
    batches = (random_batch(shape, seed, 1.0) for seed in itertools.count())
    # Some query with keys after it, and some with more keys before it than the window holds.
    batch = next(b for b in batches if np.diff(b.query_starts).max() > 4 and b.seq_lens.max() > 40)
    out, cache = oracle(batch, shape)
    check(batch, shape, out.astype(np.float32), cache)
    out, cache = oracle(batch, shape, wrong)
    with pytest.raises(AssertionError):
        check(batch, shape, np.nan_to_num(out).astype(np.float32), cache)


def test_the_check_catches_a_slot_too_many_in_the_cache() -> None:
    shape = SHAPES["grouped heads"]
    batch = random_batch(shape, 1, 1.0)
    out, cache = oracle(batch, shape)
    untouched = np.argwhere(np.isnan(cache[batch.layer, 1:, :, 0, 0]))[0]
    cache[batch.layer, untouched[0] + 1, untouched[1]] = 0
    with pytest.raises(AssertionError):
        check(batch, shape, out.astype(np.float32), cache)


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


@pytest.mark.parametrize("backend", BACKENDS)
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


def _valid() -> tuple[list[Any], dict[str, Any]]:
    def zeros(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.zeros(shape, dtype)

    arrays = [
        zeros(4, 4, 8),
        zeros(4, 2, 8),
        zeros(4, 2, 8),
        zeros(1, 5, 2, 4, 8),
        0,
        zeros(3, 2, dtype=jnp.int32),
        zeros(3, dtype=jnp.int32),
        zeros(4, dtype=jnp.int32),
    ]
    return arrays, {"scale": 1.0}


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, (4, 8), r"q must be \[T, heads, head_dim\]"),
        (0, (5, 4, 8), r"got \(5, 4, 8\), \(4, 2, 8\)"),
        (1, (4, 8), r"k and v alike"),
        (2, (4, 2, 9), r"\(4, 2, 9\)"),
        (0, (4, 3, 8), r"3 query heads cannot be shared evenly by 2 key-value heads"),
        (3, (1, 5, 2, 2, 8), r"2 \* kv_heads = 4 and head_dim = 8; got \(1, 5, 2, 2, 8\)"),
        (3, (1, 5, 2, 4, 9), r"got \(1, 5, 2, 4, 9\)"),
        (3, (5, 2, 4, 8), r"kv_pages must be"),
        (0, (4, 4, 9), r"head_dim = 9"),
        (6, (4,), r"page_table has 3 sequences"),
        (7, (3,), r"query_starts \[4\]; got \(3,\) and \(3,\)"),
        ("window", 0, r"window=0 must be at least 1"),
        ("window", -4, r"window=-4"),
        ("decode_only", True, r"4 rows and 3 sequences"),
        ("backend", "cuda", r"backend='cuda' is not one of reference, xla"),
    ],
)
def test_what_does_not_fit_is_refused(index: int | str, value: Any, message: str) -> None:
    arrays, options = _valid()
    if isinstance(index, int):
        arrays[index] = jnp.zeros(value, jnp.asarray(arrays[index]).dtype)
    else:
        options[index] = value
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention(*arrays, **options)


def test_what_fits_is_taken() -> None:
    arrays, options = _valid()
    out, _ = jax.eval_shape(functools.partial(ragged_paged_attention, **options), *arrays)
    assert out.shape == (4, 4, 8)

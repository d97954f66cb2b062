"""Attention by its definition, in float64, a query and a head at a time; and what is held against it."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np

from tests.kernels.ragged_batches import Batch, Shape, quantized

# Relative errors in norm.
# Float32 keeps 6e-8 of each number; logits of up to 40 in size carry 40 times that into the exponent,
# a few e-6 of a weight, and sums average it. A key too many or too few is off by 1e-3 and more.
# Bfloat16 keeps 4e-3 of a number and rounds to half of that: once the output, and once the weights
# where a matrix unit takes them so; independent errors of 1.1e-3 each in norm.
# Float16 is eight times as fine.
TOLERANCE = {jnp.float32: 5e-6, jnp.float16: 5e-4, jnp.bfloat16: 4e-3}


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
    soft_cap: float = 1.0
    sink_head: int = 0
    sink_in_lse: bool = True
    alibi_head: int = 0
    alibi_distance: int = 0
    k_scale: float = 1.0
    v_scale: float = 1.0
    span_end: int = 0
    span_row: int = 0
    tree_column: int = 0
    tree_row: int = 0
    tree_width: int = 0
    lse: float = 1.0
    truncate: bool = False


NONE = Mistakes()


def oracle(batch: Batch, shape: Shape, wrong: Mistakes = NONE) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(out float64, cache, lse float64); rows of padding are zero."""
    cache = batch.kv_pages.copy()
    out, lse = np.zeros(batch.q.shape), np.zeros(batch.q.shape[:2])
    size = shape.page_size
    for s, length in enumerate(batch.seq_lens):
        rows = range(batch.query_starts[s], batch.query_starts[s + 1])
        table = batch.page_table[s]
        for position, row in enumerate(rows, start=length - len(rows)):
            slot = cache[batch.layer, table[position // size], position % size]
            slot[0::2] = quantized(batch.k[row], batch.k_scale, shape)
            slot[1::2] = quantized(batch.v[row], batch.v_scale, shape)
            if wrong.truncate:
                slot[0::2] = np.trunc(batch.k[row].astype(np.float32) / batch.k_scale)
        count = -(-int(length) // size)
        pages = np.roll(table[:count], wrong.page)
        own = cache[batch.layer, pages].reshape(-1, 2 * shape.kv_heads, shape.head_dim)
        own = np.roll(own[:length], wrong.offset, axis=0).astype(np.float64)
        keys, values = own[:, 0::2], own[:, 1::2]
        if batch.k_scale is not None and batch.v_scale is not None:
            keys = keys * (np.float64(batch.k_scale) * wrong.k_scale)
            values = values * (np.float64(batch.v_scale) * wrong.v_scale)
        for row in rows:
            visible = _visible(batch, shape, s, row, wrong)
            if wrong.skip_last_page:
                visible = visible[visible < max(1, (count - 1) * size)]
            for head in range(shape.heads):
                group = shape.heads // shape.kv_heads
                j = head % shape.kv_heads if wrong.swap_heads else head // group
                distance = visible - (length - (rows[-1] + 1 - row))
                logits = _logits(batch, shape, row, head, keys[visible, j], distance, wrong)
                out[row, head], lse[row, head] = _softmax(batch, head, logits, values[visible, j], wrong)
    return out, cache, lse * wrong.lse


def _visible(batch: Batch, shape: Shape, s: int, row: int, wrong: Mistakes) -> np.ndarray:
    """The positions that a row sees, in order."""
    length, first, last = int(batch.seq_lens[s]), int(batch.query_starts[s]), int(batch.query_starts[s + 1])
    position = length - (last - row)
    keys = np.arange(length)
    seen = keys <= position + wrong.causal
    if batch.span_ends is not None:
        seen |= keys < batch.span_ends[max(0, row - wrong.span_row)] + wrong.span_end
    if batch.tree_mask is not None and shape.tree_width is not None:
        new = length - (last - first)
        if last - first <= shape.tree_width + wrong.tree_width:
            allowed = np.resize(batch.tree_mask[max(0, row - wrong.tree_row)], last - first)
            seen[new:] = np.roll(allowed, wrong.tree_column)
    if shape.window is not None:
        seen &= keys > position - shape.window - wrong.window
    return np.flatnonzero(seen)


def _logits(
    batch: Batch, shape: Shape, row: int, head: int, keys: np.ndarray, distance: np.ndarray, wrong: Mistakes
) -> np.ndarray:
    """keys float64[n, head_dim], distance int[n] from the query (negative is before it)."""
    logits = keys @ batch.q[row, head].astype(np.float64) * (shape.scale * wrong.scale)
    if shape.soft_cap is not None:
        cap = shape.soft_cap * wrong.soft_cap
        logits = cap * np.tanh(logits / cap)
    if batch.alibi_slopes is not None:
        slope = np.roll(batch.alibi_slopes, wrong.alibi_head)[head].astype(np.float64)
        logits = logits + slope * (distance + wrong.alibi_distance)
    return logits


def _softmax(
    batch: Batch, head: int, logits: np.ndarray, values: np.ndarray, wrong: Mistakes
) -> tuple[np.ndarray, float]:
    """(sum of values float64[n, head_dim] by their weights, log-sum-exp); zero and -inf of no logits."""
    sink = -np.inf if batch.sinks is None else float(np.roll(batch.sinks, wrong.sink_head)[head])
    largest = max(logits.max(initial=-np.inf), sink)
    if largest == -np.inf:
        return np.zeros(values.shape[1]), -np.inf
    weights = np.exp(logits - largest)
    total = weights.sum() + np.exp(sink - largest)
    in_lse = total if wrong.sink_in_lse else max(weights.sum(), 1e-30)
    return weights @ values / total, largest + float(np.log(in_lse))


def check(
    batch: Batch, shape: Shape, out: np.ndarray, cache: np.ndarray, lse: np.ndarray | None = None
) -> None:
    """Raises AssertionError unless the result is what the definition says."""
    exact, expected_cache, exact_lse = oracle(batch, shape)
    real = batch.query_starts[-1]
    assert out.dtype == batch.q.dtype and out.shape == batch.q.shape
    assert np.isfinite(out.astype(np.float32)).all(), "not finite"
    check_cache(batch.kv_pages, batch.layer, cache, expected_cache)
    tolerance = TOLERANCE[shape.dtype]
    check_norm(out[:real].astype(np.float64), exact[:real], tolerance)
    if shape.lse:
        assert lse is not None and lse.dtype == np.float32
        finite = np.isfinite(exact_lse[:real])
        np.testing.assert_array_equal(lse[:real][~finite], exact_lse[:real][~finite])
        check_norm(lse[:real][finite].astype(np.float64), exact_lse[:real][finite], tolerance)


def check_cache(before: np.ndarray, layer: int, cache: np.ndarray, expected: np.ndarray) -> None:
    """That pages [layers, pages, ...] are what is expected of them, bit for bit."""
    # The null page may hold anything in the layer that was written, but it must be harmless.
    null = cache[layer, 0].astype(np.float32)
    assert np.isfinite(null[~np.isnan(before[layer, 0].astype(np.float32))]).all()
    assert cache.dtype == expected.dtype
    unsigned = f"u{cache.dtype.itemsize}"
    cache, expected = cache.copy(), expected.copy()
    cache[layer, 0] = expected[layer, 0] = 0
    # As numbers first, since the bits of one NaN and another may differ; then zeros by their sign.
    is_number = ~np.isnan(expected.astype(np.float32))
    np.testing.assert_array_equal(np.isnan(cache.astype(np.float32)), ~is_number)
    np.testing.assert_array_equal(cache.view(unsigned)[is_number], expected.view(unsigned)[is_number])


def check_norm(result: np.ndarray, exact: np.ndarray, tolerance: float) -> None:
    """That the relative error in norm is within the tolerance."""
    error, size = np.linalg.norm(result - exact), np.linalg.norm(exact)
    assert error <= tolerance * size, f"relative error {error / size:.2e}, allowed {tolerance:.0e}"

"""Where new keys and values go: the part of the op that every portable backend shares."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.ragged_paged_attention.options import AttentionOptions


def token_positions(
    seq_lens: jax.Array, query_starts: jax.Array, num_tokens: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which sequence and which position in it each packed row belongs to.

    Args:
        seq_lens: int32[S].
        query_starts: int32[S + 1].
        num_tokens: T, rows in the packed batch.

    Returns:
        (sequence int32[T], position int32[T], is_real bool[T]); padding rows have is_real False
        and a sequence and position that are in range of nothing in particular.
    """
    rows = jnp.arange(num_tokens, dtype=jnp.int32)
    sequence = jnp.searchsorted(query_starts, rows, side="right", method="compare_all").astype(jnp.int32) - 1
    is_real = rows < query_starts[-1]
    sequence = jnp.where(is_real, sequence, 0)
    position = seq_lens[sequence] - (query_starts[sequence + 1] - rows)
    return sequence, position, is_real


def to_cache_dtype(x: jax.Array, scale: jax.Array | None, dtype: jnp.dtype) -> jax.Array:
    """x / scale as the cache stores it: rounded to nearest even, and held within the range of fp8 or int8."""
    if scale is not None:
        x = x.astype(jnp.float32) / scale
    if jnp.issubdtype(dtype, jnp.integer):
        limits = np.iinfo(dtype)
        return jnp.clip(jnp.round(x), limits.min, limits.max).astype(dtype)
    if dtype.itemsize == 1:  # fp8: what is past the largest number would become NaN or infinity
        limit = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
        x = jnp.clip(x, -limit, limit)
    return x.astype(dtype)


def write_new_tokens(
    k: jax.Array,
    v: jax.Array,
    kv_pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    options: AttentionOptions,
) -> jax.Array:
    """Scatters k, v [T, kv_heads, head_dim] into their pages; padding goes to the null page 0."""
    k = to_cache_dtype(k, options.k_scale, kv_pages.dtype)
    v = to_cache_dtype(v, options.v_scale, kv_pages.dtype)
    tokens, num_kv_heads, head_dim = k.shape
    new = jnp.stack([k, v], axis=2).reshape(tokens, 2 * num_kv_heads, head_dim)
    return write_rows(new, kv_pages, layer, page_table, seq_lens, query_starts)


def write_rows(
    new: jax.Array,
    pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
) -> jax.Array:
    """Scatters new [T, ...] into pages [layers, pages, page_size, ...] of the same dtype."""
    page_size = pages.shape[2]
    sequence, position, is_real = token_positions(seq_lens, query_starts, new.shape[0])
    page = jnp.where(is_real, page_table[sequence, position // page_size], 0)
    offset = jnp.where(is_real, position % page_size, 0)
    # Padding rows write zeros, so that the null page never holds anything but finite numbers.
    is_real = is_real.reshape(-1, *[1] * (new.ndim - 1))
    new = jnp.where(is_real, new, jnp.zeros((), pages.dtype))
    return pages.at[layer, page, offset].set(new, mode="promise_in_bounds")

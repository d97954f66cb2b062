"""What every backend does with what it is given: a head's query, a token's row, and its place."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.cache import to_cache_dtype


def query_rows(q_latent: jax.Array, q_rope: jax.Array, width: int) -> jax.Array:
    """[T, heads, width]: both parts of each query where a row of a page has those of the key, then zeros."""
    return _filled(jnp.concatenate([q_latent, q_rope], axis=-1), width)


def token_rows(latent: jax.Array, k_rope: jax.Array, pages: jax.Array) -> jax.Array:
    """[T, width] of the new tokens, as the pages hold them."""
    rows = jnp.concatenate([latent, k_rope], axis=-1)
    return _filled(to_cache_dtype(rows, None, pages.dtype), pages.shape[3])


def _filled(rows: jax.Array, width: int) -> jax.Array:
    left = width - rows.shape[-1]
    return jnp.pad(rows, (*[(0, 0)] * (rows.ndim - 1), (0, left))) if left else rows

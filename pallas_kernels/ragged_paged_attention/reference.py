"""The op written as its definition: gather every sequence densely, mask, softmax. The oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.cache import token_positions, write_new_tokens


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    *,
    scale: float,
    window: int | None,
    decode_only: bool,
) -> tuple[jax.Array, jax.Array]:
    """See `ragged_paged_attention`. Cost grows with T * P * page_size, whatever the real lengths."""
    del decode_only  # one way for everything
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    kv_pages = write_new_tokens(k, v, kv_pages, layer, page_table, seq_lens, query_starts)

    sequence, position, is_real = token_positions(seq_lens, query_starts, tokens)
    context = kv_pages[layer, page_table].astype(jnp.float32)  # [S, P, page_size, 2 * kv_heads, head_dim]
    num_seqs, pages, page_size = context.shape[:3]
    context = context.reshape(num_seqs, pages * page_size, num_kv_heads, 2, head_dim)[sequence]

    key_position = jnp.arange(pages * page_size)
    visible = key_position[None] <= position[:, None]
    if window is not None:
        visible &= key_position[None] > position[:, None] - window
    visible &= is_real[:, None]
    # A masked key may hold anything, NaN included: zero times NaN is NaN, so it is replaced.
    keys = jnp.where(visible[:, :, None, None], context[:, :, :, 0], 0)
    values = jnp.where(visible[:, :, None, None], context[:, :, :, 1], 0)

    grouped = q.astype(jnp.float32).reshape(tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits = jnp.einsum("tkgd,tckd->tkgc", grouped, keys, precision="highest") * scale
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    # Padding rows see nothing: their softmax is 0 / 0, and they are to be finite.
    weights = jnp.where(visible[:, None, None], jax.nn.softmax(logits, axis=-1), 0)
    out = jnp.einsum("tkgc,tckd->tkgd", weights, values, precision="highest")
    return out.reshape(q.shape).astype(q.dtype), kv_pages

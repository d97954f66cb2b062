"""The op written as its definition: gather every sequence densely, mask, softmax. The oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.cache import token_positions, write_new_tokens
from pallas_kernels.ragged_paged_attention.options import AttentionOptions


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    options: AttentionOptions,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `ragged_paged_attention`. Cost grows with T * P * page_size, whatever the real lengths."""
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    kv_pages = write_new_tokens(k, v, kv_pages, layer, page_table, seq_lens, query_starts, options)

    sequence, position, is_real = token_positions(seq_lens, query_starts, tokens)
    context = kv_pages[layer, page_table].astype(jnp.float32)  # [S, P, page_size, 2 * kv_heads, head_dim]
    num_seqs, pages, page_size = context.shape[:3]
    context = context.reshape(num_seqs, pages * page_size, num_kv_heads, 2, head_dim)[sequence]

    key_position = jnp.arange(pages * page_size)[None]
    span_end = None if options.span_ends is None else options.span_ends[:, None]
    visible = options.visible(key_position, position[:, None], span_end)
    if options.tree_mask is not None:
        num_new = (query_starts[1:] - query_starts[:-1])[sequence][:, None]
        column = key_position - (seq_lens[sequence][:, None] - num_new)
        width = options.tree_mask.shape[1]
        allowed = jnp.take_along_axis(options.tree_mask, jnp.clip(column, 0, width - 1), axis=1)
        allowed = options.within_window(allowed, key_position, position[:, None])
        visible = jnp.where((column >= 0) & (num_new <= width), allowed, visible)
    visible &= (key_position < seq_lens[sequence][:, None]) & is_real[:, None]
    # A masked key may hold anything, NaN included: zero times NaN is NaN, so it is replaced.
    keys = jnp.where(visible[:, :, None, None], context[:, :, :, 0], 0)
    values = jnp.where(visible[:, :, None, None], context[:, :, :, 1], 0)
    if options.k_scale is not None:
        keys = keys * options.k_scale
    if options.v_scale is not None:
        values = values * options.v_scale

    grouped = q.astype(jnp.float32).reshape(tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
    logits = jnp.einsum("tkgd,tckd->tkgc", grouped, keys, precision="highest") * options.scale
    logits = options.cap(logits)
    if options.alibi_slopes is not None:
        slopes = options.alibi_slopes.reshape(num_kv_heads, -1)[None, :, :, None]
        logits = logits + slopes * (key_position - position[:, None])[:, None, None]
    logits = jnp.where(visible[:, None, None], logits, -jnp.inf)
    # A sink is one more logit with no value behind it: it only takes its share of the sum.
    sinks = jnp.full((num_heads,), -jnp.inf) if options.sinks is None else options.sinks
    lse = jnp.logaddexp(jax.nn.logsumexp(logits, axis=-1), sinks.reshape(1, num_kv_heads, -1))
    # Padding rows, and queries whose tree mask is empty, see nothing: their softmax is 0 / 0, and they
    # are to be zero.
    weights = jnp.where(visible[:, None, None], jnp.exp(logits - lse[..., None]), 0)
    out = jnp.einsum("tkgc,tckd->tkgd", weights, values, precision="highest")
    return out.reshape(q.shape).astype(q.dtype), kv_pages, lse.reshape(tokens, num_heads)

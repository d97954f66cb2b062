"""The op written as its definition: gather every sequence densely, mask, softmax. The oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.mla_ragged_paged_attention.rows import query_rows, token_rows
from pallas_kernels.ragged_paged_attention.cache import token_positions, write_rows
from pallas_kernels.ragged_paged_attention.options import AttentionOptions


def attend(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    k_rope: jax.Array,
    pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    options: AttentionOptions,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `mla_ragged_paged_attention`. Cost grows with T * P * page_size, whatever the real lengths."""
    num_tokens, _, rank = q_latent.shape
    pages = write_rows(token_rows(latent, k_rope, pages), pages, layer, page_table, seq_lens, query_starts)
    sequence, position, is_real = token_positions(seq_lens, query_starts, num_tokens)
    context = pages[layer, page_table].astype(jnp.float32)  # [S, P, page_size, width]
    context = context.reshape(context.shape[0], -1, context.shape[-1])[sequence]
    key_position = jnp.arange(context.shape[1])[None]
    visible = (key_position <= position[:, None]) & is_real[:, None]
    # A masked row may hold anything, NaN included: zero times NaN is NaN, so it is replaced.
    rows = jnp.where(visible[..., None], context, 0)
    q = query_rows(q_latent, q_rope, rows.shape[-1]).astype(jnp.float32)
    logits = options.cap(jnp.einsum("thw,tcw->thc", q, rows, precision="highest") * options.scale)
    logits = jnp.where(visible[:, None], logits, -jnp.inf)
    lse = jax.nn.logsumexp(logits, axis=-1)
    # Padding rows see nothing: their softmax is 0 / 0, and they are to be zero.
    weights = jnp.where(visible[:, None], jnp.exp(logits - lse[..., None]), 0)
    out = jnp.einsum("thc,tcr->thr", weights, rows[..., :rank], precision="highest")
    return out.astype(q_latent.dtype), pages, lse

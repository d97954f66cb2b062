"""The backend of CPUs: `cpu_prefill` and `cpu_decode`, compiled by numba, which XLA calls by `cpu_handler`.

XLA gathers the pages of decodes into copies before it multiplies them, in products too small for it, and
computes every logit of a prefill's last blocks though half of them are masked; the kernels read keys and
values where they lie and stay in registers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.native import loading
from pallas_kernels.ragged_paged_attention.cache import write_new_tokens
from pallas_kernels.ragged_paged_attention.options import AttentionOptions

__all__ = ["attend", "missing"]

_TARGET = "pallas_kernels_attention"


def missing(cache_dtype: DTypeLike) -> str | None:
    """What keeps the backend from running here, as the end of a sentence; None is nothing."""
    if jnp.dtype(cache_dtype) != jnp.float32:
        return f"reads pages of float32, and these are {jnp.dtype(cache_dtype).name}"
    return loading.missing(_TARGET, "pallas_kernels.ragged_paged_attention.cpu_handler")


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
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See `ragged_paged_attention`.

    Raises:
        ValueError: the pages are not of float32, or the kernels cannot be compiled here.
    """
    if (reason := missing(kv_pages.dtype)) is not None:
        raise ValueError(f"backend='cpu' {reason}; or take 'xla'.")
    num_tokens, _, head_dim = q.shape
    num_kv_heads = k.shape[1]
    kv_pages = write_new_tokens(k, v, kv_pages, layer, page_table, seq_lens, query_starts, options)
    # Feature-major models have columns and take columns, and there XLA leaves these transpositions out.
    grouped = q.astype(jnp.float32).reshape(num_tokens, num_kv_heads, -1, head_dim)
    columns = grouped.transpose(1, 2, 3, 0)
    shapes: list[Any] = [jax.ShapeDtypeStruct(columns.shape, jnp.float32)]
    if options.return_lse:
        shapes.append(jax.ShapeDtypeStruct((*columns.shape[:2], num_tokens), jnp.float32))
    scale = options.scale if options.k_scale is None else options.scale * options.k_scale
    none, no_tree = jnp.zeros(0, jnp.float32), jnp.zeros((0, 1), jnp.bool_)
    out, *lse = jax.ffi.ffi_call(_TARGET, shapes)(
        columns,
        kv_pages,
        page_table,
        jnp.asarray(layer, jnp.int32),
        seq_lens,
        query_starts,
        np.int32(options.window or 0),
        jnp.asarray(scale, jnp.float32),
        np.float32(options.soft_cap or 0),
        none if options.sinks is None else options.sinks.astype(jnp.float32),
        none if options.alibi_slopes is None else options.alibi_slopes.astype(jnp.float32),
        none.astype(jnp.int32) if options.span_ends is None else options.span_ends.astype(jnp.int32),
        no_tree if options.tree_mask is None else options.tree_mask,
    )
    if options.v_scale is not None:
        out = out * options.v_scale
    out = out.reshape(-1, num_tokens).T.reshape(q.shape).astype(q.dtype)
    return out, kv_pages, lse[0].transpose(2, 0, 1).reshape(q.shape[:2]) if lse else None

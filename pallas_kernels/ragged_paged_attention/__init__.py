"""Causal attention of a ragged batch of queries over a paged key-value cache.

A batch holds any mix of prefill chunks and decodes, packed one after the other: sequence s owns the
query rows [query_starts[s], query_starts[s + 1]), which are the last positions of its seq_lens[s]
tokens. Keys and values live in pages; page_table[s] lists the pages of sequence s in order. The op
writes the new keys and values into their pages, then attends.

Backends: `reference` (dense and obviously right, the oracle), `xla` (flash-style, portable: its cost
follows the real lengths, not the padded shapes), `cpu` (kernels compiled by numba, over float32 pages), `tpu`
(Pallas Mosaic TPU), `gpu` (Pallas Mosaic GPU, for Hopper, with JAX 0.11 or newer) and `triton` (jax-triton,
for Ampere and Ada).
"""

from __future__ import annotations

import importlib
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.options import AttentionOptions
from pallas_kernels.ragged_paged_attention.tuned import shape_key, tuned_tiling
from pallas_kernels.ragged_paged_attention.validation import validate

Backend = Literal["reference", "xla", "cpu", "tpu", "gpu", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)


def cache_rows(backend: Backend, kv_heads: int, head_dim: int) -> tuple[int, int]:
    """How a token's keys and values are best held for a backend: (rows, numbers in a row) of one page slot.

    Hold the cache as [layers, pages, page_size, rows, width] and give the op a view of it, reshaped to [...,
    2 * kv_heads, head_dim]: held otherwise, a TPU would copy it at every call.
    """
    if backend == "tpu":
        tpu = importlib.import_module(f"{__name__}.tpu")
        rows, width = tpu.page_rows(kv_heads, head_dim)
        return rows, width
    return 2 * kv_heads, head_dim


def cache_bytes_per_token(backend: Backend, kv_heads: int, head_dim: int, dtype: jnp.dtype) -> int:
    """Bytes that a token's keys and values of one layer take in a cache held as `cache_rows` says.

    A TPU pads what it stores to whole tiles: three rows take as much as four.
    """
    rows, width = cache_rows(backend, kv_heads, head_dim)
    if backend == "tpu":
        rows, width = importlib.import_module(f"{__name__}.tpu").in_tiles(rows, width, dtype)
    return rows * width * dtype.itemsize


def ragged_paged_attention(
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
    window: int | None = None,
    soft_cap: float | None = None,
    sinks: jax.Array | None = None,
    alibi_slopes: jax.Array | None = None,
    k_scale: jax.Array | float | None = None,
    v_scale: jax.Array | float | None = None,
    span_ends: jax.Array | None = None,
    tree_mask: jax.Array | None = None,
    return_lse: bool = False,
    decode_only: bool = False,
    backend: Backend = "xla",
    tiling: Any = None,
) -> tuple[jax.Array, ...]:
    """Writes new keys and values into the cache and attends to everything before each query.

    Args:
        q: [T, num_heads, head_dim] queries; rows past query_starts[-1] are padding.
        k, v: [T, num_kv_heads, head_dim] keys and values of the same tokens. Query head h reads
            key-value head h // (num_heads // num_kv_heads).
        kv_pages: [layers, pages, page_size, 2 * num_kv_heads, head_dim]; head j's keys stand at
            2 * j and its values at 2 * j + 1. Page 0 is a null page: padding is written there.
            Donate it: it is updated in place and never copied or sliced by layer.
        layer: which layer's pages to use.
        page_table: int32[S, P] page ids; entries past a sequence's pages are ignored.
        seq_lens: int32[S] tokens of each sequence including the new ones; 0 where there is none.
        query_starts: int32[S + 1], non-decreasing; empty sequences have equal neighbours.
        scale: multiplies the logits.
        window: a query sees itself and the window - 1 positions before it; None sees all.
        soft_cap: logits become soft_cap * tanh(logits / soft_cap); None leaves them.
        sinks: float32[num_heads], a logit of each head that takes part in the softmax's sum and has no
            value (gpt-oss; Xiao et al. 2024); minus infinity is none.
        alibi_slopes: float32[num_heads]; slope * (key position - query position) is added to the
            logits (Press et al. 2022).
        k_scale, v_scale: what the cache holds is k / k_scale and v / v_scale, rounded to its dtype;
            needed where that is int8.
        span_ends: int32[T]; a query also sees the keys of its sequence before this position although
            they come after it (the bidirectional spans of images). They must be in the cache or among
            the new ones.
        tree_mask: bool[T, D]; in sequences of at most D new tokens, whether a query sees the j-th of
            them, in place of causality; the tokens before those it sees as always. For verifying a
            tree of speculated tokens. `window` and ALiBi go by the place in the cache. A query that
            sees nothing at all gives zero, and minus infinity (or its sink) as log-sum-exp.
        return_lse: also return the logarithm of the softmax's sum, to merge with attention over other
            keys.
        decode_only: promise that no sequence has more than one query and that T == S with
            query s in row s, which lets a backend leave out its prefill path.
        backend: which implementation runs.
        tiling: the backend's own `Tiling`; None takes the one tuned for this kind of device and shape
            (`benchmarks.tune`), or where there is none, what a heuristic says.

    Returns:
        (out, kv_pages), and with return_lse a third, lse float32[T, num_heads]. out is
        [T, num_heads, head_dim]; its padding rows are finite, those of lse hold anything.

    Raises:
        ValueError: shapes or options that do not fit together, or that the backend cannot do.
    """
    options = AttentionOptions(
        scale=scale,
        window=window,
        soft_cap=soft_cap,
        decode_only=decode_only,
        return_lse=return_lse,
        sinks=sinks,
        alibi_slopes=alibi_slopes,
        k_scale=None if k_scale is None else jnp.asarray(k_scale, jnp.float32),
        v_scale=None if v_scale is None else jnp.asarray(v_scale, jnp.float32),
        span_ends=span_ends,
        tree_mask=tree_mask,
    )
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}.")
    validate(q, k, v, kv_pages, page_table, seq_lens, query_starts, options)
    # Imported when asked for: what one platform's kernels are written with, another need not have.
    implementation = importlib.import_module(f"{__name__}.{backend}")
    operands = (q, k, v, kv_pages, layer, page_table, seq_lens, query_starts, options)
    results: tuple[Any, ...]
    if not hasattr(implementation, "Tiling"):
        if tiling is not None:
            raise ValueError(f"The {backend} backend has no tiles to choose; leave out tiling={tiling}.")
        results = implementation.attend(*operands)
    else:
        if tiling is None:
            fields = tuned_tiling(backend, shape_key(q, kv_pages, decode_only=decode_only))
            tiling = None if fields is None else implementation.Tiling.from_fields(fields)
        results = implementation.attend(*operands, tiling=tiling)
    return results if return_lse else results[:2]

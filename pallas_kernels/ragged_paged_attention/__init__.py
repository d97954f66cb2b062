"""Causal attention of a ragged batch of queries over a paged key-value cache.

A batch holds any mix of prefill chunks and decodes, packed one after the other: sequence s owns the
query rows [query_starts[s], query_starts[s + 1]), which are the last positions of its seq_lens[s]
tokens. Keys and values live in pages; page_table[s] lists the pages of sequence s in order. The op
writes the new keys and values into their pages, then attends.

Backends: `reference` (dense and obviously right, the oracle) and `xla` (flash-style, portable: its
cost follows the real lengths, not the padded shapes).
"""

from __future__ import annotations

from typing import Literal, get_args

import jax

from pallas_kernels.ragged_paged_attention import reference, xla

Backend = Literal["reference", "xla"]
BACKENDS: tuple[str, ...] = get_args(Backend)

_IMPLEMENTATIONS = {"reference": reference.attend, "xla": xla.attend}


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
    decode_only: bool = False,
    backend: Backend = "xla",
) -> tuple[jax.Array, jax.Array]:
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
        decode_only: promise that no sequence has more than one query and that T == S with
            query s in row s, which lets a backend leave out its prefill path.
        backend: which implementation runs.

    Returns:
        (out, kv_pages): out is [T, num_heads, head_dim]; its padding rows are finite.

    Raises:
        ValueError: shapes or options that do not fit together.
    """
    _validate(q, k, v, kv_pages, page_table, seq_lens, query_starts, window, decode_only, backend)
    return _IMPLEMENTATIONS[backend](
        q,
        k,
        v,
        kv_pages,
        layer,
        page_table,
        seq_lens,
        query_starts,
        scale=scale,
        window=window,
        decode_only=decode_only,
    )


def _validate(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    window: int | None,
    decode_only: bool,
    backend: str,
) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}.")
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q must be [T, heads, head_dim], and k and v alike [T, kv_heads, head_dim]; got {q.shape}, "
            f"{k.shape} and {v.shape}."
        )
    tokens, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{num_heads} query heads cannot be shared evenly by {num_kv_heads} key-value heads."
        )
    if kv_pages.ndim != 5 or kv_pages.shape[3:] != (2 * num_kv_heads, head_dim):
        raise ValueError(
            "kv_pages must be [layers, pages, page_size, 2 * kv_heads, head_dim] with "
            f"2 * kv_heads = {2 * num_kv_heads} and head_dim = {head_dim}; got {kv_pages.shape}."
        )
    num_seqs = page_table.shape[0]
    if seq_lens.shape != (num_seqs,) or query_starts.shape != (num_seqs + 1,):
        raise ValueError(
            f"page_table has {num_seqs} sequences, so seq_lens must be [{num_seqs}] and query_starts "
            f"[{num_seqs + 1}]; got {seq_lens.shape} and {query_starts.shape}."
        )
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1, or None for full attention.")
    if decode_only and tokens != num_seqs:
        raise ValueError(
            f"decode_only needs one query row per sequence; got {tokens} rows and {num_seqs} sequences."
        )

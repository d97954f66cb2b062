"""What does not fit together is refused before a backend sees it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.ragged_paged_attention.options import AttentionOptions

_CACHE_DTYPES = ("float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")


def validate(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    options: AttentionOptions,
) -> None:
    """Raises ValueError with the argument, what it was and what it may be."""
    _validate_shapes(q, k, v, kv_pages)
    validate_batch(page_table, seq_lens, query_starts)
    num_tokens, num_heads, _ = q.shape
    validate_options(num_tokens, page_table.shape[0], options)
    expected_shapes = {
        "sinks": (num_heads,),
        "alibi_slopes": (num_heads,),
        "span_ends": (num_tokens,),
        "k_scale": (),
        "v_scale": (),
    }
    for name, expected in expected_shapes.items():
        array = getattr(options, name)
        if array is not None and array.shape != expected:
            raise ValueError(f"{name} must be {list(expected)}; got {list(array.shape)}.")
    if options.span_ends is not None and not jnp.issubdtype(options.span_ends.dtype, jnp.integer):
        raise ValueError(f"span_ends are positions, so integers; got {options.span_ends.dtype.name}.")
    if options.tree_mask is not None:
        _validate_tree_mask(options.tree_mask, num_tokens)
        if options.span_ends is not None:
            raise ValueError("tree_mask and span_ends cannot be used together; give one of them.")
    if kv_pages.dtype.name not in _CACHE_DTYPES:
        raise ValueError(f"kv_pages are {kv_pages.dtype.name}; a cache is one of {', '.join(_CACHE_DTYPES)}.")
    if kv_pages.dtype == jnp.int8 and (options.k_scale is None or options.v_scale is None):
        raise ValueError("int8 pages need k_scale and v_scale; give both.")


def validate_options(num_tokens: int, num_seqs: int, options: AttentionOptions) -> None:
    """That plain numbers are in their range, and `decode_only` can be true."""
    if options.window is not None and options.window < 1:
        raise ValueError(f"window={options.window} must be at least 1, or None for full attention.")
    if options.soft_cap is not None and not options.soft_cap > 0:
        raise ValueError(f"soft_cap={options.soft_cap} must be positive, or None for no cap.")
    if options.decode_only and num_tokens != num_seqs:
        raise ValueError(
            f"decode_only needs one query row per sequence; got {num_tokens} rows and {num_seqs} sequences."
        )


def validate_batch(page_table: jax.Array, seq_lens: jax.Array, query_starts: jax.Array) -> None:
    """That the three speak of as many sequences."""
    num_seqs = page_table.shape[0]
    if seq_lens.shape != (num_seqs,) or query_starts.shape != (num_seqs + 1,):
        raise ValueError(
            f"page_table has {num_seqs} sequences, so seq_lens must be [{num_seqs}] and query_starts "
            f"[{num_seqs + 1}]; got {seq_lens.shape} and {query_starts.shape}."
        )


def _validate_tree_mask(tree_mask: jax.Array, num_tokens: int) -> None:
    if tree_mask.ndim != 2 or tree_mask.shape[0] != num_tokens or tree_mask.shape[1] == 0:
        raise ValueError(
            f"tree_mask must be [{num_tokens}, D] with D at least 1; got {list(tree_mask.shape)}."
        )
    if tree_mask.dtype != jnp.bool_:
        raise ValueError(f"tree_mask must be bool; got {tree_mask.dtype.name}.")


def _validate_shapes(q: jax.Array, k: jax.Array, v: jax.Array, kv_pages: jax.Array) -> None:
    if q.ndim != 3 or k.ndim != 3 or k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise ValueError(
            f"q must be [T, heads, head_dim], and k and v alike [T, kv_heads, head_dim]; got {q.shape}, "
            f"{k.shape} and {v.shape}."
        )
    _, num_heads, head_dim = q.shape
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

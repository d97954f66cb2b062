"""What does not fit together is refused before a backend sees it."""

from __future__ import annotations

import jax

from pallas_kernels.ragged_paged_attention.options import AttentionOptions
from pallas_kernels.ragged_paged_attention.validation import validate_batch, validate_options

# 8-bit pages would want a scale for the latent and one for the rotated key.
_CACHE_DTYPES = ("float32", "bfloat16", "float16")


def validate(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    k_rope: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    options: AttentionOptions,
) -> None:
    """Raises ValueError with the argument, what it was and what it may be."""
    if q_latent.ndim != 3 or q_rope.ndim != 3 or q_latent.shape[:2] != q_rope.shape[:2]:
        raise ValueError(
            "q_latent must be [T, heads, kv_lora_rank] and q_rope [T, heads, rope_dim]; got "
            f"{q_latent.shape} and {q_rope.shape}."
        )
    num_tokens, _, rank = q_latent.shape
    rope_dim = q_rope.shape[2]
    if latent.shape != (num_tokens, rank) or k_rope.shape != (num_tokens, rope_dim):
        raise ValueError(
            f"latent must be [T, kv_lora_rank] = {[num_tokens, rank]} and k_rope [T, rope_dim] = "
            f"{[num_tokens, rope_dim]}; got {list(latent.shape)} and {list(k_rope.shape)}."
        )
    if pages.ndim != 4 or pages.shape[3] < rank + rope_dim:
        raise ValueError(
            "pages must be [layers, pages, page_size, width], the width at least kv_lora_rank + rope_dim = "
            f"{rank + rope_dim}; got {list(pages.shape)}."
        )
    if pages.dtype.name not in _CACHE_DTYPES:
        raise ValueError(f"pages are {pages.dtype.name}; a cache is one of {', '.join(_CACHE_DTYPES)}.")
    validate_batch(page_table, seq_lens, query_starts)
    validate_options(num_tokens, page_table.shape[0], options)

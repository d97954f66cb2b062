"""Multi-head latent attention of a ragged batch over a paged cache, in its absorbed form.

The sibling of `ragged_paged_attention` for DeepSeek's attention (DeepSeek-V2, DeepSeek-AI 2024, section
2.1): a token's keys and values, of all heads, follow from one latent vector and one rotated key, and only
these two are cached. Where the products that would expand them are absorbed into the queries and the
output, every head attends to the same rows: its key is (latent, rotated key), its value the latent. The
batch, its pages and the writing of new tokens are as in the sibling.

Backends: `reference` (dense and obviously right, the oracle), `xla` (the sibling's flash attention, whose
cost follows the real lengths), `tpu` (the sibling's Pallas Mosaic kernel), `gpu` (Pallas Mosaic GPU, for
Hopper, with JAX 0.11 or newer) and `triton` (jax-triton, for GPUs from Ampere on).
"""

from __future__ import annotations

import importlib
from typing import Any, Literal, get_args

import jax

from pallas_kernels.mla_ragged_paged_attention.tuned import shape_key
from pallas_kernels.mla_ragged_paged_attention.validation import validate
from pallas_kernels.ragged_paged_attention.options import AttentionOptions
from pallas_kernels.ragged_paged_attention.tuned import tuned_tiling

Backend = Literal["reference", "xla", "tpu", "gpu", "triton"]
BACKENDS: tuple[str, ...] = get_args(Backend)
# The widest latent and rotated key that registers and shared memory hold.
TRITON_LIMITS = (512, 64)


def cache_rows(backend: Backend, kv_lora_rank: int, rope_dim: int) -> tuple[int, int]:
    """How a token's latent and rotated key are best held for a backend: (rows, numbers in a row).

    Hold the cache as [layers, pages, page_size, rows, width] and give the op a view of it, reshaped to
    [layers, pages, page_size, rows * width].
    """
    width = kv_lora_rank + rope_dim
    # A TPU pads rows to 128 lanes, and single rows of 16 bits to two: in two rows nothing is padded beyond.
    return (2, -(-width // 256) * 128) if backend == "tpu" else (1, width)


def mla_ragged_paged_attention(
    q_latent: jax.Array,
    q_rope: jax.Array,
    latent: jax.Array,
    k_rope: jax.Array,
    pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    *,
    scale: float,
    soft_cap: float | None = None,
    return_lse: bool = False,
    decode_only: bool = False,
    backend: Backend = "xla",
    tiling: Any = None,
) -> tuple[jax.Array, ...]:
    """Writes new latents and rotated keys into the cache and attends to everything before each query.

    Args:
        q_latent: [T, num_heads, kv_lora_rank], each head's query times its up-projection of keys; rows
            past query_starts[-1] are padding.
        q_rope: [T, num_heads, rope_dim], the rotated part of each query.
        latent: [T, kv_lora_rank] of the same tokens.
        k_rope: [T, rope_dim], the rotated key that all heads share.
        pages: [layers, pages, page_size, width]: a token's latent, its rotated key, and zeros up to the
            width, of at least kv_lora_rank + rope_dim. Page 0 is a null page: padding is written there.
            Donate it: it is updated in place and never copied or sliced by layer.
        layer, page_table, seq_lens, query_starts: as `ragged_paged_attention` takes them.
        scale: multiplies the logits: of the full head, one over the root of its width before absorbing.
        soft_cap: logits become soft_cap * tanh(logits / soft_cap); None leaves them.
        return_lse: also return the logarithm of the softmax's sum, to merge with attention over other
            keys.
        decode_only: promise that no sequence has more than one query and that T == S with
            query s in row s, which lets a backend leave out its prefill path.
        backend: which implementation runs.
        tiling: the backend's own `Tiling`; None takes the one tuned for this kind of device and shape
            (`benchmarks.tune`), or where there is none, what a heuristic says.

    Returns:
        (out, pages), and with return_lse a third, lse float32[T, num_heads]. out is [T, num_heads,
        kv_lora_rank], latents weighted and summed, which an up-projection of values makes into a head's
        output; its padding rows are finite, those of lse hold anything.

    Raises:
        ValueError: shapes or options that do not fit together, or that the backend cannot do.
    """
    options = AttentionOptions(scale=scale, soft_cap=soft_cap, decode_only=decode_only, return_lse=return_lse)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is not one of {', '.join(BACKENDS)}.")
    validate(q_latent, q_rope, latent, k_rope, pages, page_table, seq_lens, query_starts, options)
    # Imported when asked for: what one platform's kernels are written with, another need not have.
    implementation = importlib.import_module(f"{__name__}.{backend}")
    batch = (layer, page_table, seq_lens, query_starts, options)
    results: tuple[Any, ...]
    if backend == "reference":
        if tiling is not None:
            raise ValueError(f"The reference backend has no tiles; leave out tiling={tiling}.")
        results = implementation.attend(q_latent, q_rope, latent, k_rope, pages, *batch)
    else:
        if tiling is None:
            fields = tuned_tiling(backend, shape_key(q_latent, q_rope, pages, decode_only=decode_only))
            tiling = None if fields is None else implementation.Tiling.from_fields(fields)
        results = implementation.attend(q_latent, q_rope, latent, k_rope, pages, *batch, tiling=tiling)
    return results if return_lse else results[:2]

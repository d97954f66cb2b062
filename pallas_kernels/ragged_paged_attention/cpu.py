"""The backend of CPUs: prefills by `xla_flash`, decodes by `cpu_kernel`, which XLA calls by `cpu_handler`.

XLA gathers the pages of decodes into copies before it multiplies them, in products too small for it; the
kernel reads every key and value where it lies, once.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from pallas_kernels.native import loading
from pallas_kernels.ragged_paged_attention import xla
from pallas_kernels.ragged_paged_attention.options import AttentionOptions
from pallas_kernels.ragged_paged_attention.xla_flash import PagedBlocks, Tiling

__all__ = ["Tiling", "attend", "missing"]

_TARGET = "pallas_kernels_decode_attention"


def missing(cache_dtype: DTypeLike) -> str | None:
    """What keeps the backend from running here, as the end of a sentence; None is nothing."""
    if jnp.dtype(cache_dtype) != jnp.float32:
        return f"reads pages of float32, and these are {jnp.dtype(cache_dtype).name}"
    return loading.missing(_TARGET, f"{__package__}.cpu_handler")


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
    tiling: Tiling | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """See `ragged_paged_attention`; the tiling is that of prefills.

    Raises:
        ValueError: the pages are not of float32, or the kernel cannot be compiled here.
    """
    if (reason := missing(kv_pages.dtype)) is not None:
        raise ValueError(f"backend='cpu' {reason}; or take 'xla'.")
    operands = (q, k, v, kv_pages, layer, page_table, seq_lens, query_starts, options, tiling)
    return xla.attend(*operands, attend_decodes=_attend_decodes)


def _attend_decodes(
    q: jax.Array,
    blocks: PagedBlocks,
    page_table: jax.Array,
    seq_lens: jax.Array,
    sees_itself: jax.Array | None,
    options: AttentionOptions,
    tiling: Tiling,
) -> tuple[jax.Array, jax.Array | None]:
    """See `xla_flash.attend_decodes`."""
    first, end = jnp.zeros_like(seq_lens), seq_lens
    if options.window is not None:
        first = jnp.maximum(seq_lens - options.window, 0)
    if sees_itself is not None:
        end = seq_lens - jnp.where(sees_itself, 0, 1)
    nothing = jnp.zeros(0, jnp.float32)
    shapes: list[Any] = [jax.ShapeDtypeStruct(q.shape, jnp.float32)]
    if options.return_lse:
        shapes.append(jax.ShapeDtypeStruct(q.shape[:3], jnp.float32))
    out, *lse = jax.ffi.ffi_call(_TARGET, shapes)(
        q,
        blocks.pages,
        page_table,
        jnp.asarray(blocks.layer, jnp.int32),
        first,
        end,
        seq_lens,
        nothing if options.sinks is None else options.sinks.astype(jnp.float32),
        nothing if options.alibi_slopes is None else options.alibi_slopes.astype(jnp.float32),
        np.array([options.soft_cap or 0], np.float32),
    )
    return out, lse[0] if lse else None

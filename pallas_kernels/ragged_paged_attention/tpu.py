"""The op on TPU: what surrounds the Pallas Mosaic kernel of `tpu_kernel`, which opens with how it works.

`tpu_work` is the order of its work, `tpu_flash` its arithmetic, on rows that `tpu_rows` lays apart.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention.cache import to_cache_dtype, token_positions
from pallas_kernels.ragged_paged_attention.options import AttentionOptions
from pallas_kernels.ragged_paged_attention.tpu_flash import STRIP, scratch_shapes
from pallas_kernels.ragged_paged_attention.tpu_kernel import kernel
from pallas_kernels.ragged_paged_attention.tpu_rows import LANES
from pallas_kernels.ragged_paged_attention.tpu_work import Tiling

MAX_PAGES_PER_SEQ = 2**16
MAX_TREE_BITS = 2**21
VMEM_BYTES = 60 * 2**20


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
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `ragged_paged_attention`; lse is zero unless `options.return_lse`.

    Raises:
        ValueError: what this backend cannot do, and what to use instead.
    """
    num_tokens, _, head_dim = q.shape
    kv_heads = k.shape[1]
    if tiling is None:
        tiling = Tiling.choose(q, kv_pages, page_table, options.decode_only)
    rows, lanes = page_rows(kv_heads, head_dim)
    new = jnp.stack(
        [
            to_cache_dtype(k, options.k_scale, kv_pages.dtype),
            to_cache_dtype(v, options.v_scale, kv_pages.dtype),
        ],
        axis=2,
    )
    out, pages, lse = attend_rows(
        _spread(q, kv_heads, lanes),
        new.reshape(num_tokens, rows, lanes),
        kv_pages.reshape(*kv_pages.shape[:3], rows, lanes),
        layer,
        page_table,
        seq_lens,
        query_starts,
        options,
        tiling,
        group=q.shape[1] // kv_heads,
        value_lanes=lanes,
        name="ragged_paged_attention",
    )
    return _gather(out, kv_heads, head_dim), pages.reshape(kv_pages.shape), lse


def attend_rows(
    q: jax.Array,
    new: jax.Array,
    pages: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    seq_lens: jax.Array,
    query_starts: jax.Array,
    options: AttentionOptions,
    tiling: Tiling,
    *,
    group: int,
    value_lanes: int,
    name: str,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The kernel on rows as they stand in pages, each head's queries at the lanes of its keys.

    Args:
        q: [T, heads, lanes], or several times as many lanes where so many rows are one; zero at those
            of its row that are not its keys.
        new: [T, rows, lanes] of the new tokens, in the dtype of the pages.
        pages: [layers, pages, page_size, rows, lanes].
        group: heads that are computed together; they share their keys.
        value_lanes: how many of a row's first lanes the output has.

    Returns:
        out [T, heads, value_lanes], zero in padding; pages; and lse [T, heads], zero unless
        `options.return_lse`.

    Raises:
        ValueError: as `attend`.
    """
    _refuse_unsupported(page_table, pages, options)
    (num_tokens, heads, lanes), page_size = q.shape, pages.shape[2]
    if tiling.keys % page_size or (tiling.queries > 1 and tiling.queries % STRIP):
        raise ValueError(
            f"{tiling} must have keys in whole pages of {page_size}, and 1 query or a multiple of {STRIP}."
        )
    sequence, position, is_real = token_positions(seq_lens, query_starts, num_tokens)
    row_words = _row_words(options)
    given = [x for x in (options.sinks, options.alibi_slopes, row_words) if x is not None]
    scales = [jnp.float32(1) if x is None else x for x in (options.k_scale, options.v_scale)]
    # Copies to SMEM are of 128 words or a multiple of that.
    tables = jnp.pad(page_table, ((0, 0), (0, -page_table.shape[1] % LANES)))
    hbm = pl.BlockSpec(memory_space=pl.ANY)
    smem = pl.BlockSpec(memory_space=pltpu.SMEM)
    lse_rows = num_tokens if options.return_lse else 1
    call = pl.pallas_call(
        functools.partial(kernel, options=options, tiling=tiling, group=group),
        out_shape=(
            jax.ShapeDtypeStruct((num_tokens, heads, value_lanes), q.dtype),
            jax.ShapeDtypeStruct(pages.shape, pages.dtype),
            jax.ShapeDtypeStruct((lse_rows, heads, LANES), jnp.float32),
        ),
        in_specs=[smem] * (5 + len(given)) + [hbm] * 4,
        out_specs=(hbm, hbm, hbm),
        scratch_shapes=scratch_shapes(
            q.dtype,
            pages.dtype,
            heads,
            group,
            (pages.shape[3], pages.shape[4]),
            lanes,
            value_lanes,
            tables.shape[1],
            0 if row_words is None else row_words.size // num_tokens,
            options.return_lse,
            tiling,
        ),
        input_output_aliases={8 + len(given): 1},
        cost_estimate=_cost(q, value_lanes, pages, page_table),
        compiler_params=pltpu.CompilerParams(vmem_limit_bytes=VMEM_BYTES, disable_bounds_checks=True),
        name=name,
    )
    out, pages, lse = call(
        jnp.asarray(layer, jnp.int32).reshape(1),
        seq_lens,
        query_starts,
        page_table[sequence, jnp.where(is_real, position // page_size, 0)],
        jnp.stack(scales),
        *given,
        tables[:, None],
        q,
        new,
        pages,
    )
    out = jnp.where(is_real[:, None, None], out, jnp.zeros((), out.dtype))
    return out, pages, lse[:, :, 0] if options.return_lse else jnp.zeros((num_tokens, heads))


def page_rows(kv_heads: int, head_dim: int) -> tuple[int, int]:
    """How the keys and values of one token stand in a page: (rows, lanes).

    Heads narrower than half a vector register stand side by side in rows of 128 lanes, so that no lane
    of memory is wasted: hold the cache as [layers, pages, page_size, rows, lanes] and give the op
    `kv_pages.reshape(..., 2 * kv_heads, head_dim)`. The reshapes there and here cancel; a cache that is
    held otherwise is copied at every call. Where head_dim is no multiple of 128 and heads cannot be put
    side by side, rows are [2 * kv_heads, head_dim], and the cache must be held row-major (as
    `jax.experimental.layout.Layout((0, 1, 2, 3, 4))`) lest it be copied.
    """
    if LANES % (2 * head_dim) == 0 and (2 * kv_heads * head_dim) % LANES == 0:
        return 2 * kv_heads * head_dim // LANES, LANES
    return 2 * kv_heads, head_dim


def in_tiles(rows: int, lanes: int, dtype: jnp.dtype) -> tuple[int, int]:
    """The rows and lanes of memory that so many of a page take.

    Tiles are 8 rows of 128 lanes, or of fewer rows where a token has fewer, as a power of two; narrow
    numbers share a row of 32-bit words.
    """
    packed = 4 // dtype.itemsize
    height = min(8, max(packed, pl.next_power_of_2(rows)))
    return pl.cdiv(rows, height) * height, pl.cdiv(lanes, LANES) * LANES


def _spread(q: jax.Array, kv_heads: int, lanes: int) -> jax.Array:
    """Queries [T, heads, head_dim] at the lanes of their keys, [T, heads, lanes], with zeros elsewhere.

    Times a row of the page this gives the product with the keys alone.
    """
    tokens, heads, head_dim = q.shape
    side_by_side = max(1, lanes // (2 * head_dim))
    if lanes == head_dim:
        return q
    q = q.reshape(tokens, kv_heads // side_by_side, side_by_side, heads // kv_heads, head_dim)
    begins = [2 * head_dim * place for place in range(side_by_side)]
    return jnp.stack(
        [
            jnp.pad(q[:, :, place], ((0, 0), (0, 0), (0, 0), (begin, lanes - begin - head_dim)))
            for place, begin in enumerate(begins)
        ],
        axis=2,
    ).reshape(tokens, heads, lanes)


def _gather(out: jax.Array, kv_heads: int, head_dim: int) -> jax.Array:
    """The inverse for outputs, which stand at the lanes of their values: [T, heads, head_dim]."""
    tokens, heads, lanes = out.shape
    side_by_side = max(1, lanes // (2 * head_dim))
    if lanes == head_dim:
        return out
    out = out.reshape(tokens, kv_heads // side_by_side, side_by_side, heads // kv_heads, lanes)
    begins = [2 * head_dim * place + head_dim for place in range(side_by_side)]
    return jnp.stack(
        [out[:, :, place, :, begin : begin + head_dim] for place, begin in enumerate(begins)], axis=2
    ).reshape(tokens, heads, head_dim)


def _row_words(options: AttentionOptions) -> jax.Array | None:
    """What a query sees beside causality, int32[words * T], all first words before all second ones.

    With span_ends that is one word; a tree mask is packed, its column j in bit j % 32 of word j // 32.
    """
    if options.span_ends is not None:
        return options.span_ends
    if options.tree_mask is None:
        return None
    tokens, width = options.tree_mask.shape
    words = pl.cdiv(width, 32)
    bits = jnp.pad(options.tree_mask, ((0, 0), (0, 32 * words - width))).reshape(tokens, words, 32)
    packed = jnp.sum(bits.astype(jnp.uint32) << jnp.arange(32, dtype=jnp.uint32), axis=2, dtype=jnp.uint32)
    return lax.bitcast_convert_type(packed, jnp.int32).T.reshape(-1)


def _refuse_unsupported(page_table: jax.Array, kv_pages: jax.Array, options: AttentionOptions) -> None:
    if kv_pages.dtype == jnp.float16:
        raise ValueError("the tpu backend has no float16 pages, as TPUs have no float16; use bfloat16.")
    if page_table.shape[1] > MAX_PAGES_PER_SEQ:
        raise ValueError(
            f"the page table has {page_table.shape[1]} pages a sequence, and the tpu backend has room for "
            f"{MAX_PAGES_PER_SEQ}; use larger pages."
        )
    if options.tree_mask is not None and options.tree_mask.size > MAX_TREE_BITS:
        raise ValueError(
            f"tree_mask is {list(options.tree_mask.shape)}, and the tpu backend has room for {MAX_TREE_BITS} "
            "bits; verify fewer tokens at a time, or use backend='xla'."
        )


def _cost(q: jax.Array, value_lanes: int, pages: jax.Array, page_table: jax.Array) -> pl.CostEstimate:
    """The cost of a batch that fills its page table: lengths are not known when this is compiled."""
    tokens, heads, lanes = q.shape
    num_seqs, pages_per_seq = page_table.shape
    keys = pages_per_seq * pages.shape[2]
    page_bytes = math.prod(pages.shape[2:]) * pages.dtype.itemsize
    new_bytes = 2 * tokens * page_bytes // pages.shape[2]
    return pl.CostEstimate(
        flops=2 * tokens * heads * (lanes + value_lanes) * keys,
        transcendentals=tokens * heads * keys,
        bytes_accessed=num_seqs * pages_per_seq * page_bytes
        + tokens * heads * (lanes + value_lanes) * q.dtype.itemsize
        + new_bytes,
    )

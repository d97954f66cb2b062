"""Random ragged batches for the attention suite: every option, and NaN wherever nothing may be read."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.ragged_paged_attention.options import AttentionOptions


@dataclass(frozen=True)
class Shape:
    """What a backend compiles for; query lengths of a batch are drawn up to `longest`."""

    heads: int
    kv_heads: int
    head_dim: int
    page_size: int
    pages_per_seq: int
    num_seqs: int
    num_tokens: int
    longest: int = 12
    dtype: Any = jnp.float32
    cache_dtype: Any = None
    decode_only: bool = False
    window: int | None = None
    soft_cap: float | None = None
    sinks: bool = False
    alibi: bool = False
    spans: bool = False
    tree_width: int | None = None
    lse: bool = False

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def pages_dtype(self) -> Any:
        return np.dtype(self.cache_dtype or self.dtype)

    @property
    def largest_in_pages(self) -> float | None:
        """The largest number of 8-bit pages, which are scaled; None where pages are wider."""
        if self.pages_dtype.itemsize > 1:
            return None
        is_int = self.pages_dtype == np.int8
        return 127 if is_int else float(ml_dtypes.finfo(self.pages_dtype).max)


@dataclass(frozen=True)
class Batch:
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    kv_pages: np.ndarray
    layer: int
    page_table: np.ndarray
    seq_lens: np.ndarray
    query_starts: np.ndarray
    sinks: np.ndarray | None = None
    alibi_slopes: np.ndarray | None = None
    k_scale: np.ndarray | None = None
    v_scale: np.ndarray | None = None
    span_ends: np.ndarray | None = None
    tree_mask: np.ndarray | None = None

    @property
    def operands(self) -> tuple[Any, ...]:
        """What the op takes by position; copies, since the cache is donated."""
        names = ("q", "k", "v", "kv_pages", "layer", "page_table", "seq_lens", "query_starts")
        return tuple(jnp.array(getattr(self, name)) for name in names)

    @property
    def array_options(self) -> dict[str, Any]:
        names = ("sinks", "alibi_slopes", "k_scale", "v_scale", "span_ends", "tree_mask")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def quantized(x: np.ndarray, scale: np.ndarray | None, shape: Shape) -> np.ndarray:
    """x as the pages hold it: divided in float32, held within the range, rounded to nearest even."""
    if scale is not None:
        x = x.astype(np.float32) / scale
    if shape.largest_in_pages is not None:
        largest = np.float32(shape.largest_in_pages)
        x = np.clip(x, -128 if shape.pages_dtype == np.int8 else -largest, largest)
    if shape.pages_dtype == np.int8:
        x = np.rint(x)
    return x.astype(shape.pages_dtype)


def random_lengths(shape: Shape, rng: np.random.Generator) -> list[tuple[int, int]]:
    """(tokens in the cache, new tokens) of prefills, decodes and empty sequences in random order."""
    capacity = shape.pages_per_seq * shape.page_size
    lengths, room = [], shape.num_tokens
    for _ in range(shape.num_seqs):
        kinds = {"empty": 0, "decode": 1, "prefill": int(rng.integers(2, shape.longest + 1))}
        kind = rng.choice(list(kinds), p=[0.2, 0.8, 0] if shape.decode_only else [0.2, 0.4, 0.4])
        new = min(kinds[kind], room, capacity)
        room -= new
        lengths.append((int(rng.integers(0, capacity - new + 1)) if new else 0, new))
    return lengths


def random_batch(
    shape: Shape, seed: int, logit_size: float, lengths: Sequence[tuple[int, int]] | None = None
) -> Batch:
    """A batch whose logits, before sinks and the like, have `logit_size` as their standard deviation."""
    rng = np.random.default_rng([seed, zlib.crc32(repr(shape).encode())])
    lengths = random_lengths(shape, rng) if lengths is None else list(lengths)
    if shape.decode_only:
        # Row s is sequence s: only the last ones may be empty.
        lengths.sort(key=lambda length: length[1] == 0)
    contexts, query_lens = np.array(lengths, np.int32).T
    query_starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    seq_lens = contexts + query_lens

    def normal(*size: int) -> np.ndarray:
        return rng.normal(size=size).astype(np.float32)

    k_scale = v_scale = None
    if shape.largest_in_pages is not None:
        # What is past 3 or 2.5 standard deviations does not fit and must be held to the limit.
        k_scale, v_scale = (np.float32(size / shape.largest_in_pages) for size in (3, 2.5))
    num_pages = shape.num_seqs * shape.pages_per_seq + 3
    nothing = 127 if shape.pages_dtype == np.int8 else np.nan
    kv_pages = np.full((3, num_pages, shape.page_size, 2 * shape.kv_heads, shape.head_dim), nothing)
    kv_pages = kv_pages.astype(shape.pages_dtype)
    layer = int(rng.integers(3))
    free = rng.permutation(np.arange(1, num_pages)).astype(np.int32)
    # Past a sequence's pages the table may say anything, pages that do not exist included.
    anything = np.array([0, 1, num_pages - 1, -1, 10**9], np.int32)
    page_table = rng.choice(anything, (shape.num_seqs, shape.pages_per_seq)).astype(np.int32)
    for s, (context, length) in enumerate(zip(contexts, seq_lens, strict=True)):
        count = -(-int(length) // shape.page_size)
        page_table[s, :count], free = free[:count], free[count:]
        for position in range(context):
            slot = kv_pages[layer, page_table[s, position // shape.page_size], position % shape.page_size]
            slot[0::2] = quantized(normal(shape.kv_heads, shape.head_dim), k_scale, shape)
            slot[1::2] = quantized(normal(shape.kv_heads, shape.head_dim), v_scale, shape)
    tokens = shape.num_tokens
    k, v = (normal(tokens, shape.kv_heads, shape.head_dim).astype(shape.dtype) for _ in "kv")
    k[query_starts[-1] :] = v[query_starts[-1] :] = np.nan
    return Batch(
        (normal(tokens, shape.heads, shape.head_dim) * logit_size).astype(shape.dtype),
        k,
        v,
        kv_pages,
        layer,
        page_table,
        seq_lens,
        query_starts,
        sinks=2 * normal(shape.heads) if shape.sinks else None,
        alibi_slopes=rng.permutation(0.5 ** np.arange(1, shape.heads + 1)).astype(np.float32)
        if shape.alibi
        else None,
        k_scale=k_scale,
        v_scale=v_scale,
        span_ends=_random_spans(seq_lens, query_starts, tokens, rng) if shape.spans else None,
        tree_mask=_random_trees(query_starts, tokens, shape.tree_width, rng) if shape.tree_width else None,
    )


def options_of(batch: Batch, shape: Shape) -> AttentionOptions:
    """What a backend's `attend` is given of them."""
    return AttentionOptions(
        scale=shape.scale,
        window=shape.window,
        soft_cap=shape.soft_cap,
        decode_only=shape.decode_only,
        return_lse=shape.lse,
        **{name: jnp.asarray(array) for name, array in batch.array_options.items()},
    )


def _random_spans(
    seq_lens: np.ndarray, query_starts: np.ndarray, tokens: int, rng: np.random.Generator
) -> np.ndarray:
    """Spans one after the other, some of one token; some queries are in none; padding holds anything."""
    span_ends = rng.choice([0, -1, 10**9], tokens).astype(np.int32)
    for first, last, length in zip(query_starts, query_starts[1:], seq_lens, strict=False):
        row = first
        while row < last:
            end = min(last, row + int(rng.integers(1, max(2, last - first))))
            in_cache = length - (last - end)
            span_ends[row:end] = (
                in_cache if rng.random() < 0.7 else rng.integers(0, length - (last - row) + 1)
            )
            row = end
    return span_ends


def _random_trees(query_starts: np.ndarray, tokens: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Each token sees its ancestors and itself; now and then something else, or nothing."""
    mask = rng.random((tokens, width)) < 0.5  # kept for padding, and for sequences of more new tokens
    for first, last in itertools.pairwise(query_starts):
        if last - first > width:
            continue
        for i in range(last - first):
            kind = rng.choice(["tree", "anything", "nothing"], p=[0.7, 0.2, 0.1])
            if kind == "tree":
                parent = int(rng.integers(-1, i)) if i else -1
                mask[first + i] = mask[first + parent] & (np.arange(width) < i) if parent >= 0 else False
                mask[first + i, i] = True
            elif kind == "nothing":
                mask[first + i] = False
    return mask

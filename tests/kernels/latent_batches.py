"""Random ragged batches for latent attention, its definition in float64, and what is held against it."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from tests.kernels.oracle import TOLERANCE, check_cache, check_norm
from tests.kernels.ragged_batches import random_lengths

LAYERS = 3


@dataclass(frozen=True)
class Shape:
    """What a backend compiles for; query lengths of a batch are drawn up to `longest`.

    Attributes:
        spare: numbers of a page's row behind the rotated key.
    """

    heads: int
    rank: int
    rope_dim: int
    page_size: int
    pages_per_seq: int
    num_seqs: int
    num_tokens: int
    longest: int = 12
    dtype: Any = jnp.float32
    cache_dtype: Any = None
    decode_only: bool = False
    soft_cap: float | None = None
    lse: bool = True
    spare: int = 0

    @property
    def scale(self) -> float:
        return (self.rank + self.rope_dim) ** -0.5

    @property
    def width(self) -> int:
        return self.rank + self.rope_dim + self.spare

    @property
    def options(self) -> dict[str, Any]:
        """What the op takes by keyword."""
        names = {"scale": "scale", "soft_cap": "soft_cap", "decode_only": "decode_only", "return_lse": "lse"}
        return {option: getattr(self, name) for option, name in names.items()}


@dataclass(frozen=True)
class Batch:
    q_latent: np.ndarray
    q_rope: np.ndarray
    latent: np.ndarray
    k_rope: np.ndarray
    kv_pages: np.ndarray
    layer: int
    page_table: np.ndarray
    seq_lens: np.ndarray
    query_starts: np.ndarray

    @property
    def operands(self) -> tuple[Any, ...]:
        """What the op takes by position; copies, since the cache is donated."""
        return tuple(jnp.array(value) for value in vars(self).values())


def random_batch(
    shape: Shape, seed: int, logit_size: float, lengths: Sequence[tuple[int, int]] | None = None
) -> Batch:
    """A batch whose logits have `logit_size` as standard deviation; NaN wherever nothing may be read."""
    rng = np.random.default_rng([seed, zlib.crc32(repr(shape).encode())])
    lengths = list(random_lengths(shape, rng) if lengths is None else lengths)
    if shape.decode_only:
        # Row s is sequence s: only the last ones may be empty.
        lengths.sort(key=lambda length: length[1] == 0)
    contexts, query_lens = np.array(lengths, np.int32).T
    query_starts = np.concatenate([[0], np.cumsum(query_lens)]).astype(np.int32)
    seq_lens = contexts + query_lens

    def normal(*size: int) -> np.ndarray:
        return rng.normal(size=size).astype(np.float32)

    num_pages = shape.num_seqs * shape.pages_per_seq + 3
    pages_dtype = np.dtype(shape.cache_dtype or shape.dtype)
    pages = np.full((LAYERS, num_pages, shape.page_size, shape.width), np.nan).astype(pages_dtype)
    layer = int(rng.integers(LAYERS))
    free = rng.permutation(np.arange(1, num_pages)).astype(np.int32)
    # Past a sequence's pages the table may say anything, pages that do not exist included.
    anything = np.array([0, 1, num_pages - 1, -1, 10**9], np.int32)
    page_table = rng.choice(anything, (shape.num_seqs, shape.pages_per_seq)).astype(np.int32)
    known = shape.rank + shape.rope_dim
    for s, (context, length) in enumerate(zip(contexts, seq_lens, strict=True)):
        count = -(-int(length) // shape.page_size)
        page_table[s, :count], free = free[:count], free[count:]
        for position in range(context):
            row = pages[layer, page_table[s, position // shape.page_size], position % shape.page_size]
            row[:known], row[known:] = normal(known).astype(pages_dtype), 0
    tokens, queries = shape.num_tokens, (shape.num_tokens, shape.heads)
    latent, k_rope = (normal(tokens, dim).astype(shape.dtype) for dim in (shape.rank, shape.rope_dim))
    latent[query_starts[-1] :] = k_rope[query_starts[-1] :] = np.nan
    return Batch(
        (normal(*queries, shape.rank) * logit_size).astype(shape.dtype),
        (normal(*queries, shape.rope_dim) * logit_size).astype(shape.dtype),
        latent,
        k_rope,
        pages,
        layer,
        page_table,
        seq_lens,
        query_starts,
    )


def oracle(batch: Batch, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(out float64, cache, lse float64); rows of padding are zero."""
    cache = batch.kv_pages.copy()
    out, lse = np.zeros(batch.q_latent.shape), np.zeros(batch.q_latent.shape[:2])
    for s, length in enumerate(batch.seq_lens):
        rows = range(batch.query_starts[s], batch.query_starts[s + 1])
        table = batch.page_table[s]
        for position, row in enumerate(rows, start=length - len(rows)):
            slot = cache[batch.layer, table[position // shape.page_size], position % shape.page_size]
            slot[:] = 0
            slot[: shape.rank] = batch.latent[row].astype(slot.dtype)
            slot[shape.rank :][: shape.rope_dim] = batch.k_rope[row].astype(slot.dtype)
        pages = table[: -(-int(length) // shape.page_size)]
        own = cache[batch.layer, pages].reshape(-1, shape.width)[:length].astype(np.float64)
        latents, ropes = own[:, : shape.rank], own[:, shape.rank :][:, : shape.rope_dim]
        for position, row in enumerate(rows, start=length - len(rows)):
            seen = slice(position + 1)
            logits = batch.q_latent[row].astype(np.float64) @ latents[seen].T
            logits = (logits + batch.q_rope[row].astype(np.float64) @ ropes[seen].T) * shape.scale
            if shape.soft_cap is not None:
                logits = shape.soft_cap * np.tanh(logits / shape.soft_cap)
            lse[row] = np.logaddexp.reduce(logits, axis=1)
            out[row] = np.exp(logits - lse[row][:, None]) @ latents[seen]
    return out, cache, lse


def check(
    batch: Batch, shape: Shape, out: np.ndarray, cache: np.ndarray, lse: np.ndarray | None = None
) -> None:
    """Raises AssertionError unless the result is what the definition says."""
    exact, expected_cache, exact_lse = oracle(batch, shape)
    real, tolerance = batch.query_starts[-1], TOLERANCE[shape.dtype]
    assert out.dtype == batch.q_latent.dtype and out.shape == batch.q_latent.shape
    assert np.isfinite(out.astype(np.float32)).all(), "not finite"
    check_cache(batch.kv_pages, batch.layer, cache, expected_cache)
    check_norm(out[:real].astype(np.float64), exact[:real], tolerance)
    if shape.lse:
        assert lse is not None and lse.dtype == np.float32
        check_norm(lse[:real].astype(np.float64), exact_lse[:real], tolerance)

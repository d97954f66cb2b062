"""The suite itself: its check passes what is right and notices every mistake that it is there for."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.oracle import Mistakes, check, oracle
from tests.kernels.ragged_batches import Batch, Shape, random_batch

PLAIN = Shape(6, 2, 16, 4, 24, 5, 40, longest=30, window=30, lse=True)
SINKS = replace(PLAIN, sinks=True)
ALIBI = replace(PLAIN, alibi=True)
SPANS = replace(PLAIN, spans=True)
TREES = replace(PLAIN, tree_width=12)
INT8 = replace(PLAIN, cache_dtype=jnp.int8)
FP8 = replace(PLAIN, cache_dtype=jnp.float8_e4m3fn)
BFLOAT16 = replace(PLAIN, dtype=jnp.bfloat16)


def telling_batch(shape: Shape) -> Batch:
    """One where some query has keys after it, and some has more keys before it than the window holds."""
    for seed in itertools.count():
        batch = random_batch(shape, seed, 1.0)
        new = np.diff(batch.query_starts)
        tree_width = shape.tree_width or 100
        if ((new > 4) & (new <= tree_width)).any() and batch.seq_lens.max() > 40:
            return batch
    raise AssertionError


@pytest.mark.parametrize("shape", [PLAIN, SINKS, ALIBI, SPANS, TREES, INT8, FP8, BFLOAT16], ids=str)
def test_the_check_passes_what_is_right(shape: Shape) -> None:
    batch = telling_batch(shape)
    out, cache, lse = oracle(batch, shape)
    check(batch, shape, out.astype(shape.dtype), cache, lse.astype(np.float32))


@pytest.mark.parametrize(
    ("shape", "wrong"),
    [
        (PLAIN, Mistakes(causal=1)),
        (PLAIN, Mistakes(causal=-1)),
        (PLAIN, Mistakes(window=1)),
        (PLAIN, Mistakes(window=-1)),
        (PLAIN, Mistakes(scale=1.0005)),
        (PLAIN, Mistakes(page=1)),
        (PLAIN, Mistakes(offset=1)),
        (PLAIN, Mistakes(swap_heads=True)),
        (PLAIN, Mistakes(skip_last_page=True)),
        (PLAIN, Mistakes(lse=1 / np.log(2))),
        (BFLOAT16, Mistakes(causal=1)),
        (BFLOAT16, Mistakes(window=1)),
        (BFLOAT16, Mistakes(page=1)),
        (replace(PLAIN, soft_cap=5.0), Mistakes(soft_cap=1.01)),
        (SINKS, Mistakes(sink_head=1)),
        (SINKS, Mistakes(sink_in_lse=False)),
        (ALIBI, Mistakes(alibi_head=1)),
        (ALIBI, Mistakes(alibi_distance=1)),
        (SPANS, Mistakes(span_end=1)),
        (SPANS, Mistakes(span_end=-1)),
        (SPANS, Mistakes(span_row=1)),
        (TREES, Mistakes(tree_column=1)),
        (TREES, Mistakes(tree_row=1)),
        (replace(TREES, tree_width=6), Mistakes(tree_width=1)),
        (replace(TREES, tree_width=6), Mistakes(tree_width=-1)),
        (INT8, Mistakes(k_scale=1.002)),
        (INT8, Mistakes(v_scale=1.002)),
        (INT8, Mistakes(truncate=True)),
        (FP8, Mistakes(k_scale=1.002)),
    ],
    ids=str,
)
def test_the_check_catches(shape: Shape, wrong: Mistakes) -> None:
    batch = telling_batch(shape)
    if wrong.tree_width:  # where the width is off by one, a sequence that is just too wide, or just not
        new = shape.tree_width + max(wrong.tree_width, 0)  # type: ignore[operator]
        batch = random_batch(shape, 0, 1.0, [(10, new), (40, new), (3, 2)] + [(0, 0)] * 2)
    out, cache, lse = oracle(batch, shape, wrong)
    with pytest.raises(AssertionError):
        check(batch, shape, np.nan_to_num(out).astype(shape.dtype), cache, lse.astype(np.float32))


@pytest.mark.parametrize("shape", [PLAIN, INT8], ids=str)
def test_the_check_catches_a_slot_too_many_in_the_cache(shape: Shape) -> None:
    batch = random_batch(shape, 1, 1.0)
    out, cache, lse = oracle(batch, shape)
    nothing: Any = batch.kv_pages[batch.layer, 0]
    untouched = np.argwhere(
        (cache[batch.layer, 1:] == nothing).all((-1, -2))
        | np.isnan(cache[batch.layer, 1:].astype(np.float32)).all((-1, -2))
    )[0]
    cache[batch.layer, untouched[0] + 1, untouched[1]] = 0
    with pytest.raises(AssertionError):
        check(batch, shape, out.astype(np.float32), cache, lse.astype(np.float32))

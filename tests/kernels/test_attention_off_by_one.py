"""Every backend with one thing off by one, or by little: the suite's check then says so.

`test_attention_oracle.py` shows that the check notices mistakes; this shows that each backend reads each
of its arguments, and that its answers are near enough to the right ones for a small change to show.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.backends import BackendUnderTest, on_every_backend
from tests.kernels.oracle import check, oracle
from tests.kernels.ragged_batches import Batch, Shape, random_batch

LENGTHS = [(40, 5), (60, 1), (37, 8), (70, 1)]
PAGES = [*np.roll(np.arange(9), 1), *range(9, 24)]  # the pages of cached tokens, each in the next one's place
PLAIN = Shape(4, 2, 8, 4, 24, 4, 15, window=30)
LOGITS = replace(PLAIN, soft_cap=6.0, sinks=True, alibi=True, lse=True)
INT8 = replace(PLAIN, cache_dtype=jnp.int8)
SPANS = replace(PLAIN, spans=True)
TREES = replace(PLAIN, tree_width=8)


def shifted(name: str, shift: Callable[[Any], Any]) -> Callable[[Batch], Batch]:
    """A change of one array of the batch."""

    def change(batch: Batch) -> Batch:
        array = np.asarray(getattr(batch, name))
        return replace(batch, **{name: shift(array).astype(array.dtype)})

    return change


def causal_and_one(batch: Batch) -> Batch:
    """Every query sees one key more, by a span that ends behind it."""
    position = np.concatenate([np.arange(cached, cached + new) for cached, new in LENGTHS])
    return replace(batch, span_ends=np.maximum(batch.span_ends, position + 2).astype(np.int32))


@on_every_backend
@pytest.mark.parametrize(
    ("shape", "change"),
    [
        pytest.param(PLAIN, shifted("q", lambda q: q * 1.0005), id="scale"),
        pytest.param(PLAIN, shifted("page_table", lambda table: table[:, PAGES]), id="page"),
        pytest.param(PLAIN, shifted("layer", lambda layer: np.asarray((layer + 1) % 3)), id="layer"),
        pytest.param(PLAIN, replace(PLAIN, window=31), id="window of one more"),
        pytest.param(PLAIN, replace(PLAIN, window=29), id="window of one less"),
        pytest.param(LOGITS, replace(LOGITS, soft_cap=6.01), id="soft cap"),
        pytest.param(LOGITS, shifted("sinks", lambda sinks: np.roll(sinks, 1)), id="sink"),
        pytest.param(LOGITS, shifted("alibi_slopes", lambda slopes: np.roll(slopes, 1)), id="slope"),
        pytest.param(INT8, shifted("k_scale", lambda scale: scale * np.float32(1.002)), id="k_scale"),
        pytest.param(INT8, shifted("v_scale", lambda scale: scale * np.float32(1.002)), id="v_scale"),
        pytest.param(SPANS, causal_and_one, id="causal"),
        pytest.param(SPANS, shifted("span_ends", lambda ends: ends - 1), id="span"),
        pytest.param(TREES, shifted("tree_mask", lambda mask: np.roll(mask, 1, 1)), id="tree column"),
        pytest.param(TREES, shifted("tree_mask", lambda mask: np.roll(mask, 1, 0)), id="tree row"),
    ],
)
def test_off_by_one_shows(
    shape: Shape, change: Shape | Callable[[Batch], Batch], backend: BackendUnderTest
) -> None:
    batch = random_batch(shape, 0, 1.0, LENGTHS)
    if backend.refused(batch, shape):
        return
    _, right_cache, _ = oracle(batch, shape)
    changed_shape, changed = (change, batch) if isinstance(change, Shape) else (shape, change(batch))
    out, _, *lse = backend.run(changed, changed_shape)
    # The cache, too, may show it; here the output is to.
    with pytest.raises(AssertionError, match=r"relative error|not finite"):
        check(batch, shape, out, right_cache, *lse)

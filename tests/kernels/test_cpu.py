"""The CPU's kernels for decodes and prefills: what they promise beyond the suite."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.kernels.backends import BACKENDS
from tests.kernels.ragged_batches import Shape, random_batch

BACKEND = next(backend for backend in BACKENDS if backend.name == "cpu")
# A chunk is of 32 keys here: sequences have up to 12 of them, which threads share.
SHAPE = Shape(16, 8, 128, 16, 24, 6, 6, decode_only=True, lse=True)


def test_a_decode_is_the_same_alone_bit_for_bit() -> None:
    """Whoever computes its chunks, and whatever else there is to compute."""
    batch = random_batch(SHAPE, 0, 1.0)
    out, cache, lse = BACKEND.run(batch, SHAPE)
    assert max(batch.seq_lens) > 5 * 32
    for s in range(int(batch.query_starts[-1])):
        first = [s, *(x for x in range(SHAPE.num_seqs) if x != s)]
        rows = {name: getattr(batch, name)[first] for name in ("q", "k", "v", "page_table")}
        lens = np.where(np.arange(SHAPE.num_seqs) == 0, batch.seq_lens[s], 0).astype(np.int32)
        starts = np.minimum(np.arange(SHAPE.num_seqs + 1), 1).astype(np.int32)
        alone = replace(batch, **rows, kv_pages=cache, seq_lens=lens, query_starts=starts)
        own_out, _, own_lse = BACKEND.run(alone, SHAPE)
        np.testing.assert_array_equal(own_out[0], out[s])
        np.testing.assert_array_equal(own_lse[0], lse[s])


@pytest.mark.parametrize("options", [{}, {"window": 41}], ids=["all keys", "window"])
def test_a_prefill_is_the_same_alone_and_in_chunks_bit_for_bit(options: dict[str, Any]) -> None:
    """Whichever tile a query is in: chunks end within tiles, vectors of queries and blocks of keys."""
    shape = Shape(6, 2, 20, 8, 32, 3, 424, alibi=True, lse=True, **options)
    batch = random_batch(shape, 0, 1.0, [(9, 200), (30, 1), (0, 213)])
    out, cache, lse = BACKEND.run(batch, shape)
    done = 0
    for size in (70, 2, 130, 11):
        rows, done = 201 + done + np.arange(size), done + size
        new = {name: np.zeros_like(getattr(batch, name)) for name in ("q", "k", "v")}
        for name, array in new.items():
            array[:size] = getattr(batch, name)[rows]
        lens, starts = np.array([done, 0, 0], np.int32), np.array([0, size, size, size], np.int32)
        table = batch.page_table[[2, 0, 1]]
        chunk = replace(batch, **new, kv_pages=cache, page_table=table, seq_lens=lens, query_starts=starts)
        own_out, _, own_lse = BACKEND.run(chunk, shape)
        np.testing.assert_array_equal(own_out[:size], out[rows])
        np.testing.assert_array_equal(own_lse[:size], lse[rows])

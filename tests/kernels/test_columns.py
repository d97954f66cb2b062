"""Functions of columns, compiled as kernels compile them, against NumPy in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from pallas_kernels.native.columns import Vectors, walk  # noqa: E402

VECTORS, WIDTH = 2, 4


def _step(vectors: Vectors, row: Any, x: Any, sums: Any, first: Any) -> tuple[Any, ...]:
    """Numbers of rows before a column's first become e^x, others are negated; what is written is summed."""
    new = vectors.where(
        vectors.within(vectors.integer(0), row, first),
        vectors.exp(x),
        vectors.subtract(vectors.number(0.0), x),
    )
    return new, vectors.add(sums, new), first


def test_rows_are_walked_with_what_is_carried_along() -> None:
    columns, rng = VECTORS * WIDTH, np.random.default_rng(0)
    x = rng.uniform(-40, 0, (50, columns + 3)).astype(np.float32)
    x[3:9, 0] = [-0.0, -87.9, -88, -1e30, -np.inf, np.nan]
    into = np.full((50, columns + 1), 7, np.float32)
    sums, first = np.ones(columns, np.float32), np.arange(12, 12 + columns, dtype=np.int32)
    step = walk(_step, ("floats", "ints"), VECTORS, WIDTH)

    @numba.njit
    def run(source, source_row, target, target_row, rows, sums, first):  # type: ignore[no-untyped-def]
        step(source, source_row, target, target_row, 2, rows, (sums, first))

    panels = (x.ctypes.data, x.strides[0], into.ctypes.data, into.strides[0])
    run(*panels, 50, sums.ctypes.data, first.ctypes.data)
    exact = x[:, :columns].astype(np.float64)
    exact = np.where(2 + np.arange(50)[:, None] < first, np.exp(exact), -exact)
    # Float32 keeps 6e-8 of the exponent's product, at most 128 in size here, and of each of eight sums.
    np.testing.assert_allclose(into[:, :columns], exact, rtol=6e-6, atol=2e-38)
    assert (into[6:8, 0] == 0).all() and into[3, 0] == 1 and (into[:, columns] == 7).all()
    np.testing.assert_allclose(sums, 1 + exact.sum(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(first, np.arange(12, 12 + columns))

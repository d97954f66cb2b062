"""Grouped products against float64, on every backend; and what the fast one reads and keeps on a CPU."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul import BACKENDS, Backend, grouped_matmul
from pallas_kernels.grouped_matmul.shapes import EXPERTS

# Of the norm. A float32 sum of a few hundred products rounds to some 2**-22 of it; bfloat16 results are
# rounded once more, to 2**-9.
TOLERANCE = {"float32": 1e-6, "bfloat16": 3e-3, "float16": 5e-4}
on_every_backend = pytest.mark.parametrize("backend", [*BACKENDS, None])


def operands(
    num_rows: int, sizes: list[int], out: int, width: int, dtype: str = "float32", seed: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_rows, width), np.float32)
    weights = rng.standard_normal((len(sizes), width, out), np.float32)
    return jnp.asarray(rows, dtype), jnp.asarray(weights, dtype), jnp.asarray(sizes, jnp.int32)


def check(rows: jax.Array, weights: jax.Array, sizes: jax.Array, backend: Backend | None) -> None:
    result = _jitted(rows, weights, sizes, backend=backend)
    assert result.dtype == rows.dtype and result.shape == (rows.shape[0], weights.shape[2])
    got = np.asarray(result, np.float64)
    assert np.isfinite(got).all()
    group = np.repeat(np.arange(len(sizes)), sizes)
    matrices = np.asarray(weights, np.float64)[group]
    exact = np.einsum("ri,rio->ro", np.asarray(rows, np.float64)[: len(group)], matrices)
    error = np.linalg.norm(got[: len(group)] - exact, axis=1)
    assert (error <= TOLERANCE[rows.dtype.name] * np.linalg.norm(exact, axis=1)).all(), error


@functools.partial(jax.jit, static_argnames="backend")
def _jitted(*arrays: Any, backend: Any) -> jax.Array:
    return grouped_matmul(*arrays, backend=backend)


@on_every_backend
@pytest.mark.parametrize(
    ("num_rows", "sizes"),
    [
        (1, [0, 1, 0]),
        (3, [1, 0, 2]),
        (8, [0, 0, 0, 8, 0]),  # one group has all
        (11, [11]),
        (9, [0, 0, 0]),  # padding only
        (13, [2, 0, 5, 1]),  # padding at the end
        (7, [1] * 7),
        (150, [140, 3, 7]),
        (301, [0, 33, 64, 1, 0, 127, 65, 0]),
    ],
)
def test_against_float64(num_rows: int, sizes: list[int], backend: Backend | None) -> None:
    check(*operands(num_rows, sizes, 21, 37), backend)


@on_every_backend
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("num_rows", [5, 90])
def test_half_precision_is_summed_in_float32(num_rows: int, dtype: str, backend: Backend | None) -> None:
    check(*operands(num_rows, [num_rows - 3, 0, 2], 19, 300, dtype), backend)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(0, 10) | st.just(0), min_size=4, max_size=4),
    seed=st.integers(0, 99),
)
def test_any_sizes(sizes: list[int], seed: int) -> None:
    num_rows = 41  # one shape, so that it is compiled once
    check(*operands(num_rows, sizes, 5, 7, seed=seed), None)


@pytest.mark.parametrize("backend", ["tiles", None])
@pytest.mark.parametrize("num_rows", [4, 200])
def test_groups_without_rows_do_not_matter(num_rows: int, backend: Backend | None) -> None:
    rows, weights, sizes = operands(num_rows, [0, num_rows - 1, 0, 1], 6, 10)
    spoilt = weights.at[jnp.array([0, 2])].set(jnp.nan)
    check(rows, spoilt, sizes, backend)


@on_every_backend
@pytest.mark.parametrize("first", [0, 2, 3])
def test_groups_within_more_matrices(first: int, backend: Backend | None) -> None:
    rows, weights, sizes = operands(40, [0] * first + [30, 2] + [0] * (3 - first), 6, 10)
    run = functools.partial(grouped_matmul, backend=backend)
    got = jax.jit(run)(rows, weights, sizes[first : first + 2], first_group=jnp.int32(first))
    np.testing.assert_allclose(got[:32], _jitted(rows, weights, sizes, backend="reference")[:32], atol=1e-5)


@on_every_backend
def test_nothing_of_any_kind(backend: Backend | None) -> None:
    for num_rows, groups, out, width in ((0, 2, 3, 4), (2, 0, 3, 4), (2, 2, 0, 4), (2, 2, 3, 0)):
        result = grouped_matmul(
            jnp.ones((num_rows, width)), jnp.ones((groups, width, out)), jnp.zeros(groups, jnp.int32),
            backend=backend,
        )  # fmt: skip
        assert result.shape == (num_rows, out) and not result.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": jnp.ones(4)}, r"rows must be \[R, in\].*got \(4,\)"),
        ({"rows": jnp.ones((3, 5))}, r"got \(3, 5\) and \(2, 4, 6\)"),
        ({"weights": jnp.ones((4, 6))}, r"weights \[matrices, in, out\]"),
        ({"group_sizes": jnp.ones(3, jnp.int32)}, r"at most 2, the number of matrices; got \(3,\)"),
        ({"group_sizes": jnp.int32(3)}, r"got \(\)"),
        ({"group_sizes": jnp.ones(2)}, r"integers; got float32"),
        ({"weights": jnp.ones((2, 4, 6), jnp.bfloat16)}, r"got float32 and bfloat16"),
        ({"rows": jnp.ones((3, 4), int), "weights": jnp.ones((2, 4, 6), int)}, r"floating.*int32"),
        ({"backend": "cuda"}, r"backend='cuda' is not one of reference, tiles, xla"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {
        "rows": jnp.ones((3, 4)), "weights": jnp.ones((2, 4, 6)), "group_sizes": jnp.ones(2, jnp.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        grouped_matmul(**{**arguments, **change})


def test_shapes_by_hand() -> None:
    mixtral = EXPERTS["mixtral-8x7b"]
    assert mixtral.rows(3) == 6
    assert mixtral.flops(1) == 2 * 2 * 3 * 4096 * 14336  # two experts of three products

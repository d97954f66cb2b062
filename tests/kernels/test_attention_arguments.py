"""The op refuses what does not fit together, by name and value, before any backend sees it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.ragged_paged_attention import ragged_paged_attention


def _valid() -> tuple[list[Any], dict[str, Any]]:
    def zeros(*shape: int, dtype: Any = jnp.float32) -> jax.Array:
        return jnp.zeros(shape, dtype)

    arrays = [
        zeros(4, 4, 8),
        zeros(4, 2, 8),
        zeros(4, 2, 8),
        zeros(1, 5, 2, 4, 8),
        0,
        zeros(3, 2, dtype=jnp.int32),
        zeros(3, dtype=jnp.int32),
        zeros(4, dtype=jnp.int32),
    ]
    return arrays, {"scale": 1.0}


@pytest.mark.parametrize(
    ("index", "value", "message"),
    [
        (0, (4, 8), r"q must be \[T, heads, head_dim\]"),
        (0, (5, 4, 8), r"got \(5, 4, 8\), \(4, 2, 8\)"),
        (1, (4, 8), r"k and v alike"),
        (2, (4, 2, 9), r"\(4, 2, 9\)"),
        (0, (4, 3, 8), r"3 query heads cannot be shared evenly by 2 key-value heads"),
        (3, (1, 5, 2, 2, 8), r"2 \* kv_heads = 4 and head_dim = 8; got \(1, 5, 2, 2, 8\)"),
        (3, (1, 5, 2, 4, 9), r"got \(1, 5, 2, 4, 9\)"),
        (3, (5, 2, 4, 8), r"kv_pages must be"),
        (0, (4, 4, 9), r"head_dim = 9"),
        (6, (4,), r"page_table has 3 sequences"),
        (7, (3,), r"query_starts \[4\]; got \(3,\) and \(3,\)"),
        ("window", 0, r"window=0 must be at least 1"),
        ("window", -4, r"window=-4"),
        ("soft_cap", 0.0, r"soft_cap=0.0 must be positive"),
        ("sinks", jnp.zeros(3), r"sinks must be \[4\]; got \[3\]"),
        ("alibi_slopes", jnp.zeros((4, 1)), r"alibi_slopes must be \[4\]; got \[4, 1\]"),
        ("k_scale", jnp.ones(2), r"k_scale must be \[\]; got \[2\]"),
        ("v_scale", jnp.ones((1, 1)), r"v_scale must be \[\]"),
        ("span_ends", jnp.zeros(3, jnp.int32), r"span_ends must be \[4\]; got \[3\]"),
        ("span_ends", jnp.zeros(4), r"span_ends are positions, so integers; got float32"),
        ("tree_mask", jnp.ones((3, 2), bool), r"tree_mask must be \[4, D\] with D at least 1; got \[3, 2\]"),
        ("tree_mask", jnp.ones((4, 0), bool), r"got \[4, 0\]"),
        ("tree_mask", jnp.ones((4, 2)), r"tree_mask must be bool; got float32"),
        ("decode_only", True, r"4 rows and 3 sequences"),
        ("backend", "cuda", r"backend='cuda' is not one of reference, "),
    ],
)
def test_what_does_not_fit_is_refused(index: int | str, value: Any, message: str) -> None:
    arrays, options = _valid()
    if isinstance(index, int):
        arrays[index] = jnp.zeros(value, jnp.asarray(arrays[index]).dtype)
    else:
        options[index] = value
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention(*arrays, **options)


def test_spans_and_trees_exclude_each_other() -> None:
    arrays, options = _valid()
    masks = {"span_ends": jnp.zeros(4, jnp.int32), "tree_mask": jnp.ones((4, 2), bool)}
    with pytest.raises(ValueError, match="tree_mask and span_ends cannot be used together"):
        ragged_paged_attention(*arrays, **options, **masks)


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        (jnp.int8, r"int8 pages need k_scale and v_scale"),
        (jnp.int32, r"kv_pages are int32; a cache is one of"),
    ],
)
def test_pages_of_integers(dtype: Any, message: str) -> None:
    arrays, options = _valid()
    arrays[3] = arrays[3].astype(dtype)
    with pytest.raises(ValueError, match=message):
        ragged_paged_attention(*arrays, **options)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("backend", ["reference", "xla", "cpu"])
def test_what_fits_is_taken(backend: str, return_lse: bool) -> None:
    arrays, options = _valid()
    options |= {"backend": backend, "return_lse": return_lse}
    out, pages, *lse = jax.eval_shape(functools.partial(ragged_paged_attention, **options), *arrays)
    assert out.shape == (4, 4, 8) and pages.shape == arrays[3].shape
    assert [x.shape for x in lse] == ([(4, 4)] if return_lse else [])

"""Latent attention's Triton kernel against float64: in Triton's interpreter, or where there is a GPU
(`JAX_PLATFORMS=cuda`) on that. `test_triton.py` has it compiled for GPUs that need not be there.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.mla_ragged_paged_attention import triton
from pallas_kernels.mla_ragged_paged_attention.triton import Cut, Tiling
from pallas_kernels.ragged_paged_attention.options import AttentionOptions
from tests.kernels.latent_batches import Batch, Shape, check, random_batch

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton (pip install 'triton>=3.7')"
)

SMALL = Tiling(Cut(rows=16, keys=16), Cut(rows=32, keys=32))
SPLIT = Tiling(Cut(rows=16, keys=16, splits=4, pieces=3), Cut(rows=32, keys=16))

CASES: dict[str, tuple[Shape, Tiling]] = {
    "decodes": (Shape(6, 16, 8, 16, 6, 3, 3, decode_only=True), SMALL),
    "decodes, keys split, spare numbers": (Shape(4, 32, 16, 8, 30, 4, 4, decode_only=True, spare=5), SPLIT),
    "decodes, more heads than a tile has rows": (Shape(37, 16, 8, 64, 3, 2, 2, decode_only=True), SPLIT),
    "mixed": (Shape(6, 16, 8, 16, 8, 5, 60, longest=40), SMALL),
    "mixed, keys split": (Shape(3, 16, 8, 16, 10, 4, 60, longest=40), SPLIT),
    "mixed, odd widths, odd page, soft cap": (Shape(3, 7, 6, 3, 25, 3, 40, longest=30, soft_cap=5.0), SMALL),
    "mixed, float16": (Shape(4, 32, 16, 16, 8, 3, 40, longest=30, dtype=jnp.float16), SMALL),
    "mixed, bfloat16 pages of float32 queries": (
        Shape(4, 16, 8, 16, 8, 4, 40, cache_dtype=jnp.bfloat16),
        SMALL,
    ),
}


def run(batch: Batch, shape: Shape, tiling: Tiling | None) -> tuple[np.ndarray, ...]:
    launch = None
    if jax.default_backend() != "gpu":
        from tests.kernels.interpret_triton import launch_interpreted as launch
    attend = jax.jit(functools.partial(triton.attend, tiling=tiling, launch=launch))
    options = AttentionOptions(**shape.options)
    return tuple(np.asarray(x) for x in attend(*batch.operands, options))


@needs_triton
@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(name: str) -> None:
    shape, tiling = CASES[name]
    batch = random_batch(shape, seed=0, logit_size=(1.0, 8.0)[len(name) % 2])
    check(batch, shape, *run(batch, shape, tiling))


@needs_triton
def test_a_layer_of_deepseek_in_the_tiles_that_it_takes() -> None:
    shape = Shape(16, 512, 64, 64, 2, 2, 2, decode_only=True)
    batch = random_batch(shape, 0, 1.0, [(90, 1), (5, 1)])
    check(batch, shape, *run(batch, shape, None))


@needs_triton
@pytest.mark.parametrize("tiling", [SMALL, SPLIT], ids=["whole", "split"])
def test_an_empty_batch_leaves_the_cache_alone(tiling: Tiling) -> None:
    shape = Shape(4, 16, 8, 16, 4, 4, 4, decode_only=True)
    full = random_batch(shape, 0, 1.0)
    batch = replace(full, seq_lens=np.zeros(4, np.int32), query_starts=np.zeros(5, np.int32))
    batch.latent[:] = batch.k_rope[:] = np.nan
    check(batch, shape, *run(batch, shape, tiling))


def _changed(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Batch], Batch]:
    return lambda batch: replace(batch, **{name: change(np.asarray(getattr(batch, name)))})


# Without a window, pages in another order would give the same sum.
_ONE_PAGE_TWICE = [0, 2, *range(2, 10)]
MISTAKES = {
    "scale": _changed("q_latent", lambda q: q * np.float32(1.0005)),
    "scale of the rotated part": _changed("q_rope", lambda q: q * np.float32(1.001)),
    "page": _changed("page_table", lambda table: table[:, _ONE_PAGE_TWICE]),
    "causal": _changed("query_starts", lambda starts: starts - (np.arange(len(starts)) == 3)),
}


@needs_triton
@pytest.mark.parametrize("mistake", MISTAKES)
def test_the_check_catches(mistake: str) -> None:
    shape = Shape(2, 16, 8, 8, 10, 3, 40)
    batch = random_batch(shape, 0, 1.0, [(25, 3), (33, 2), (40, 30)])
    with pytest.raises(AssertionError):
        check(batch, shape, *run(MISTAKES[mistake](batch), shape, SMALL))


@pytest.mark.parametrize(
    ("rank", "rope_dim", "scale", "message"),
    [
        (
            513,
            8,
            1.0,
            r"latents of up to 512 and .* got 513 and 8\. Use backend",
        ),
        (16, 65, 1.0, r"got 16 and 65"),
        (16, 8, 0.0, r"positive scale; got 0\.0"),
    ],
)
def test_what_it_cannot_do_is_refused(rank: int, rope_dim: int, scale: float, message: str) -> None:
    batch = random_batch(Shape(2, rank, rope_dim, 4, 2, 2, 2, decode_only=True), 0, 1.0)
    with pytest.raises(ValueError, match=message):
        triton.attend(*batch.operands, AttentionOptions(scale=scale, decode_only=True))

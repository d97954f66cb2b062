"""Latent attention's GPU kernel against float64, in the Mosaic GPU interpreter with race detection, or where
there is a GPU (`JAX_PLATFORMS=cuda`) on that. `test_gpu_compiled.py` has it compiled for Hopper.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention.options import AttentionOptions
from tests.kernels.latent_batches import Batch, Shape, check, oracle, random_batch

gpu = pytest.importorskip("pallas_kernels.mla_ragged_paged_attention.gpu", exc_type=ImportError)
interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX interprets Mosaic GPU kernels from 0.11 on"
)

Latent = functools.partial(Shape, rank=128, rope_dim=64, dtype=jnp.bfloat16)
Decodes = functools.partial(Latent, decode_only=True)
WHOLE = gpu.Tiling(gpu.Cut(), gpu.Cut())
SPLIT = gpu.Tiling(gpu.Cut(splits=4, pieces=3), gpu.Cut(stages=1))

CASES: dict[str, tuple[Shape, Any]] = {
    "decodes": (Decodes(6, page_size=64, pages_per_seq=4, num_seqs=2, num_tokens=2, spare=8), WHOLE),
    "decodes, keys split": (Decodes(5, page_size=16, pages_per_seq=20, num_seqs=3, num_tokens=3), SPLIT),
    "decodes, more heads than a tile has rows": (
        Decodes(70, page_size=128, pages_per_seq=2, num_seqs=2, num_tokens=2, dtype=jnp.float16),
        SPLIT,
    ),
    "mixed, soft cap": (
        Latent(3, page_size=8, pages_per_seq=20, num_seqs=3, num_tokens=50, longest=40, soft_cap=5.0),
        SPLIT,
    ),
}


def run(batch: Batch, shape: Shape, tiling: Any) -> tuple[np.ndarray, ...]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    interpret = None if jax.default_backend() == "gpu" else plgpu.InterpretGPUParams(detect_races=True)
    attend = jax.jit(functools.partial(gpu.attend, tiling=tiling, interpret=interpret))
    return tuple(np.asarray(x) for x in attend(*batch.operands, AttentionOptions(**shape.options)))


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(name: str) -> None:
    shape, tiling = CASES[name]
    batch = random_batch(shape, seed=0, logit_size=(1.0, 8.0)[len(name) % 2])
    check(batch, shape, *run(batch, shape, tiling))


@interpreted
def test_an_empty_batch_leaves_the_cache_alone() -> None:
    shape = Decodes(6, page_size=64, pages_per_seq=4, num_seqs=2, num_tokens=2)
    full = random_batch(shape, 0, 1.0)
    batch = replace(full, seq_lens=np.zeros(2, np.int32), query_starts=np.zeros(3, np.int32))
    batch.latent[:] = batch.k_rope[:] = np.nan
    out, cache, _ = run(batch, shape, WHOLE)
    check(batch, replace(shape, lse=False), out, cache)


@interpreted
@pytest.mark.parametrize("name", ["page_table", "q_rope"])
def test_the_check_catches_a_wrong_page_and_a_wrong_scale(name: str) -> None:
    shape = Decodes(4, page_size=16, pages_per_seq=10, num_seqs=2, num_tokens=2)
    batch = random_batch(shape, 0, 1.0, [(99, 1), (150, 1)])
    # Without a window, pages in another order would give the same sum.
    wrong = batch.page_table[:, [0, 2, *range(2, 10)]] if name == "page_table" else batch.q_rope * 1.1
    out, _, lse = run(replace(batch, **{name: wrong.astype(getattr(batch, name).dtype)}), shape, WHOLE)
    with pytest.raises(AssertionError, match="relative error"):
        check(batch, shape, out, oracle(batch, shape)[1], lse)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": jnp.float32}, r"q_latent is float32 and pages are float32\. Use backend='xla'"),
        ({"cache_dtype": jnp.float16}, r"pages are float16"),
        ({"rank": 64}, r"of 128, 256, 384 or 512 .* got 64, 128 and 128"),
        ({"rope_dim": 32}, r"got 128, 160 and 160"),
        ({"page_size": 4}, r"page_size of 8, 16 or 32, or a multiple of 64; got 4"),
    ],
)
def test_what_it_cannot_do_is_refused(change: dict[str, Any], message: str) -> None:
    shape = replace(Decodes(4, page_size=16, pages_per_seq=4, num_seqs=2, num_tokens=2), **change)
    batch = random_batch(shape, 0, 1.0)
    with pytest.raises(ValueError, match=message):
        gpu.attend(*batch.operands, AttentionOptions(scale=1.0, decode_only=True))

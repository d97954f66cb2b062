"""The GPU kernel against float64, in the Mosaic GPU interpreter with race detection, or where there is a GPU
(`JAX_PLATFORMS=cuda`) on that; its schedule alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.ragged_paged_attention import gpu, gpu_schedule, gpu_tiles
from pallas_kernels.ragged_paged_attention.gpu_schedule import Cut
from pallas_kernels.ragged_paged_attention.options import AttentionOptions
from tests.kernels.oracle import TOLERANCE, check, oracle
from tests.kernels.ragged_batches import Batch, Shape, options_of, random_batch

interpreted = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX interprets Mosaic GPU kernels from 0.11 on"
)

Decodes = functools.partial(Shape, dtype=jnp.bfloat16, decode_only=True, lse=True)
Mixed = functools.partial(Shape, dtype=jnp.bfloat16, lse=True)
TWO_TILES = Cut(pairs=2)
SPLIT = Cut(pairs=2, splits=4, pieces=3)
WIDE = Cut(warpgroups=2, keys=128)

CASES: dict[str, tuple[Shape, Cut]] = {
    "decodes": (Decodes(8, 2, 64, 16, 20, 3, 3), TWO_TILES),
    "decodes, keys split": (Decodes(8, 2, 64, 64, 8, 4, 4), SPLIT),
    "decodes, one head": (Decodes(4, 1, 128, 16, 20, 3, 3), SPLIT),
    "decodes, odd number of pairs": (Decodes(3, 3, 32, 32, 6, 3, 3), TWO_TILES),
    "decodes, one to a thread block": (Decodes(4, 2, 256, 16, 8, 2, 2), Cut(splits=3, pieces=2)),
    "decodes, more heads than a tile has rows": (Decodes(71, 1, 16, 64, 3, 2, 2), SPLIT),
    "decodes, all options": (
        Decodes(6, 3, 64, 16, 20, 4, 4, window=150, sinks=True, soft_cap=5.0, alibi=True),
        SPLIT,
    ),
    "decodes, float16": (Decodes(8, 2, 64, 16, 10, 2, 2, dtype=jnp.float16), SPLIT),
    "mixed": (Mixed(6, 2, 64, 16, 20, 4, 100, longest=60), WIDE),
    "mixed, keys split": (Mixed(6, 2, 64, 16, 20, 4, 60, longest=60), SPLIT),
    "mixed, window": (Mixed(4, 2, 64, 8, 50, 4, 80, longest=60, window=70), WIDE),
    "mixed, sinks and spans": (Mixed(6, 2, 64, 32, 10, 4, 80, longest=60, sinks=True, spans=True), WIDE),
    "mixed, ALiBi and soft cap": (Mixed(4, 2, 64, 128, 3, 3, 60, longest=40, alibi=True, soft_cap=9.0), WIDE),
    "mixed, head_dim 80, page of 256": (Mixed(4, 2, 80, 256, 2, 3, 40, longest=30), WIDE),
    "decodes, float8 pages": (
        Decodes(8, 2, 128, 16, 20, 3, 3, cache_dtype=jnp.float8_e4m3fn),
        replace(SPLIT, stages=1),
    ),
    "decodes, float8_e5m2 pages, float16": (
        Decodes(4, 2, 64, 64, 5, 3, 3, cache_dtype=jnp.float8_e5m2, dtype=jnp.float16, sinks=True),
        TWO_TILES,
    ),
    "mixed, int8 pages": (Mixed(6, 2, 64, 32, 10, 3, 60, longest=60, cache_dtype=jnp.int8), WIDE),
    "mixed, trees": (Mixed(4, 2, 64, 16, 12, 5, 60, longest=20, tree_width=12, sinks=True), WIDE),
    "mixed, wide trees, window": (
        Mixed(2, 1, 64, 8, 20, 3, 120, longest=80, tree_width=60, window=30),
        WIDE,
    ),
    "mixed, head_dim 256": (Mixed(2, 1, 256, 64, 4, 3, 80, longest=60), Cut(warpgroups=2)),
}


def run(batch: Batch, shape: Shape, cut: Cut) -> tuple[np.ndarray, ...]:
    from jax.experimental.pallas import mosaic_gpu as plgpu

    # A cut is for the sequences of few queries or for the others, by its width.
    tiling = gpu.Tiling(cut, WIDE) if cut.warpgroups == 1 else gpu.Tiling(SPLIT, cut)
    interpret = None if jax.default_backend() == "gpu" else plgpu.InterpretGPUParams(detect_races=True)
    attend = jax.jit(functools.partial(gpu.attend, tiling=tiling, interpret=interpret))
    return tuple(np.asarray(x) for x in attend(*batch.operands, options_of(batch, shape)))


@interpreted
@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(name: str) -> None:
    shape, cut = CASES[name]
    batch = random_batch(shape, seed=0, logit_size=(1.0, 8.0)[len(name) % 2])
    check(batch, shape, *run(batch, shape, cut))


@interpreted
@pytest.mark.parametrize("cut", [SPLIT, TWO_TILES, WIDE], ids=str)
def test_empty_batch_leaves_the_cache_alone(cut: Cut) -> None:
    shape = Decodes(4, 2, 64, 16, 4, 4, 4)
    full = random_batch(shape, 0, 1.0)
    batch = replace(full, seq_lens=np.zeros(4, np.int32), query_starts=np.zeros(5, np.int32))
    batch = replace(batch, k=np.full_like(full.k, np.nan), v=np.full_like(full.v, np.nan))
    out, cache, _ = run(batch, shape, cut)
    check(batch, replace(shape, lse=False), out, cache)


@interpreted
@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_extreme_logits_stay_finite(size: float) -> None:
    shape = Mixed(4, 2, 64, 16, 10, 3, 40, longest=30)
    batch = random_batch(shape, 3, size)
    out, _, _ = run(batch, shape, WIDE)
    assert np.isfinite(out.astype(np.float32)).all()
    if size < 1:
        exact, _, _ = oracle(batch, shape)
        real = batch.query_starts[-1]
        error = np.linalg.norm(out[:real].astype(np.float64) - exact[:real])
        assert error <= TOLERANCE[shape.dtype] * np.linalg.norm(exact[:real])


def _shift(cut: Callable[..., Any], column: str, by: int) -> Callable[..., Any]:
    def shifted(*args: Any, **options: Any) -> Any:
        tiles = cut(*args, **options)
        return tiles._replace(**{column: getattr(tiles, column) + by})

    return shifted


SOME_SHORT = [(25, 3), (33, 9), (47, 12)]
ONE_LONG = [(0, 0), (0, 0), (40, 39)]


@interpreted
@pytest.mark.parametrize(
    ("cut", "column", "by"),
    [
        ("cut_short", "begin", 1),
        ("cut_short", "end", -1),
        ("cut_long", "begin", -1),
        ("cut_long", "end", 1),
        ("cut_long", "position", 1),
    ],
)
def test_the_check_catches(cut: str, column: str, by: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Mixed(2, 1, 64, 8, 10, 3, 40, window=9, alibi=column == "position")
    batch = random_batch(shape, 0, 1.0, SOME_SHORT if cut == "cut_short" else ONE_LONG)
    monkeypatch.setattr(gpu_tiles, cut, _shift(getattr(gpu_tiles, cut), column, by))
    with pytest.raises(AssertionError):
        check(batch, shape, *run(batch, shape, WIDE))


@interpreted
@pytest.mark.parametrize("lengths", [SOME_SHORT, ONE_LONG], ids=["short", "long"])
def test_the_check_catches_pages_in_the_wrong_order(lengths: list[tuple[int, int]]) -> None:
    shape = Mixed(2, 1, 64, 8, 10, 3, 40, window=20, alibi=True)
    batch = random_batch(shape, 0, 1.0, lengths)
    wrong = batch.page_table.copy()
    wrong[2, [3, 4]] = wrong[2, [4, 3]]
    with pytest.raises(AssertionError, match="relative error"):
        check(batch, shape, *run(replace(batch, page_table=wrong), shape, WIDE))


@settings(max_examples=15)
@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 900), st.integers(0, 9) | st.integers(0, 200)), min_size=1, max_size=6
    ),
    group=st.sampled_from([3, 71]),
    window=st.none() | st.integers(1, 300),
    page_size=st.sampled_from([8, 64, 256]),
    cut=st.builds(
        Cut,
        warpgroups=st.sampled_from([1, 2]),
        keys=st.sampled_from([64, 128]),
        # These make shapes, too.
        splits=st.sampled_from([0, 1, 7]),
        pieces=st.sampled_from([1, 3, 9]),
    ),
)
def test_every_row_meets_each_of_its_keys_once(
    lengths: list[tuple[int, int]], group: int, window: int | None, page_size: int, cut: Cut
) -> None:
    # One shape of all batches, since every shape is compiled.
    lengths = [(cached if new else 0, new) for cached, new in [*lengths, *[(0, 0)] * (6 - len(lengths))]]
    new = np.array([n for _, n in lengths])
    seq_lens = jnp.asarray([sum(length) for length in lengths], jnp.int32)
    query_starts = jnp.asarray(np.concatenate([[0], np.cumsum(new)]), jnp.int32)
    batch = 6 * 200 + 3, seq_lens, query_starts, group, AttentionOptions(scale=1.0, window=window)
    short = np.asarray(gpu_schedule.is_short(query_starts, group))
    assert short[new <= 1].all()
    for tiles, rows, mine in (
        (gpu_schedule.cut_short(64, *batch), 64, short),
        (gpu_schedule.cut_long(cut.rows, *batch), cut.rows, ~short),
    ):
        tiles, work = jax.tree.map(np.asarray, (tiles, gpu_schedule.cut_keys(tiles, cut, page_size)))
        check_schedule(tiles, work, np.where(mine, new, 0), rows, cut, page_size)
        tokens = np.flatnonzero(np.repeat(mine, new))
        seen = np.stack([tiles.token[tiles.used], tiles.group_head[tiles.used]], axis=-1)
        expected = np.stack(np.meshgrid(tokens, np.arange(group), indexing="ij"), axis=-1)
        np.testing.assert_array_equal(np.unique(seen.reshape(-1, 2), axis=0), expected.reshape(-1, 2))
        for s in np.flatnonzero(mine & (new > 0)):
            assert tiles.sequence[tiles.first[s]] == s and tiles.used[tiles.first[s]]


def check_schedule(
    tiles: gpu_schedule.Tiles,
    work: gpu_schedule.Work,
    new: np.ndarray,
    rows: int,
    cut: Cut,
    page_size: int,
) -> None:
    """Each used tile has its keys in pieces that follow on each other, and nothing else has work."""
    group = int(tiles.group_head.max()) + 1
    assert tiles.used.sum() == sum(-(-n * group // rows) for n in new)
    for tile in np.flatnonzero(tiles.used):
        first = work.first[tile]
        items = work.items[first : first + work.pieces[tile]]
        assert 1 <= len(items) <= max(1, cut.pieces)
        assert (items[:, gpu_schedule.TILE] == tile).all()
        assert (items[:, gpu_schedule.SEQUENCE] == tiles.sequence[tile]).all()
        assert (items[:, gpu_schedule.PIECE] == np.arange(len(items))).all()
        starts, stops = items[:, gpu_schedule.START], items[:, gpu_schedule.STOP]
        assert (starts[1:] == stops[:-1]).all() and (starts < stops).all()
        assert starts[0] <= tiles.begin[tile].min() and stops[-1] == tiles.end[tile].max()
        assert (starts % min(cut.keys, page_size) == 0).all()
        assert starts[0] // page_size == tiles.begin[tile].min() // page_size
        for start, full, full_stop in zip(
            starts, items[:, gpu_schedule.FULL_START], items[:, gpu_schedule.FULL_STOP], strict=True
        ):
            if full < full_stop:
                assert start + full * cut.keys >= tiles.begin[tile].max()
                assert start + full_stop * cut.keys <= tiles.end[tile].min()
    idle = np.ones(len(work.items), bool)
    for tile in np.flatnonzero(tiles.used):
        idle[work.first[tile] : work.first[tile] + work.pieces[tile]] = False
    assert (work.items[idle][:, gpu_schedule.START] == work.items[idle][:, gpu_schedule.STOP]).all()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"dtype": jnp.float32}, {}, r"q is float32\. Use backend='xla'"),
        ({"cache_dtype": jnp.float32}, {}, r"kv_pages are float32"),
        ({"head_dim": 72}, {}, r"multiple of 16 up to 256; got 72"),
        ({"head_dim": 272}, {}, r"up to 256; got 272"),
        ({"page_size": 4}, {}, r"page_size of 8, 16 or 32, or a multiple of 64; got 4"),
        ({"page_size": 96}, {}, r"got 96"),
        ({}, {"tree_mask": jnp.ones((4, 65), bool)}, r"up to 64 tokens; tree_mask has 65 columns"),
    ],
)
def test_what_it_cannot_do_is_refused(change: dict[str, Any], options: dict[str, Any], message: str) -> None:
    batch = random_batch(replace(Decodes(4, 2, 64, 16, 4, 4, 4), **change), 0, 1.0)
    with pytest.raises(ValueError, match=message):
        gpu.attend(*batch.operands, AttentionOptions(scale=1.0, decode_only=True, **options))

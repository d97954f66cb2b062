"""The TPU kernel in the TPU interpreter, races detected: ragged batches against float64, cache exactly."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention import tpu, tpu_flash, tpu_rows
from pallas_kernels.ragged_paged_attention.tpu_work import Tiling
from tests.kernels.oracle import check
from tests.kernels.ragged_batches import Batch, Shape, options_of, random_batch

# It runs on JAX 0.10, too; one lane of two is enough for what takes minutes.
pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="interpreted on JAX 0.11 and newer")

# (tokens in the cache, new tokens) of each sequence.
RAGGED = [(20, 1), (0, 0), (0, 37), (5, 19), (0, 1), (40, 2), (0, 0)]
DECODES = [(20, 1), (0, 1), (47, 1), (15, 1), (16, 1), (0, 0), (0, 0)]
LONG = [(300, 20), (0, 1), (511, 1)]
SMALL = Tiling(queries=16, keys=16)


def mixed(heads: int = 4, kv_heads: int = 2, head_dim: int = 16, page_size: int = 8, **options: Any) -> Shape:
    """A shape that holds RAGGED, and some padding."""
    return Shape(heads, kv_heads, head_dim, page_size, 64 // page_size, 7, 63, **{"lse": True, **options})


def decodes(head_dim: int = 16, **options: Any) -> Shape:
    """A shape that holds DECODES."""
    return Shape(4, 2, head_dim, 8, 8, 7, 7, decode_only=True, **options)


EVERYTHING = {"window": 13, "soft_cap": 5.0, "sinks": True, "alibi": True, "lse": True}
CASES: dict[str, tuple[Shape, Tiling]] = {
    "mixed": (mixed(), SMALL),
    "mixed, no log-sum-exp": (mixed(lse=False), SMALL),
    "one key-value head": (mixed(3, 1), SMALL),
    "no groups": (mixed(2, 2), SMALL),
    "odd head_dim": (mixed(head_dim=7), SMALL),
    "page of sixteen, block of two pages": (mixed(page_size=16), Tiling(16, 32)),
    "block of one page": (mixed(), Tiling(16, 8)),
    "one block for all": (mixed(), Tiling(16, 64)),
    "tall tiles": (mixed(), Tiling(32, 16)),
    "head_dim 64, keys and values side by side": (mixed(head_dim=64), SMALL),
    "head_dim 32, two heads side by side": (mixed(8, 4, 32), SMALL),
    "head_dim 128": (mixed(head_dim=128), SMALL),
    "head_dim 256": (mixed(2, 1, 256), SMALL),
    "window": (mixed(window=11), SMALL),
    "window of one": (mixed(window=1), SMALL),
    "soft cap": (mixed(soft_cap=3.0), SMALL),
    "sinks": (mixed(sinks=True), SMALL),
    "alibi": (mixed(alibi=True), SMALL),
    "spans": (mixed(spans=True), SMALL),
    "spans in a window": (mixed(spans=True, window=9), SMALL),
    "tree": (mixed(tree_width=20), SMALL),
    "wide tree in a window": (mixed(tree_width=37, window=21, alibi=True), SMALL),
    "everything": (mixed(**EVERYTHING), SMALL),
    "decodes": (decodes(), Tiling(1, 16)),
    "decodes, window": (decodes(window=9), Tiling(1, 16)),
    "decodes, everything": (decodes(**EVERYTHING), Tiling(1, 16)),
    "decodes, bfloat16, head_dim 64": (decodes(64, dtype=jnp.bfloat16), Tiling(1, 16)),
    "bfloat16": (mixed(dtype=jnp.bfloat16), SMALL),
    "bfloat16, eight key-value heads": (mixed(8, 8, dtype=jnp.bfloat16), SMALL),
    "int8 pages": (mixed(cache_dtype=jnp.int8), SMALL),
    "float8 pages": (mixed(dtype=jnp.bfloat16, cache_dtype=jnp.float8_e4m3fn), SMALL),
    "bfloat16 pages, float32 queries": (mixed(cache_dtype=jnp.bfloat16), SMALL),
    "blocks of 256 keys": (Shape(4, 2, 16, 64, 8, 3, 25, lse=True), Tiling(16, 256)),
    "decodes, blocks of 256 keys, sinks": (
        Shape(4, 2, 16, 64, 8, 3, 3, decode_only=True, sinks=True, lse=True), Tiling(1, 256),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _interpreter() -> Iterator[None]:
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    pltpu.reset_tpu_interpret_mode_state()


def batch_of(shape: Shape, seed: int = 0, logit_size: float = 1.0) -> Batch:
    lengths = {7: DECODES if shape.decode_only else RAGGED, 3: LONG}[shape.num_seqs]
    if shape.decode_only:
        lengths = [(cached, min(new, 1)) for cached, new in lengths]
    return random_batch(shape, seed, logit_size, lengths)


def run(batch: Batch, shape: Shape, tiling: Tiling) -> tuple[np.ndarray, ...]:
    results = jax.jit(functools.partial(tpu.attend, tiling=tiling))(*batch.operands, options_of(batch, shape))
    return tuple(np.asarray(result) for result in results)[: 3 if shape.lse else 2]


@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(name: str) -> None:
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    shape, tiling = CASES[name]
    batch = batch_of(shape, logit_size=(1.0, 8.0)[len(name) % 2])
    check(batch, shape, *run(batch, shape, tiling))
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("logit_size", [0.01, 20.0])
@pytest.mark.parametrize("name", ["mixed", "decodes, everything"])
def test_small_and_large_logits(name: str, logit_size: float) -> None:
    shape, tiling = CASES[name]
    batch = batch_of(shape, 1, logit_size)
    check(batch, shape, *run(batch, shape, tiling))


@pytest.mark.parametrize("decode_only", [False, True])
def test_empty_batch_leaves_the_cache_alone(decode_only: bool) -> None:
    shape, tiling = (decodes(), Tiling(1, 16)) if decode_only else (mixed(lse=False), SMALL)
    full = batch_of(shape)
    batch = replace(full, seq_lens=np.zeros(7, np.int32), query_starts=np.zeros(8, np.int32))
    batch = replace(batch, k=np.full_like(full.k, np.nan), v=np.full_like(full.v, np.nan))
    check(batch, shape, *run(batch, shape, tiling))


@pytest.mark.parametrize(
    ("shape", "tiling", "message"),
    [
        (mixed(), Tiling(5, 16), r"queries=5.*1 query or a multiple of 16"),
        (mixed(), Tiling(16, 12), r"keys=12.*whole pages of 8"),
        (mixed(dtype=jnp.float16), SMALL, r"no float16"),
    ],
)
def test_what_it_cannot_do_is_refused(shape: Shape, tiling: Tiling, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(batch_of(shape), shape, tiling)


def test_a_table_of_too_many_pages_is_refused() -> None:
    shape = mixed()
    batch = batch_of(shape)
    wide = np.pad(batch.page_table, ((0, 0), (0, 2**16 - 7)))
    with pytest.raises(ValueError, match=r"65537 pages a sequence.*65536; use larger pages"):
        run(replace(batch, page_table=wide), shape, SMALL)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_mask_off_by_one_is_caught(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tpu_flash.FlashTile._visible

    def wrong(self: Any, *arguments: Any) -> tuple[jax.Array, jax.Array]:
        distance, _ = right(self, *arguments)
        return distance, distance >= shift

    monkeypatch.setattr(tpu_flash.FlashTile, "_visible", wrong)
    shape, tiling = CASES["mixed"]
    batch = batch_of(shape)
    with pytest.raises(AssertionError):
        check(batch, shape, *run(batch, shape, tiling))


@pytest.mark.parametrize("mistake", ["scale", "window", "page"])
def test_a_wrong_argument_is_caught(mistake: str) -> None:
    shape, tiling = CASES["window"]
    batch = batch_of(shape)
    given, asked = batch, shape
    if mistake == "scale":
        given = replace(batch, q=batch.q * np.float32(1.0005))
    elif mistake == "window":
        asked = replace(shape, window=12)
    else:
        table = batch.page_table.copy()
        table[5, [3, 4]] = table[5, [4, 3]]
        given = replace(batch, page_table=table)
    with pytest.raises(AssertionError, match="relative error"):
        check(batch, shape, *run(given, asked, tiling))


def test_a_query_of_a_tree_that_sees_nothing_gives_zero() -> None:
    shape = Shape(2, 1, 8, 4, 12, 4, 24, tree_width=5, lse=True)
    batch = random_batch(shape, 0, 1.0, [(10, 5), (10, 6), (0, 4), (0, 1)])
    assert batch.tree_mask is not None
    tree_mask = batch.tree_mask.copy()
    tree_mask[batch.query_starts[2] :] = False
    batch = replace(batch, tree_mask=tree_mask)
    check(batch, shape, *run(batch, shape, SMALL))


class InMemory:
    """A ref with the views that interpreters lack; as on the chip, two rows share words of 32 bits."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array
        self.shape = array.shape
        self.at = self

    def bitcast(self, dtype: Any) -> InMemory:
        assert dtype == jnp.uint32 and self.array.itemsize == 2
        low, high = self.array[:, ::2].view(np.uint16), self.array[:, 1::2].view(np.uint16)
        return InMemory(low.astype(np.uint32) | high.astype(np.uint32) << 16)

    def reshape(self, *shape: int) -> InMemory:
        return InMemory(self.array.reshape(shape))

    def __getitem__(self, place: pl.Slice) -> Any:
        part = self.array[place.start : place.start + place.size * place.stride : place.stride]
        return InMemory(part) if place.stride == 1 else jnp.asarray(part)


@pytest.mark.parametrize("rows", [4, 8, 16])
def test_words_are_taken_apart_into_rows(rows: int) -> None:
    block = np.random.default_rng(rows).standard_normal((32, rows, 128)).astype(jnp.bfloat16)
    found = list(tpu_rows.by_word(InMemory(block), jnp.int32(8), 8))
    assert len(found) == rows
    for row, values in enumerate(found):
        np.testing.assert_array_equal(np.asarray(values), block[8:16, row])

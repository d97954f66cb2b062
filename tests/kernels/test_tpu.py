"""The TPU kernel in the TPU interpreter, races detected: ragged batches against float64, cache exactly."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ragged_paged_attention import tpu, tpu_flash
from pallas_kernels.ragged_paged_attention.options import AttentionOptions
from tests.kernels.backends import BackendUnderTest
from tests.kernels.ragged_batches import Shape, random_batch

# It runs on JAX 0.10, too; one lane of two is enough for what takes minutes.
pytestmark = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="interpreted on JAX 0.11 and newer")

TOLERANCE = {"float32": 5e-6, "bfloat16": 4e-3}


@dataclass(frozen=True)
class Case:
    """(context, new tokens) of each sequence, and what the op is asked for."""

    sequences: tuple[tuple[int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    page_size: int = 8
    pages_per_seq: int = 8
    padding: int = 3
    dtype: str = "float32"
    cache_dtype: str | None = None
    queries: int = 16
    keys: int = 16
    decode_only: bool = False
    logit_size: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)


RAGGED = ((20, 1), (0, 0), (0, 37), (5, 19), (0, 1), (40, 2), (0, 0))
DECODES = ((20, 1), (0, 1), (47, 1), (15, 1), (16, 1), (0, 0), (0, 0))

CASES = {
    "ragged": Case(RAGGED),
    "small logits": Case(RAGGED, logit_size=0.01),
    "large logits": Case(RAGGED, logit_size=8.0),
    "one key-value head": Case(RAGGED, heads=3, kv_heads=1),
    "no groups": Case(RAGGED, heads=2, kv_heads=2),
    "odd head_dim": Case(RAGGED, head_dim=7),
    "page of sixteen, block of two pages": Case(RAGGED, page_size=16, keys=32),
    "block of one page": Case(RAGGED, keys=8),
    "one block for all": Case(RAGGED, keys=64),
    "head_dim 64, keys and values side by side": Case(RAGGED, head_dim=64),
    "head_dim 32, two heads side by side": Case(RAGGED, heads=8, kv_heads=4, head_dim=32),
    "head_dim 128": Case(RAGGED, head_dim=128),
    "head_dim 256": Case(RAGGED, heads=2, kv_heads=1, head_dim=256),
    "blocks of 256 keys": Case(((300, 20), (0, 1), (511, 1)), page_size=64, keys=256),
    "blocks of 256 keys, sinks": Case(
        ((300, 1), (0, 1), (511, 1)),
        page_size=64,
        keys=256,
        decode_only=True,
        padding=0,
        options={"sinks": True, "return_lse": True},
    ),
    "tall and short tiles": Case(((9, 35), (30, 1), (0, 33), (3, 1)), queries=32),
    "window": Case(RAGGED, options={"window": 11}),
    "window of one": Case(RAGGED, options={"window": 1}),
    "soft cap": Case(RAGGED, logit_size=4.0, options={"soft_cap": 3.0}),
    "sinks": Case(RAGGED, options={"sinks": True, "return_lse": True}),
    "alibi": Case(RAGGED, options={"alibi_slopes": True}),
    "log-sum-exp": Case(RAGGED, options={"return_lse": True}),
    "spans": Case(RAGGED, options={"span_ends": True}),
    "spans in a window": Case(RAGGED, options={"span_ends": True, "window": 9, "return_lse": True}),
    "tree": Case(RAGGED, options={"tree_mask": 20, "return_lse": True}),
    "wide tree in a window": Case(RAGGED, options={"tree_mask": 37, "window": 21, "alibi_slopes": True}),
    "everything": Case(
        RAGGED,
        options={"window": 13, "soft_cap": 5.0, "sinks": True, "alibi_slopes": True, "return_lse": True},
    ),
    "decodes": Case(DECODES, decode_only=True, padding=0),
    "decodes, window": Case(DECODES, decode_only=True, padding=0, options={"window": 9}),
    "decodes, everything": Case(
        DECODES,
        decode_only=True,
        padding=0,
        options={"window": 17, "soft_cap": 5.0, "sinks": True, "alibi_slopes": True, "return_lse": True},
    ),
    "nothing": Case(((0, 0), (0, 0)), padding=5),
    "nothing to decode": Case(((0, 0), (0, 0)), decode_only=True, padding=2),
    "bfloat16": Case(RAGGED, dtype="bfloat16"),
    "bfloat16, eight key-value heads": Case(RAGGED, heads=8, kv_heads=8, dtype="bfloat16"),
    "bfloat16 decodes, head_dim 64": Case(
        DECODES, head_dim=64, decode_only=True, padding=0, dtype="bfloat16"
    ),
    "bfloat16 decodes": Case(DECODES, decode_only=True, padding=0, dtype="bfloat16"),
    "int8 pages": Case(RAGGED, cache_dtype="int8", options={"k_scale": 0.03, "v_scale": 0.02}),
    "float8 pages": Case(
        RAGGED, cache_dtype="float8_e4m3fn", dtype="bfloat16", options={"k_scale": 0.5, "v_scale": 2.0}
    ),
    "bfloat16 pages, float32 queries": Case(RAGGED, cache_dtype="bfloat16"),
}


@dataclass(frozen=True)
class Batch:
    arrays: dict[str, Any]
    options: AttentionOptions
    layer: int
    num_new: int


def make_batch(case: Case, seed: int) -> Batch:
    """Random numbers, and NaN wherever nothing may be read: other layers, unused slots, padding."""
    rng = np.random.default_rng(seed)
    num_seqs = len(case.sequences)
    num_new = sum(new for _, new in case.sequences)
    num_tokens = num_new + case.padding

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(case.dtype)

    kv_shape = (num_tokens, case.kv_heads, case.head_dim)
    k, v = normal(*kv_shape), normal(*kv_shape)
    k[num_new:] = v[num_new:] = np.nan
    num_pages = num_seqs * case.pages_per_seq + 2
    cache_dtype = jnp.dtype(case.cache_dtype or case.dtype)
    shape = (3, num_pages, case.page_size, 2 * case.kv_heads, case.head_dim)
    # int8 has no NaN: numbers that would be seen if they were read.
    kv_pages = np.full(shape, 77 if cache_dtype == np.int8 else np.nan).astype(cache_dtype)
    layer = 1
    table = rng.choice(np.array([-1, 10**9], np.int32), (num_seqs, case.pages_per_seq))
    free = list(rng.permutation(np.arange(1, num_pages)))
    for s, (context, new) in enumerate(case.sequences):
        for p in range(-(-(context + new) // case.page_size)):
            table[s, p] = free.pop()
        for t in range(context):
            slot = kv_pages[layer, table[s, t // case.page_size], t % case.page_size]
            if cache_dtype == np.int8:
                slot[...] = rng.integers(-128, 128, slot.shape)
            else:
                slot[...] = rng.normal(size=slot.shape).astype(cache_dtype)
    given = dict(case.options)
    if given.get("sinks"):
        given["sinks"] = jnp.asarray(rng.normal(size=case.heads), jnp.float32)
    if given.get("alibi_slopes"):
        given["alibi_slopes"] = jnp.asarray(2.0 ** -np.arange(1, case.heads + 1), jnp.float32)
    if given.get("span_ends"):
        given["span_ends"] = jnp.asarray(rng.integers(0, 50, num_tokens), jnp.int32)
    if "tree_mask" in given:
        tree = rng.integers(0, 2, (num_tokens, given["tree_mask"])) == 1
        tree[:, 0] = True
        given["tree_mask"] = jnp.asarray(tree)
    for name in ("k_scale", "v_scale"):
        if name in given:
            given[name] = jnp.float32(given[name])
    lens = np.array([sum(pair) for pair in case.sequences], np.int32)
    starts = np.concatenate([[0], np.cumsum([new for _, new in case.sequences])]).astype(np.int32)
    arrays = {
        "q": normal(num_tokens, case.heads, case.head_dim),
        "k": k,
        "v": v,
        "kv_pages": kv_pages,
        "layer": np.int32(layer),
        "page_table": table,
        "seq_lens": lens,
        "query_starts": starts,
    }
    options = AttentionOptions(
        scale=case.logit_size / case.head_dim**0.5, decode_only=case.decode_only, **given
    )
    return Batch(arrays, options, layer, num_new)


def oracle(case: Case, batch: Batch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(out, cache, lse) by the definition, in float64, a query and a head at a time."""
    options, arrays = batch.options, batch.arrays
    size, group = case.page_size, case.heads // case.kv_heads
    cache = arrays["kv_pages"].copy()
    scales = [1.0 if x is None else float(x) for x in (options.k_scale, options.v_scale)]
    out = np.zeros((batch.num_new, case.heads, case.head_dim))
    lse = np.zeros((batch.num_new, case.heads))

    def stored(x: np.ndarray, scale: float) -> np.ndarray:
        divided = x.astype(np.float32) / np.float32(scale)
        if cache.dtype == np.int8:
            divided = np.clip(np.round(divided), -128, 127)
        return divided.astype(cache.dtype)

    for s, length in enumerate(arrays["seq_lens"]):
        first, end = arrays["query_starts"][s : s + 2]
        table = arrays["page_table"][s]
        for row in range(first, end):
            position = length - (end - row)
            slot = cache[batch.layer, table[position // size], position % size]
            slot[0::2] = stored(arrays["k"][row], scales[0])
            slot[1::2] = stored(arrays["v"][row], scales[1])
        own = cache[batch.layer, table[: -(-length // size)]].reshape(-1, 2 * case.kv_heads, case.head_dim)
        own = own[:length].astype(np.float64)
        for row in range(first, end):
            position = int(length - (end - row))
            places = np.arange(length)
            visible = places <= position
            if options.span_ends is not None:
                visible |= places < int(options.span_ends[row])
            if options.window is not None:
                visible &= places > position - options.window
            new = end - first
            if options.tree_mask is not None and new <= options.tree_mask.shape[1]:
                visible[length - new :] = np.asarray(options.tree_mask)[row, :new]
            for head in range(case.heads):
                seen = own[visible, 2 * (head // group) :][:, :2]
                logits = seen[:, 0] @ arrays["q"][row, head].astype(np.float64) * options.scale * scales[0]
                if options.soft_cap is not None:
                    logits = options.soft_cap * np.tanh(logits / options.soft_cap)
                if options.alibi_slopes is not None:
                    logits += float(options.alibi_slopes[head]) * (places[visible] - position)
                sink = -np.inf if options.sinks is None else float(options.sinks[head])
                lse[row, head] = np.logaddexp.reduce([*logits, sink])
                out[row, head] = np.exp(logits - lse[row, head]) @ seen[:, 1] * scales[1]
    return out, cache, lse


@pytest.fixture(autouse=True)
def _interpreter() -> Iterator[None]:
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        yield
    pltpu.reset_tpu_interpret_mode_state()


def run(case: Case, batch: Batch, table_width: int = 0) -> tuple[np.ndarray, ...]:
    table = batch.arrays["page_table"]
    batch.arrays["page_table"] = np.pad(table, ((0, 0), (0, max(0, table_width - table.shape[1]))))
    tiling = tpu.Tiling(1 if case.decode_only else case.queries, case.keys)
    call = jax.jit(functools.partial(tpu.attend, tiling=tiling))
    return tuple(np.asarray(x) for x in call(*map(jnp.asarray, batch.arrays.values()), batch.options))


def distance(actual: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(actual.astype(np.float64) - exact) / max(np.linalg.norm(exact), 1e-30))


def check(case: Case, seed: int) -> None:
    batch = make_batch(case, seed)
    out, cache, lse = run(case, batch)
    exact, expected_cache, exact_lse = oracle(case, batch)
    assert out.dtype == batch.arrays["q"].dtype and out.shape == batch.arrays["q"].shape
    np.testing.assert_array_equal(out[batch.num_new :].astype(np.float32), 0)
    np.testing.assert_array_equal(cache.view(np.uint8), expected_cache.view(np.uint8))
    if batch.num_new:
        assert distance(out[: batch.num_new], exact) <= TOLERANCE[case.dtype]
        if batch.options.return_lse:
            assert distance(lse[: batch.num_new], exact_lse) <= TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", [CASES["ragged"], CASES["decodes, everything"]])
def test_fresh_numbers(case: Case) -> None:
    for seed in (1, 2):
        check(case, seed)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (Case(RAGGED, queries=5), r"queries=5.*1 query or a multiple of 16"),
        (Case(RAGGED, keys=12), r"keys=12.*whole pages of 8"),
        (Case(RAGGED, cache_dtype="float16"), r"no float16"),
        (Case(((1, 1),), pages_per_seq=2**16 + 1), r"65537 pages a sequence.*65536; use larger pages"),
    ],
)
def test_what_it_cannot_do_is_refused(case: Case, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(case, make_batch(replace(case, pages_per_seq=8), 0), case.pages_per_seq)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_mask_off_by_one_is_caught(shift: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = tpu_flash.FlashTile._visible

    def wrong(self: Any, *arguments: Any) -> tuple[jax.Array, jax.Array]:
        shifted, _ = right(self, *arguments)
        return shifted, shifted >= shift

    monkeypatch.setattr(tpu_flash.FlashTile, "_visible", wrong)
    with pytest.raises(AssertionError):
        check(CASES["ragged"], seed=0)


@pytest.mark.parametrize("mistake", ["scale", "window", "page"])
def test_a_wrong_argument_is_caught(mistake: str) -> None:
    case = CASES["window"]
    batch = make_batch(case, 0)
    options, table = batch.options, batch.arrays["page_table"].copy()
    if mistake == "scale":
        options = replace(options, scale=options.scale * 1.0005)
    elif mistake == "window":
        options = replace(options, window=options.window + 1)
    else:
        table[5, [3, 4]] = table[5, [4, 3]]
    wrong = replace(batch, options=options, arrays={**batch.arrays, "page_table": table})
    exact, _, _ = oracle(case, batch)
    out, _, _ = run(case, wrong)
    assert distance(out[: batch.num_new], exact) > TOLERANCE[case.dtype]


def test_a_query_of_a_tree_that_sees_nothing_gives_zero() -> None:
    shape = Shape(2, 1, 8, 4, 12, 4, 24, tree_width=5, lse=True)
    batch = random_batch(shape, 0, 1.0, [(10, 5), (10, 6), (0, 4), (0, 1)])
    assert batch.tree_mask is not None
    tree_mask = batch.tree_mask.copy()
    tree_mask[batch.query_starts[2] :] = False
    BackendUnderTest("tpu").check(replace(batch, tree_mask=tree_mask), shape)


@pytest.mark.parametrize("name", CASES)
def test_matches_the_definition(name: str) -> None:
    check(CASES[name], seed=0)
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    assert not interpret_pallas_call.races.races_found

"""A block of keys as pages hold it, token by token, to one that the products take, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
# Keys of sixteen rows that are laid apart at once: more do not fit in registers.
SEPARATED = 64


def keys_separated(rows: int, keys: int) -> int:
    """Of a block of so many keys, each of so many rows: how many are laid apart at once."""
    return next(size for size in (SEPARATED * max(1, 16 // rows), SEPARATED, keys) if keys % size == 0)


def stand_in_words(kv_blocks: Any, separate: Any) -> bool:
    """Whether rows stand as bfloat16 numbers without gaps, two in each 32-bit word, and are kept as such."""
    (_, _, rows, lanes), dtype = kv_blocks.shape, kv_blocks.dtype
    without_gaps = lanes == LANES and (rows in (2, 4) or rows % 8 == 0)
    as_they_are = separate.dtype == dtype == jnp.bfloat16 and rows == separate.shape[0]
    return without_gaps and as_they_are


def by_word(block: Any, first: jax.Array, keys: int) -> Iterator[jax.Array]:
    """A block in VMEM, [keys, rows, lanes], to bfloat16[keys, lanes] of its keys from `first` on, row by row.

    Two rows share the words of a token, which a load with a stride takes from one token after the other.
    """
    tokens, rows, lanes = block.shape
    pairs = rows // 2
    words = block.bitcast(jnp.uint32).reshape(tokens * pairs, lanes)
    words = words.at[pl.ds(pl.multiple_of(first * pairs, keys * pairs), keys * pairs)]
    for pair in range(pairs):
        yield from _taken_apart(words[pl.ds(pair, keys, stride=pairs)])


def by_row(block: jax.Array, dtype: jnp.dtype) -> list[jax.Array]:
    """[keys, rows, lanes] to a [keys, lanes] of the given dtype for every row."""
    keys, rows, lanes = block.shape
    if dtype != jnp.bfloat16 or block.dtype != jnp.bfloat16 or rows % 16:
        return list(jnp.swapaxes(block.astype(dtype), 0, 1))
    # Whole words are transposed at half the price.
    pairs = pltpu.bitcast(block.reshape(keys * rows, lanes), jnp.uint32).reshape(keys, rows // 2, lanes)
    return [row for pair in jnp.swapaxes(pairs, 0, 1) for row in _taken_apart(pair)]


def _taken_apart(words: jax.Array) -> list[jax.Array]:
    """The two bfloat16 in each uint32; one is the upper half of the float32 that it stands for."""
    halves = (words << 16, words & jnp.uint32(0xFFFF0000))
    return [lax.bitcast_convert_type(bits, jnp.float32).astype(jnp.bfloat16) for bits in halves]

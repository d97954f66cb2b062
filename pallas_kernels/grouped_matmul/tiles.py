"""A loop over tiles of rows, each of which is one plain product with the matrix of its group."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

# Rows from which on a larger tile makes a product no faster than its matrix is read.
_LARGEST_TILE = 128


def multiply(
    rows: jax.Array, weights: jax.Array, group_sizes: jax.Array, first_group: jax.Array
) -> jax.Array:
    """See `grouped_matmul`. A matrix is read once for each tile of its rows, and its slice is all that is."""
    num_rows, groups = rows.shape[0], group_sizes.shape[0]
    tile = _tile_size(num_rows, groups)
    tiles_of = -(-group_sizes // tile)
    last_tile = jnp.cumsum(tiles_of)
    starts = jnp.cumsum(group_sizes) - group_sizes
    padded = jnp.pad(rows, ((0, tile), (0, 0)))

    def body(index: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.sum(index >= last_tile)
        start = starts[group] + (index - (last_tile[group] - tiles_of[group])) * tile
        matrix = lax.dynamic_index_in_dim(weights, first_group + group, keepdims=False)
        product = lax.dot(
            lax.dynamic_slice_in_dim(padded, start, tile), matrix, preferred_element_type=jnp.float32
        )
        # What a group's last tile has too many, the next group's first one writes over.
        return lax.dynamic_update_slice_in_dim(out, product.astype(out.dtype), start, 0)

    out = jnp.zeros((num_rows + tile, weights.shape[2]), rows.dtype)
    return lax.fori_loop(0, last_tile[-1], body, out)[:num_rows]


def _tile_size(num_rows: int, groups: int) -> int:
    """A power of two: twice the rows that a group has if all have alike, so that most fit in one tile."""
    wanted = min(2 * -(-num_rows // groups), num_rows, _LARGEST_TILE)
    return 1 << (wanted - 1).bit_length()

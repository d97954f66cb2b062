"""Rows to the devices that have their experts, and what these make of them back: no capacity, no drops.

An all-to-all moves blocks of one size. Blocks for the worst case, all rows of all devices to one of them,
would be as many times too large as there are devices; blocks for the mean would lose rows. So blocks are
twice the mean, and as many rounds of them are made as the fullest pair of devices needs: one, unless the
router is far off balance.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from sharding import MeshAxes

# Rows below which smaller blocks save nothing.
_SMALLEST_BLOCK = 32


def block_size(num_rows: int, most: int, devices: int) -> int:
    """Rows that a device sends to another one in a round.

    Args:
        num_rows: that a device has to send, at most.
        most: that may go to a single device.
        devices: that these rows are spread over, in the mean evenly.
    """
    return min(most, max(_SMALLEST_BLOCK, 2 * -(-num_rows // devices)))


def exchange(
    compute: Callable[[jax.Array, jax.Array], jax.Array],
    tokens: jax.Array,
    owner: jax.Array,
    expert: jax.Array,
    *,
    num_experts: int,
    block: int,
    most: int,
    axis: str,
    in_step: MeshAxes,
) -> jax.Array:
    """compute(token, expert) for every token and each of its experts, computed by the expert's owner.

    Runs under `shard_map`; each device along `axis` has tokens and experts of its own.

    Args:
        compute: from rows [R, D] and int32[R], the expert of each among this device's, or num_experts
            where there is nothing to compute, to [R, D].
        tokens: [T, D].
        owner: int32[T, k], where along `axis` an expert is; the axis' size where nobody is to compute it.
        expert: int32[T, k], its number there.
        num_experts: of each device.
        block: rows that a device sends to another one in a round, see `block_size`.
        most: rows that a device may have to send to another one, at most.
        in_step: mesh axes whose devices all make as many rounds.

    Returns:
        [T, k, D]; anything finite where the owner is nobody.
    """
    devices = lax.axis_size(axis)
    destination = owner.reshape(-1)
    order = jnp.argsort(destination)
    counts = jnp.zeros(devices, jnp.int32).at[destination].add(1, mode="drop")
    starts = jnp.cumsum(counts) - counts
    place = jnp.argsort(order) - jnp.append(starts, 0)[destination]  # of a row among those of its owner

    def send(x: jax.Array) -> jax.Array:
        return lax.all_to_all(x, axis, split_axis=0, concat_axis=0, tiled=True)

    def make_round(index: jax.Array | int, results: jax.Array) -> jax.Array:
        offset = index * block + jnp.arange(block)
        is_row = offset < counts[:, None]  # [devices, block]
        row = order[jnp.where(is_row, starts[:, None] + offset, 0)]
        wanted = jnp.where(is_row, expert.reshape(-1)[row], num_experts)
        received = send(tokens[row // owner.shape[1]])
        computed = compute(received.reshape(-1, tokens.shape[1]), send(wanted).reshape(-1))
        returned = send(computed.reshape(received.shape)).reshape(computed.shape)
        slot = place - index * block
        is_here = (slot >= 0) & (slot < block) & (destination < devices)
        mine = returned[jnp.where(is_here, destination * block + slot, 0)]
        return jnp.where(is_here[:, None], mine, results)

    results = jnp.zeros((destination.shape[0], tokens.shape[1]), tokens.dtype)
    if block >= most:
        results = make_round(0, results)
    else:
        rounds = lax.pmax(-(-jnp.max(counts) // block), in_step)
        results = lax.fori_loop(0, rounds, make_round, results)
    return results.reshape(*owner.shape, -1)

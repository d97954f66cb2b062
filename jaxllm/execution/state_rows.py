"""Writes of single rows of the sampler's state, compiled before the first of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxllm.execution.commands import WriteBias, WriteCounts
from jaxllm.execution.sampler import SamplerState


class StateRows:
    """Writes a row of a state like the one given.

    Args:
        vocab_size: of its rows.
    """

    def __init__(self, state: SamplerState, vocab_size: int) -> None:
        slot = jax.ShapeDtypeStruct((), np.int32)
        counts, flags, bias = (
            jax.ShapeDtypeStruct((vocab_size,), d) for d in (np.int32, np.bool_, np.float32)
        )
        # A state that lies on several devices stays as it lies.
        stays = jax.tree.map(lambda x: x.sharding, state)
        write_counts = jax.jit(_write_counts, donate_argnums=0, out_shardings=stays)
        write_bias = jax.jit(_write_bias, donate_argnums=0, out_shardings=stays)
        self._write_counts: Any = write_counts.lower(state, slot, counts, flags).compile()
        self._write_bias: Any = write_bias.lower(state, slot, bias).compile()

    def write(self, state: SamplerState, command: WriteCounts | WriteBias) -> SamplerState:
        """The state, which is donated, with the row."""
        slot = np.int32(command.slot)
        if isinstance(command, WriteBias):
            return self._write_bias(state, slot, command.bias)
        return self._write_counts(state, slot, command.counts, command.in_prompt)


def _write_counts(
    state: SamplerState, slot: jax.Array, counts: jax.Array, in_prompt: jax.Array
) -> SamplerState:
    return replace(
        state,
        output_counts=state.output_counts.at[slot].set(counts),
        in_prompt=state.in_prompt.at[slot].set(in_prompt),
    )


def _write_bias(state: SamplerState, slot: jax.Array, bias: jax.Array) -> SamplerState:
    return replace(state, logit_bias=state.logit_bias.at[slot].set(bias))

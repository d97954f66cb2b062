"""Slots: what the runner keeps of each running sequence between steps, on the host and on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from jaxllm.execution.batch import FLOATS
from jaxllm.execution.sampler import SamplerState
from jaxllm.execution.vocabulary_bias import VocabularyBias
from jaxllm.request import Request
from jaxllm.sampling_params import SamplingParams
from jaxllm.scheduling.plan import ScheduledRequest


class SlotTable:
    """A row for each running sequence: its page table and sampling parameters, ready to be gathered.

    Rows of the device's `SamplerState` are written when a sequence with penalties or a biased
    vocabulary enters, and again when its bias changes.

    Attributes:
        padding_slot: the row that stands for no sequence.
        page_table: int32[slots + 1, pages_per_seq].
        integers: per name int32[slots + 1].
        floats: float32[len(FLOATS), slots + 1].
    """

    def __init__(self, num_slots: int, pages_per_seq: int, vocab_size: int) -> None:
        self.padding_slot = num_slots
        self.page_table = np.zeros((num_slots + 1, pages_per_seq), np.int32)
        self.integers = {
            name: np.zeros(num_slots + 1, np.int32) for name in ("seeds", "top_k", "penalties", "bias")
        }
        self.floats = np.ones((len(FLOATS), num_slots + 1), np.float32)
        self._vocab_size = vocab_size
        self._free = list(range(num_slots - 1, -1, -1))
        self._slot_of: dict[Request, int] = {}
        self._num_pages = [0] * num_slots
        self._bias_of: dict[Request, VocabularyBias] = {}
        self._write_counts: Any = None
        self._write_bias: Any = None

    def warm_up(self, state: SamplerState) -> None:
        """Compiles the updates of a row, which must be done before the first `admit`."""
        slot = jax.ShapeDtypeStruct((), np.int32)
        counts, flags, bias = (
            jax.ShapeDtypeStruct((self._vocab_size,), d) for d in (np.int32, np.bool_, np.float32)
        )
        # A state that lies on several devices stays as it lies.
        stays = jax.tree.map(lambda x: x.sharding, state)
        write_counts = jax.jit(_write_counts, donate_argnums=0, out_shardings=stays)
        write_bias = jax.jit(_write_bias, donate_argnums=0, out_shardings=stays)
        self._write_counts = write_counts.lower(state, slot, counts, flags).compile()
        self._write_bias = write_bias.lower(state, slot, bias).compile()

    def of(self, scheduled: Sequence[ScheduledRequest]) -> list[int]:
        """The slot of each scheduled request."""
        return [self._slot_of[entry.request] for entry in scheduled]

    def release(self, request: Request) -> None:
        """Frees the slot of a request that stopped running; one without a slot is ignored."""
        slot = self._slot_of.pop(request, None)
        if slot is not None:
            self._bias_of.pop(request, None)
            self._free.append(slot)

    def admit(self, state: SamplerState, scheduled: Sequence[ScheduledRequest]) -> SamplerState:
        """Gives newcomers a slot, notes new pages, and brings the device's rows up to date."""
        for request, start, num_tokens, _ in scheduled:
            slot = self._slot_of.get(request)
            if slot is None:
                slot = self._enter(request)
                if self.integers["penalties"][slot]:
                    state = self._count_tokens(state, slot, request)
            if request in self._bias_of:
                row = self._bias_of[request].row_if_changed(request, start + num_tokens)
                if row is not None:
                    state = self._write_bias(state, np.int32(slot), row)
            known, pages = self._num_pages[slot], request.pages
            if len(pages) > known:
                self.page_table[slot, known : len(pages)] = pages[known:]
                self._num_pages[slot] = len(pages)
        return state

    def _enter(self, request: Request) -> int:
        slot = self._slot_of[request] = self._free.pop()
        params = request.sampling_params
        self._num_pages[slot] = 0
        self.integers["seeds"][slot] = np.uint32(request.seed).astype(np.int32)
        self.integers["top_k"][slot] = max(params.top_k, 0)
        self.integers["penalties"][slot] = uses_penalties(params)
        bias = VocabularyBias(request, self._vocab_size)
        self.integers["bias"][slot] = bias.is_needed
        if bias.is_needed:
            self._bias_of[request] = bias
        for row, name in enumerate(FLOATS):
            self.floats[row, slot] = getattr(params, name)
        return slot

    def _count_tokens(self, state: SamplerState, slot: int, request: Request) -> SamplerState:
        """Writes how often each token stands in the output, and which ones in the prompt."""
        counts = np.bincount(request.output_token_ids, minlength=self._vocab_size).astype(np.int32)
        in_prompt = np.zeros(self._vocab_size, bool)
        in_prompt[request.prompt_token_ids] = True
        return self._write_counts(state, np.int32(slot), counts, in_prompt)


def uses_penalties(params: SamplingParams) -> bool:
    """Whether a sequence's earlier tokens change its logits."""
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1


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

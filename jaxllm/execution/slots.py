"""Slots: what the runner keeps of each running sequence between steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from jaxllm.execution.batch import FLOATS
from jaxllm.execution.commands import WriteBias, WriteCounts
from jaxllm.execution.vocabulary_bias import VocabularyBias
from jaxllm.request import Request
from jaxllm.sampling_params import SamplingParams
from jaxllm.scheduling.plan import ScheduledRequest


class SlotTable:
    """A row for each running sequence: its page table and sampling parameters, ready to be gathered.

    Rows of the device's `SamplerState` have to be written when a sequence with penalties or a biased
    vocabulary enters, and again when its bias changes. Of several replicas each has rows of its own, one
    after the other; the last one of each stands for no sequence.

    Attributes:
        rows_per_replica: slots of a replica, and one more.
        padding_slot: of a replica, which stands for no sequence.
        page_table: int32[rows, pages_per_seq].
        integers: per name int32[rows].
        floats: float32[len(FLOATS), rows].
    """

    def __init__(self, num_slots: int, pages_per_seq: int, vocab_size: int, replicas: int = 1) -> None:
        self.rows_per_replica = num_slots + 1
        self.padding_slot = num_slots
        rows = self.rows_per_replica * replicas
        self.page_table = np.zeros((rows, pages_per_seq), np.int32)
        self.integers = {name: np.zeros(rows, np.int32) for name in ("seeds", "top_k", "penalties", "bias")}
        self.floats = np.ones((len(FLOATS), rows), np.float32)
        self._vocab_size = vocab_size
        self._free = [
            list(range(first + num_slots - 1, first - 1, -1))
            for first in range(0, rows, self.rows_per_replica)
        ]
        self._slot_of: dict[Request, int] = {}
        self._num_pages = [0] * rows
        self._bias_of: dict[Request, VocabularyBias] = {}

    def of(self, scheduled: Sequence[ScheduledRequest]) -> list[int]:
        """The row of each scheduled request, counted through all replicas."""
        return [self._slot_of[entry.request] for entry in scheduled]

    def release(self, request: Request) -> int | None:
        """The slot of a request that stopped running, which is no longer its own, to be freed; or None."""
        self._bias_of.pop(request, None)
        return self._slot_of.pop(request, None)

    def free(self, slots: Sequence[int]) -> None:
        """Makes slots that were released ready for others."""
        for slot in slots:
            self._free[slot // self.rows_per_replica].append(slot)

    def has_room_for(self, scheduled: Sequence[ScheduledRequest], replica: int = 0) -> bool:
        """Whether there is a free slot for each newcomer."""
        return sum(entry.request not in self._slot_of for entry in scheduled) <= len(self._free[replica])

    def admit(self, scheduled: Sequence[ScheduledRequest], replica: int = 0) -> list[WriteCounts | WriteBias]:
        """Gives newcomers a slot and notes new pages; the rows that the device has to write then."""
        writes: list[WriteCounts | WriteBias] = []
        for request, start, num_tokens, _ in scheduled:
            slot = self._slot_of.get(request)
            if slot is None:
                slot = self._enter(request, replica)
                if self.integers["penalties"][slot]:
                    writes.append(self._token_counts(slot, request))
            if not request.needs_host_tokens:
                writes += self._bias(request, start + num_tokens)
            known, pages = self._num_pages[slot], request.pages
            if len(pages) > known:
                self.page_table[slot, known : len(pages)] = pages[known:]
                self._num_pages[slot] = len(pages)
        return writes

    def admit_late(self, requests: Iterable[Request]) -> list[WriteBias]:
        """The rows that the device has to write before it samples late for these requests."""
        return [write for request in requests for write in self._bias(request, len(request.token_ids))]

    def _bias(self, request: Request, length: int) -> list[WriteBias]:
        """What has to be written before the token is sampled that follows so many."""
        bias = self._bias_of.get(request)
        row = None if bias is None else bias.row_if_changed(request, length)
        return [] if row is None else [WriteBias(self._slot_of[request], row)]

    def _enter(self, request: Request, replica: int) -> int:
        slot = self._slot_of[request] = self._free[replica].pop()
        params = request.sampling_params
        self._num_pages[slot] = 0
        self.integers["seeds"][slot] = np.uint32(request.seed).astype(np.int32)
        # More than there are is all of them, however many more than an int32 holds.
        self.integers["top_k"][slot] = min(max(params.top_k, 0), self._vocab_size)
        self.integers["penalties"][slot] = uses_penalties(params)
        bias = VocabularyBias(request, self._vocab_size)
        self.integers["bias"][slot] = bias.is_needed
        if bias.is_needed:
            self._bias_of[request] = bias
        for row, name in enumerate(FLOATS):
            self.floats[row, slot] = getattr(params, name)
        return slot

    def _token_counts(self, slot: int, request: Request) -> WriteCounts:
        """How often each token stands in the output, and which ones in the prompt."""
        counts = np.bincount(request.output_token_ids, minlength=self._vocab_size).astype(np.int32)
        in_prompt = np.zeros(self._vocab_size, bool)
        in_prompt[request.prompt_token_ids] = True
        return WriteCounts(slot, counts, in_prompt)


def uses_penalties(params: SamplingParams) -> bool:
    """Whether a sequence's earlier tokens change its logits."""
    return params.presence_penalty != 0 or params.frequency_penalty != 0 or params.repetition_penalty != 1

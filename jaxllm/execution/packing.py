"""Plans as arrays."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxllm.execution.batch import SAMPLES, SAMPLES_LATE, HostBatch
from jaxllm.execution.pending import LateRow, Packed
from jaxllm.execution.slots import SlotTable
from jaxllm.scheduling.plan import Plan, ScheduledRequest


def reports_prompt(entry: ScheduledRequest) -> bool:
    """Whether a prompt's log-probabilities are wanted of what an entry computes."""
    wanted = entry.request.sampling_params.prompt_logprobs
    return wanted is not None and entry.start < entry.request.num_prompt_tokens - 1


def is_late(entry: ScheduledRequest) -> bool:
    """Whether a sequence is sampled after the step, see `sample_late`."""
    return entry.samples and entry.request.needs_host_tokens


def late_rows(plan: Plan, packed: Packed) -> list[LateRow]:
    """Those of a plan's sequences, where they stand."""
    return [
        LateRow(entry.request, row, entry.start + entry.num_tokens)
        for entry, row in zip(plan.scheduled, packed.rows, strict=True)
        if is_late(entry)
    ]


def fill_batch(
    batch: HostBatch, scheduled: Sequence[ScheduledRequest], slots: SlotTable, packed: Packed, replica: int
) -> None:
    """What a replica has to do as arrays; notes where everything stands in `packed`.

    Args:
        batch: empty.
        slots: where each of the scheduled requests has one.
    """
    shape = batch.shape
    count = len(scheduled)
    rows, first_token = slots.of(scheduled), replica * shape.num_tokens
    starts, tokens = [0], []
    lengths, rope_lengths, samples, drawn = [], [], [], []
    for entry in scheduled:
        request, start, num_tokens, is_sampled = entry
        end = start + num_tokens
        known = request.token_ids[start:end]
        tokens += known
        if len(known) < num_tokens:
            tokens.append(-1)  # its newest token is still on the device
        if packed.reports_prompts and reports_prompt(entry):
            first = starts[-1]
            targets = request.prompt_token_ids[start + 1 : end + 1]
            batch.targets[first : first + len(targets)] = targets
            packed.prompt_rows[len(packed.token_rows)] = first_token + first
        if request.token_type_ids is not None:
            types = request.token_type_ids[start:end]
            batch.targets[starts[-1] : starts[-1] + num_tokens] = types
        packed.token_rows.append(first_token + starts[-1])
        starts.append(starts[-1] + num_tokens)
        lengths.append(end)
        rope_lengths.append(request.num_prompt_tokens)
        samples.append(SAMPLES_LATE if is_late(entry) else SAMPLES if is_sampled else 0)
        drawn.append(end - request.num_prompt_tokens)
    packed.rows += range(replica * shape.num_seqs, replica * shape.num_seqs + count)
    total = starts[-1]
    batch.token_ids[:total] = tokens
    batch.query_starts[: count + 1] = starts
    batch.query_starts[count + 1 :] = total
    query_lens = np.diff(batch.query_starts[: count + 1])
    first_positions = np.asarray(lengths, np.int32) - query_lens
    batch.positions[:total] = np.arange(total) + np.repeat(
        first_positions - batch.query_starts[:count], query_lens
    )
    column = batch.column
    column["seq_lens"][:count] = lengths
    column["rope_lengths"][:count] = rope_lengths
    column["slots"][:count] = np.asarray(rows, np.int32) - replica * slots.rows_per_replica
    column["samples"][:count] = samples
    column["positions"][:count] = drawn
    for name in ("seeds", "top_k", "penalties", "bias"):
        column[name][:count] = slots.integers[name][rows]
    batch.seq_floats[:, :count] = slots.floats[:, rows]
    batch.page_table[:count] = slots.page_table[rows]

"""What the runner keeps of a running request on the host."""

from __future__ import annotations

import numpy as np

from jaxllm.execution.slots import SlotTable
from jaxllm.request import Request
from jaxllm.sampling_params import SamplingParams
from jaxllm.scheduling.plan import ScheduledRequest


def test_numbers_that_no_int32_holds_are_held() -> None:
    """A client may send them, and the engine must not end over it."""
    table = SlotTable(2, 4, vocab_size=50)
    wide = Request("a", [1], SamplingParams(top_k=2**63), seed=2**32 - 1)
    narrow = Request("b", [1], SamplingParams(top_k=7), seed=3)
    scheduled = [ScheduledRequest(request, 0, 1, True) for request in (wide, narrow)]
    table.admit(scheduled)
    slots = table.of(scheduled)
    assert table.integers["top_k"][slots].tolist() == [50, 7]
    assert table.integers["seeds"][slots].astype(np.uint32).tolist() == [2**32 - 1, 3]

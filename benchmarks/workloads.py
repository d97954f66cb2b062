"""Workloads as rows: how many prompts, how long, how much of them shared, how many tokens out."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import numpy as np

from jaxllm.scheduling.simulator import TracedRequest, make_workload

Prompts = list[list[int]]


@dataclass(frozen=True, slots=True)
class Workload:
    """`num_prompts` prompts of `input_len` tokens, all at once, each answered with `output_len` tokens.

    The first `shared_len` tokens are the same in every prompt.
    """

    num_prompts: int
    input_len: int
    output_len: int
    shared_len: int = 0

    def __str__(self) -> str:
        shared = f" ({self.shared_len} shared)" if self.shared_len else ""
        return f"{self.num_prompts} x {self.input_len} -> {self.output_len}{shared}"

    @property
    def num_computed_prompt_tokens(self) -> int:
        """Prompt tokens that an engine with a prefix cache has to compute."""
        return self.num_prompts * self.input_len - (self.num_prompts - 1) * self.shared_len

    @property
    def num_output_tokens(self) -> int:
        return self.num_prompts * self.output_len

    def prompts(self, vocab_size: int, *, seed: int) -> Prompts:
        """Random token ids; another seed shares nothing, so that no earlier run's pages are hit."""
        generator = np.random.default_rng([seed, self.num_prompts, self.input_len, self.shared_len])
        ids = generator.integers(10, vocab_size, (self.num_prompts, self.input_len))
        ids[:, : self.shared_len] = ids[0, : self.shared_len]
        return [list(map(int, row)) for row in ids]


# The rows by which releases are compared.
STANDARD = [
    Workload(1, 16, 64),
    Workload(1, 1024, 1),
    Workload(8, 128, 64),
    Workload(32, 128, 64),
    Workload(64, 64, 64),
    Workload(16, 512, 32),
    Workload(16, 512, 32, shared_len=448),
]

_PATTERN = re.compile(r"(\d+)x(\d+)->(\d+)(?:/(\d+))?")


def parse_workload(text: str) -> Workload:
    """Reads `16x512->32`, or `16x512->32/448` where 448 of the 512 tokens are shared.

    Raises:
        ValueError: if the text has another form, a count is zero, or the whole prompt is shared.
    """
    match = _PATTERN.fullmatch(text.replace(" ", ""))
    if match is None:
        raise ValueError(f"workload {text!r} is not of the form 16x512->32 or 16x512->32/448")
    num_prompts, input_len, output_len, shared_len = (int(group or 0) for group in match.groups())
    if min(num_prompts, input_len, output_len) < 1 or shared_len >= input_len:
        raise ValueError(f"workload {text!r} needs counts of at least 1, and fewer shared tokens than it has")
    return Workload(num_prompts, input_len, output_len, shared_len)


def scaled_trace(
    name: str, *, rate: float, num_requests: int, scale: float, longest: int, seed: int
) -> list[TracedRequest]:
    """A workload of the simulator, with lengths for a machine that is no accelerator.

    Args:
        rate: requests a second.
        scale: of the workload's lengths.
        longest: tokens of a request; segments in the middle are left out where it would have more.
    """
    requests = make_workload(name, rate=rate, num_requests=num_requests, seed=seed)
    return [_shrink(request, scale, longest) for request in requests]


def _shrink(request: TracedRequest, scale: float, longest: int) -> TracedRequest:
    segments = tuple((name, max(1, round(length * scale))) for name, length in request.segments)
    output_len = max(2, round(request.output_len * scale))
    while sum(length for _, length in segments) + output_len > longest and len(segments) > 1:
        segments = (segments[0], *segments[2:])
    if sum(length for _, length in segments) + output_len > longest:
        segments = ((segments[0][0], longest - output_len),)
    return replace(request, segments=segments, output_len=output_len)

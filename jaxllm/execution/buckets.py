"""The finite set of shapes that a step is compiled for, and which of them a plan runs in."""

from __future__ import annotations

from collections.abc import Iterable

from jaxllm.execution.batch import StepShape

SMALLEST_PREFILL = 16


def step_shapes(max_num_seqs: int, max_num_batched_tokens: int, pages_per_seq: int) -> list[StepShape]:
    """Every shape, in the order in which they are wanted.

    The first ones cover every plan: the largest mixed step, the largest decode, a lone decode and a
    short prompt. The others make steps cheaper, the common ones first.
    """
    decodes = [n for n in _sizes(1, max_num_seqs) if n <= max_num_batched_tokens]
    prefills = _sizes(min(SMALLEST_PREFILL, max_num_batched_tokens), max_num_batched_tokens)
    decode_shapes = [StepShape(n, n, pages_per_seq, True) for n in decodes]
    mixed_shapes = [StepShape(n, min(n, max_num_seqs), pages_per_seq, False) for n in prefills]
    covering = [mixed_shapes[-1], decode_shapes[-1], decode_shapes[0], mixed_shapes[0]]
    others = [*reversed(decode_shapes), *reversed(mixed_shapes)]
    return list(dict.fromkeys([*covering, *others]))


def num_covering(shapes: list[StepShape]) -> int:
    """How many of the first shapes must be compiled before any plan can run."""
    return min(4, len(shapes))


def _sizes(smallest: int, largest: int) -> list[int]:
    """Powers of two from `smallest`, with a step between from 16 on, up to and with `largest`."""
    sizes, size = [], smallest
    while size < largest:
        sizes.append(size)
        if size >= 16 and size + size // 2 < largest:
            sizes.append(size + size // 2)
        size *= 2
    return [*sizes, largest]


def choose(
    ready: Iterable[StepShape], num_tokens: int, num_seqs: int, decode_only: bool
) -> StepShape | None:
    """The cheapest ready shape that a plan fits into, or None.

    Args:
        decode_only: every sequence has one token and none reports prompt logprobs.
    """
    fitting = [
        shape
        for shape in ready
        if shape.num_tokens >= num_tokens
        and shape.num_seqs >= num_seqs
        and (decode_only or not shape.decode_only)
    ]
    return min(fitting, key=lambda s: (s.num_tokens, not s.decode_only, s.num_seqs), default=None)

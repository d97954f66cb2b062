"""The finite set of shapes that a step is compiled for, and which of them a plan runs in."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence

from jaxllm.execution.batch import LateShape, Program, StepShape

SMALLEST_PREFILL = 16


def step_shapes(max_num_seqs: int, max_num_batched_tokens: int, pages_per_seq: int) -> list[StepShape]:
    """Every shape, in the order in which they are wanted.

    The first ones cover every plan: the largest mixed step, the largest decode, a lone decode and a
    short prompt. The others make steps cheaper, from the middle sizes outwards.
    """
    decodes = _sizes(1, min(max_num_seqs, max_num_batched_tokens), fine_from=32)
    prefills = _sizes(min(SMALLEST_PREFILL, max_num_batched_tokens), max_num_batched_tokens, fine_from=1024)
    decode_shapes = [StepShape(n, n, pages_per_seq, True) for n in decodes]
    mixed_shapes = [StepShape(n, min(n, max_num_seqs), pages_per_seq, False) for n in prefills]
    covering = [mixed_shapes[-1], decode_shapes[-1], decode_shapes[0], mixed_shapes[0]]
    others = itertools.zip_longest(_from_the_middle(mixed_shapes), _from_the_middle(decode_shapes))
    return list(dict.fromkeys([*covering, *(shape for pair in others for shape in pair if shape)]))


def num_covering(shapes: list[StepShape]) -> int:
    """How many of the first shapes must be compiled before any plan can run."""
    return min(4, len(shapes))


def with_late_shapes(shapes: Sequence[StepShape]) -> tuple[list[Program], int]:
    """The steps and what samples late after each, as they are wanted; how many take every plan.

    Where somebody samples late, a plan runs in a step that has its second half compiled, too. The largest
    steps have one in common, and with it they take every plan.
    """
    num_first = num_covering(list(shapes))
    first: list[Program] = [*shapes[:num_first], LateShape(shapes[0].num_seqs)]
    others = (part for shape in shapes for part in (shape, LateShape(shape.num_seqs)))
    return list(dict.fromkeys([*first, *others])), len(first)


def _sizes(smallest: int, largest: int, fine_from: int) -> list[int]:
    """Powers of two from `smallest` up to and with `largest`; from `fine_from` on with a step between."""
    sizes, size = [], smallest
    while size < largest:
        sizes.append(size)
        if size >= fine_from and size + size // 2 < largest:
            sizes.append(size + size // 2)
        size *= 2
    return [*sizes, largest]


def _from_the_middle(shapes: list[StepShape]) -> list[StepShape]:
    middle = len(shapes) // 2
    return sorted(shapes, key=lambda shape: abs(shapes.index(shape) - middle))


def choose(
    ready: Collection[Program], num_tokens: int, num_seqs: int, decode_only: bool, *, late: bool = False
) -> StepShape | None:
    """The cheapest ready shape that a plan fits into, or None.

    Args:
        decode_only: every sequence has one token and none reports prompt logprobs.
        late: some sequence is sampled late.
    """
    fitting = [
        shape
        for shape in ready
        if isinstance(shape, StepShape)
        and shape.num_tokens >= num_tokens
        and shape.num_seqs >= num_seqs
        and (decode_only or not shape.decode_only)
        and (not late or LateShape(shape.num_seqs) in ready)
    ]
    return min(fitting, key=lambda s: (s.num_tokens, not s.decode_only, s.num_seqs), default=None)

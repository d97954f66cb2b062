"""How long a step takes, learnt from steps that were timed (`python -m benchmarks.profile_steps`)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from jaxllm.scheduling.plan import Plan


class Shape(NamedTuple):
    """What a step was compiled for: tokens and sequences, padding included.

    Attributes:
        decode_only: one token of each sequence.
    """

    num_tokens: int
    num_seqs: int
    decode_only: bool


class RecordedStep(NamedTuple):
    """A step that was timed.

    Attributes:
        decode_context: positions whose keys and values are read for single tokens.
        prompt_pairs: pairs of a query and a position that it sees, in runs of several tokens.
    """

    shape: Shape
    decode_context: int
    prompt_pairs: int
    seconds: float

    @classmethod
    def of(cls, plan: Plan, shape: Shape, seconds: float) -> RecordedStep:
        """A plan that ran in a shape and took so long."""
        return cls(shape, *attention_of(plan), seconds)


def attention_of(plan: Plan) -> tuple[int, int]:
    """(decode_context, prompt_pairs) of a plan; see `RecordedStep`."""
    decode_context = prompt_pairs = 0
    for _, start, num_tokens, _ in plan.scheduled:
        if num_tokens == 1:
            decode_context += start + 1
        else:
            prompt_pairs += num_tokens * start + num_tokens * (num_tokens + 1) // 2
    return decode_context, prompt_pairs


@dataclass(frozen=True, slots=True)
class FittedCost:
    """A price for each compiled shape, and one for each position attended to.

    Attributes:
        shapes: seconds of a step in each shape, without attention.
        decode_context, prompt_pairs: seconds for one of each; see `RecordedStep`.
    """

    shapes: dict[Shape, float]
    decode_context: float
    prompt_pairs: float

    def seconds(self, plan: Plan) -> float:
        """See `CostModel`.

        Raises:
            ValueError: no shape holds the plan.
        """
        decode_context, prompt_pairs = attention_of(plan)
        shape = self.shape_of(plan)
        return self.shapes[shape] + self.decode_context * decode_context + self.prompt_pairs * prompt_pairs

    def shape_of(self, plan: Plan) -> Shape:
        """The smallest shape that holds a plan, as the engine chooses it."""
        num_seqs = len(plan.scheduled)
        decode_only = plan.num_tokens == num_seqs
        fitting = [
            shape
            for shape in self.shapes
            if shape.num_tokens >= plan.num_tokens
            and shape.num_seqs >= num_seqs
            and (decode_only or not shape.decode_only)
        ]
        if not fitting:
            raise ValueError(
                f"a step of {plan.num_tokens} tokens of {num_seqs} requests is larger than all that were "
                "recorded; lower max_num_batched_tokens or max_num_seqs, or record larger ones"
            )
        return min(fitting, key=lambda s: (s.num_tokens, not s.decode_only, s.num_seqs))

    @classmethod
    def fit(cls, steps: Sequence[RecordedStep]) -> FittedCost:
        """The prices of least squared relative error, none below zero (Lawson and Hanson 1974, chapter 23).

        Of each shape's steps those further than a factor of 3 from their median are left out: something
        else ran meanwhile, or their work was done before anybody waited for it.

        Raises:
            ValueError: there are no steps.
        """
        if not steps:
            raise ValueError("there are no recorded steps to fit")
        by_shape: defaultdict[Shape, list[RecordedStep]] = defaultdict(list)
        for step in steps:
            by_shape[step.shape].append(step)
        kept = []
        for recorded in by_shape.values():
            median = float(np.median([step.seconds for step in recorded]))
            kept += [step for step in recorded if median / 3 <= step.seconds <= 3 * median]
        column = {shape: index for index, shape in enumerate(by_shape)}
        matrix = np.zeros((len(kept), len(column) + 2))
        for row, step in zip(matrix, kept, strict=True):
            row[column[step.shape]] = 1
            row[-2:] = step.decode_context, step.prompt_pairs
        seconds = np.array([step.seconds for step in kept])
        matrix /= seconds[:, None]
        scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
        prices, _ = nnls(matrix / scale, np.ones(len(kept)))
        *bases, decode_context, prompt_pairs = map(float, prices / scale)
        return cls(dict(zip(column, bases, strict=True)), decode_context, prompt_pairs)

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        values = asdict(self) | {"shapes": [[*shape, seconds] for shape, seconds in self.shapes.items()]}
        path.write_text(json.dumps(values, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> FittedCost:
        """Reads what `save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            values = json.loads(path.read_text())
            shapes = {
                Shape(int(tokens), int(seqs), bool(decode_only)): float(seconds)
                for tokens, seqs, decode_only, seconds in values["shapes"]
            }
            return cls(shapes, float(values["decode_context"]), float(values["prompt_pairs"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no fitted cost model ({error!r})") from error

"""How long a step takes, learnt from steps that were timed (`python -m benchmarks.profile_steps`)."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.optimize import nnls

from jaxllm.scheduling.plan import Plan
from jaxllm.scheduling.simulator.work import Shape, Tiles, Work


class RecordedStep(NamedTuple):
    """A step that was timed.

    Attributes:
        runs: the first position and the number of tokens of each request that it computed.
        copied_pages: to the host's memory or back.
    """

    shape: Shape
    runs: tuple[tuple[int, int], ...]
    copied_pages: int
    seconds: float

    @classmethod
    def of(cls, plan: Plan, shape: Shape, seconds: float) -> RecordedStep:
        """A plan that took so long in a shape."""
        runs = tuple((entry.start, entry.num_tokens) for entry in plan.scheduled)
        return cls(shape, runs, len(plan.copies_out) + len(plan.copies_in), seconds)

    def work(self, tiles: Tiles | None) -> Work:
        """What it had to do."""
        return Work.of_runs(self.runs, self.shape, tiles)._replace(copied_pages=self.copied_pages)


@dataclass(frozen=True, slots=True)
class FittedCost:
    """A price for each compiled shape, and one for each kind of work that its padding does not settle.

    Attributes:
        shapes: seconds of a step in each shape, without what `prices` is for.
        prices: seconds for one of each.
        tiles: how the device cuts its work; None where it costs what it is.
    """

    shapes: dict[Shape, float]
    prices: Work
    tiles: Tiles | None = None

    def seconds(self, plan: Plan) -> float:
        """See `CostModel`.

        Raises:
            ValueError: no shape holds the plan.
        """
        shape = self.shape_of(plan)
        return self.shapes[shape] + Work.of(plan, shape, self.tiles).times(self.prices)

    def price(self, step: RecordedStep) -> float:
        """Seconds that a recorded step should have taken; its shape must be known."""
        return self.shapes[step.shape] + step.work(self.tiles).times(self.prices)

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
    def fit(cls, steps: Sequence[RecordedStep], tiles: Tiles | None = None) -> FittedCost:
        """The prices of least squared error, none below zero (Lawson and Hanson 1974, chapter 23).

        An error counts by the median of its shape, so that small shapes count as much as large ones. Counted
        by the step's own time it would favour the fastest of them; this way the steps of each shape cost
        together what they took, unless its price would have to be below zero.

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
        medians = {s: float(np.median([step.seconds for step in own])) for s, own in by_shape.items()}
        kept = [step for step in steps if 1 / 3 <= step.seconds / medians[step.shape] <= 3]
        column = {shape: index for index, shape in enumerate(by_shape)}
        matrix = np.zeros((len(kept), len(column) + len(Work._fields)))
        for row, step in zip(matrix, kept, strict=True):
            row[column[step.shape]] = 1
            row[len(column) :] = step.work(tiles)
        typical = np.array([medians[step.shape] for step in kept])
        matrix /= typical[:, None]
        scale = np.maximum(np.abs(matrix).max(axis=0), 1e-300)
        prices, _ = nnls(matrix / scale, np.array([step.seconds for step in kept]) / typical)
        seconds_of_one = (prices / scale).tolist()
        shapes = dict(zip(column, seconds_of_one[: len(column)], strict=True))
        return cls(shapes, Work(*seconds_of_one[len(column) :]), tiles)

    def scaled_to(self, steps: Sequence[RecordedStep]) -> FittedCost:
        """With every price so many times as high that steps cost together what they took."""
        factor = sum(step.seconds for step in steps) / sum(self.price(step) for step in steps)
        shapes = {shape: factor * price for shape, price in self.shapes.items()}
        return FittedCost(shapes, Work(*(factor * price for price in self.prices)), self.tiles)

    def extended(self, shapes: Iterable[Shape]) -> FittedCost:
        """With a price for further shapes: on the line through the known ones of their kind, by tokens.

        Where no shape of their kind is known all kinds are taken; no price is below zero.
        """
        prices = dict(self.shapes)
        for shape in shapes:
            if shape not in self.shapes:
                known = [s for s in self.shapes if s.decode_only == shape.decode_only] or list(self.shapes)
                tokens = np.array([[1.0, one.num_tokens] for one in known])
                line, _ = nnls(tokens, np.array([self.shapes[one] for one in known]))
                prices[shape] = float(line @ (1.0, shape.num_tokens))
        return replace(self, shapes=prices)

    def save(self, path: Path) -> None:
        """Writes it as JSON."""
        shapes = [[*shape, seconds] for shape, seconds in self.shapes.items()]
        tiles = None if self.tiles is None else self.tiles._asdict()
        values = {"shapes": shapes, "prices": self.prices._asdict(), "tiles": tiles}
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
            prices = Work(**{name: float(price) for name, price in values["prices"].items()})
            return cls(shapes, prices, None if values["tiles"] is None else Tiles.from_json(values["tiles"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no fitted cost model ({error!r})") from error

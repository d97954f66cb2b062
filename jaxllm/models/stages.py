"""Which layers each stage of a pipeline has: consecutive ones, shared out as evenly as they can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages that share a model's layers.

    All stages run one program on arrays of one shape. So each has as many places for layers of a kind as
    the one that has most of that kind, and where they do not divide, the last places of some are empty.

    Attributes:
        num_layers: of the model.
        count: stages.
    """

    num_layers: int
    count: int

    @property
    def places(self) -> int:
        """Layers that a stage has room for."""
        return -(-self.num_layers // self.count)

    def layers_of(self, stage: int) -> range:
        """The layers of a stage; the first stages have one more where they do not divide."""
        count, more = divmod(self.num_layers, self.count)
        first = stage * count + min(stage, more)
        return range(first, first + count + (stage < more))

    def stack_of(self, layers: Sequence[int]) -> tuple[int | None, ...]:
        """What is in each place of an array [count * places, ...] of some layers, which stages share.

        Args:
            layers: numbers of those layers.

        Returns:
            The index of one of them; None where the place is empty.
        """
        by_stage = [
            [i for i, layer in enumerate(layers) if layer in self.layers_of(s)] for s in range(self.count)
        ]
        places = max(map(len, by_stage))
        return tuple(index for own in by_stage for index in (*own, *[None] * (places - len(own))))

"""Which layers each stage of a pipeline has: consecutive ones, shared out as evenly as they can be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Stages:
    """The stages that share a model's layers.

    All stages run one program on arrays of one shape. So each has as many places for layers as the one
    that has most of them, and where the layers do not divide, the last place of some stages is empty.

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

    @property
    def stack(self) -> tuple[int | None, ...]:
        """The layer in each place of an array [count * places, ...] that stages share; None is empty."""
        empty = (None,) * self.places
        return tuple(
            layer for s in range(self.count) for layer in (*self.layers_of(s), *empty)[: self.places]
        )

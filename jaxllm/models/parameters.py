"""What a parameter is before it has values: its shape and its logical axes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np

# Part of an array: start and stop in each dimension.
Region = tuple[tuple[int, int], ...]

# A parameter that exists once, or a per-layer one: stacked [layers, ...], or one array for each layer.
Parameters = dict[str, jax.Array | list[jax.Array]]


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A parameter that a decoder declares.

    Attributes:
        shape: without the layer axis.
        axes: logical axis of each dimension, as `sharding.rules` names them; None is never split.
        num_layers: how many layers have one of these; None where it is not per layer.
        exact: held in float32, whatever the dtype of the model.
        stack: where stages share the layers, which of these is in each place of the stacked array; None is
            an empty place. () where they stand one after the other.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_layers: int | None = None
    exact: bool = False
    stack: tuple[int | None, ...] = ()

    @property
    def places(self) -> tuple[int | None, ...]:
        """Which of the layers that have one is in each place of an array [places, ...] of all of them."""
        return self.stack or tuple(range(self.num_layers or 0))

    def dtype(self, of_model: Any) -> np.dtype[Any]:
        """What it is held in, in a model of this dtype."""
        return np.dtype(np.float32 if self.exact else of_model)

    @property
    def size(self) -> int:
        """Elements, all layers together."""
        return math.prod(self.shape) * (1 if self.num_layers is None else self.num_layers)


class WeightSource(Protocol):
    """Something that weights are read from."""

    def read(self, parameter: str, layer: int | None, region: Region, out: np.ndarray) -> None:
        """Fills `out`, of the region's shape, with a region of one parameter (of one layer)."""

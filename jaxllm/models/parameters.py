"""What a parameter is before it has values: its shape and its logical axes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax

# A parameter that exists once, or a per-layer one: stacked [layers, ...], or one array for each layer.
Parameters = dict[str, jax.Array | list[jax.Array]]


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """A parameter that a decoder declares.

    Attributes:
        shape: without the layer axis.
        axes: logical axis of each dimension, as `sharding.rules` names them; None is never split.
        num_layers: how many layers have one of these; None where it is not per layer.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    num_layers: int | None = None

    @property
    def size(self) -> int:
        """Elements, all layers together."""
        return math.prod(self.shape) * (1 if self.num_layers is None else self.num_layers)

"""Modules split from their parameters, and the runs of layers that one of them stands for."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from flax import nnx

from jaxllm.layers.attention import OneOfWindows
from jaxllm.models.config import ModelConfig


@dataclass(frozen=True, slots=True)
class LikeLayers:
    """Consecutive layers that differ in nothing but their weights."""

    first: int
    count: int
    window: int | OneOfWindows | None
    has_experts: bool


def groups_of_like_layers(config: ModelConfig) -> list[LikeLayers]:
    """The layers of a model, in as few runs as there can be."""
    windows = config.layer_windows or (None,) * config.num_layers
    sparse = () if config.moe is None else config.moe.layers
    kinds = [(window, layer in sparse) for layer, window in enumerate(windows)]
    groups, first = [], 0
    for (window, has_experts), run in itertools.groupby(kinds):
        count = len(list(run))
        groups.append(LikeLayers(first, count, window, has_experts))
        first += count
    return groups


def split_module(module: nnx.Module) -> tuple[nnx.GraphDef[Any], list[tuple[str, nnx.Param[Any]]]]:
    """A module's graph, and its parameters by dotted name."""
    graph, state = nnx.split(module)
    return graph, [(".".join(map(str, path)), param) for path, param in nnx.to_flat_state(state)]


def merge_module(
    graph: nnx.GraphDef[Any], declared: list[tuple[str, nnx.Param[Any]]], values: dict[str, Any]
) -> Any:
    """The module again, with values in place of declarations."""
    flat = [(tuple(name.split(".")), param.replace(values[name])) for name, param in declared]
    return nnx.merge(graph, nnx.from_flat_state(flat))

"""A safetensors checkpoint seen as the decoder's parameters, checked as a whole before it is read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxllm.errors import CheckpointError
from jaxllm.models.checkpoint import SafetensorsCheckpoint, is_float
from jaxllm.models.config import ModelConfig
from jaxllm.models.families import checkpoint_table
from jaxllm.models.parameters import ParameterSpec, Region
from jaxllm.models.table_builder import CheckpointTable, Piece

# Problems of a checkpoint that one message names.
_SHOWN = 8


class SafetensorsSource:
    """Reads parameters from the checkpoint in a directory.

    Raises:
        CheckpointError: naming every tensor (the first few of each kind) that is missing, unknown,
            misshapen or of a type that weights do not have; or two that should be the same differ.
    """

    def __init__(self, directory: Path, config: ModelConfig, specs: Mapping[str, ParameterSpec]) -> None:
        self._specs = specs
        self._pieces: dict[str, list[Piece]] = {}
        table = checkpoint_table(config)
        projections = () if config.pooler is None else config.pooler.projections
        self._checkpoint = SafetensorsCheckpoint(directory, [each.folder for each in projections])
        # Table name -> name on disk.
        self._names = _without_prefixes(self._checkpoint, table)
        for piece in (*table.pieces, *_alternative_in_use(table, self._names)):
            self._pieces.setdefault(piece.parameter, []).append(piece)
        _check_table(specs, self._pieces)
        self._check(config, table)

    def read(self, parameter: str, layer: int | None, region: Region, out: np.ndarray) -> None:
        """Fills `out` with a region of one parameter, converted to its dtype."""
        for piece in self._pieces[parameter]:
            within = _overlap(piece, self._specs[parameter].shape, region)
            if within is not None:
                target, source = within
                if piece.part:
                    starts = [start for start, _ in piece.part]
                    source = tuple((a + s, b + s) for (a, b), s in zip(source, starts, strict=True))
                self._checkpoint.copy(
                    self._names[piece.name(layer)],
                    factors=tuple(size for group in piece.factors for size in group),
                    order=piece.order,
                    region=source,
                    out=out[target],
                )

    def _check(self, config: ModelConfig, table: CheckpointTable) -> None:
        expected = {
            name: piece.disk_shape
            for pieces in self._pieces.values()
            for piece in pieces
            for name in piece.names
        }
        tensors = {name: self._checkpoint.tensors[stored] for name, stored in self._names.items()}
        ignored = re.compile("|".join(f"(?:{pattern})" for pattern in table.ignored) or r"(?!)")
        problems = {
            "missing": [name for name in expected if name not in tensors],
            "not part of this model": [
                name
                for name in tensors
                if name not in expected and name not in (table.tied or ()) and not ignored.fullmatch(name)
            ],
            "misshapen": [
                f"{name} is {list(tensors[name].shape)}, expected {list(shape)}"
                for name, shape in expected.items()
                if name in tensors and tensors[name].shape != shape
            ],
            "of a type that is not served (float32, float16 and bfloat16 are)": [
                f"{name} is {tensors[name].dtype}"
                for name in expected
                if name in tensors and not is_float(tensors[name].dtype)
            ],
        }
        found = [f"{len(names)} {kind}: {_some(names)}" for kind, names in problems.items() if names]
        if found:
            advice = "Check that config.json belongs to these weights"
            if "lm_head.weight" in problems["missing"]:
                advice += (
                    "; where input and output embeddings are one, give "
                    "hf_overrides={'tie_word_embeddings': True}"
                )
            raise CheckpointError(
                f"{self._checkpoint.directory} does not hold the weights of this {config.architecture}. "
                f"Tensors {'; tensors '.join(found)}. {advice}"
            )
        if table.tied is None or table.tied[0] not in tensors:
            return
        tied, original = table.tied
        if not self._checkpoint.equal(self._names[tied], self._names[original]):
            raise CheckpointError(
                f"config.json of {self._checkpoint.directory} says that {tied} and {original} are one tensor "
                "(tie_word_embeddings), but the checkpoint holds two different ones; give "
                "hf_overrides={'tie_word_embeddings': False} to use both"
            )


def _without_prefixes(checkpoint: SafetensorsCheckpoint, table: CheckpointTable) -> dict[str, str]:
    names: dict[str, str] = {}
    for stored in checkpoint.tensors:
        prefix = next((prefix for prefix in table.prefixes if stored.startswith(prefix)), "")
        name = stored.removeprefix(prefix)
        if name in names:
            raise CheckpointError(
                f"{checkpoint.directory} holds tensor {name!r} twice, as {names[name]!r} and {stored!r}; "
                "remove one of them"
            )
        names[name] = stored
    return names


def _alternative_in_use(table: CheckpointTable, names: Mapping[str, str]) -> tuple[Piece, ...]:
    """The one of the alternatives of which the checkpoint holds most tensors."""
    return max(
        table.alternatives,
        key=lambda pieces: sum(name in names for piece in pieces for name in piece.names),
        default=(),
    )


def _check_table(specs: Mapping[str, ParameterSpec], pieces: Mapping[str, list[Piece]]) -> None:
    """That the family's table fills exactly what the decoder declares."""
    for name in specs.keys() | pieces.keys():
        filled = sum(piece.size for piece in pieces.get(name, []))
        declared = math.prod(specs[name].shape) if name in specs else 0
        num_layers = (specs[name].num_layers if name in specs else None) or 0
        if filled != declared or any(len(piece.layers) != num_layers for piece in pieces[name]):
            raise CheckpointError(
                f"the decoder declares {declared} elements of parameter {name!r}, and the family's "
                "checkpoint "
                f"table fills {filled}; this is a mistake in the family's definition"
            )


def _overlap(
    piece: Piece, shape: tuple[int, ...], region: Region
) -> tuple[tuple[int | slice, ...], Region] | None:
    """Where a piece and a region of its parameter meet: index into the region, region of the piece."""
    target: list[int | slice] = []
    source: list[tuple[int, int]] = []
    for dimension, (start, stop) in enumerate(region):
        at = piece.at[dimension] if dimension < len(piece.at) else slice(None)
        if isinstance(at, int):
            if not start <= at < stop:
                return None
            target.append(at - start)
            continue
        first, last, _ = at.indices(shape[dimension])
        low, high = max(first, start), min(last, stop)
        if low >= high:
            return None
        target.append(slice(low - start, high - start))
        source.append((low - first, high - first))
    return tuple(target), tuple(source)


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown}, and {len(names) - _SHOWN} more"

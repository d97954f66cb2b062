"""What tests ask of a compiled module, beside what `benchmarks.hlo` reads from it."""

from __future__ import annotations

import re

import numpy as np

from benchmarks.hlo import Instruction, Module, collectives, parse

__all__ = ["Module", "collectives", "copies_of", "parse", "replica_groups"]


def copies_of(instructions: list[Instruction], shapes: set[str]) -> list[Instruction]:
    """Copies whose result has one of the shapes, as in "f32[4,8]"."""
    kinds = ("copy", "copy-start", "transpose", "dynamic-slice", "all-gather", "all-to-all", "reshape")
    return [one for one in instructions if one.opcode in kinds and one.shape in shapes]


def replica_groups(text: str) -> list[list[list[int]]]:
    """Of each collective that a module starts: who takes part, {{0,1},{2,3}} or a range in another shape."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in text.split(",")]

    found = []
    for lists, sizes, dimensions, order in re.findall(
        r"replica_groups=(?:\{(\{.*?\})\}|\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?)", text
    ):
        if lists:
            found.append([numbers(one) for one in re.findall(r"\{(.*?)\}", lists)])
        else:
            devices = np.arange(np.prod(numbers(dimensions))).reshape(numbers(dimensions))
            devices = devices.transpose(numbers(order)) if order else devices
            found.append(devices.reshape(numbers(sizes)).tolist())
    return found

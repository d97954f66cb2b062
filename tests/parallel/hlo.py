"""What tests ask of a compiled module, beside what `benchmarks.hlo` reads from it."""

from __future__ import annotations

from benchmarks.hlo import Instruction, Module, collectives, parse

__all__ = ["Module", "collectives", "copies_of", "parse"]


def copies_of(instructions: list[Instruction], shapes: set[str]) -> list[Instruction]:
    """Copies whose result has one of the shapes, as in "f32[4,8]"."""
    kinds = ("copy", "copy-start", "transpose", "dynamic-slice", "all-gather", "all-to-all", "reshape")
    return [one for one in instructions if one.opcode in kinds and one.shape in shapes]

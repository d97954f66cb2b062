"""What a compiled module does, read from its text: which collectives, in which loop, and which copies."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "all-to-all",
    "ragged-all-to-all",
    "reduce-scatter",
    "collective-permute",
    "collective-broadcast",
)
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"(?:^|[\s)}])([a-z][a-z0-9\-]*)\(")
_CALLED = re.compile(
    r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(?:branch_computations|called_computations)=\{([^}]*)\}"
)


@dataclass(frozen=True)
class Instruction:
    """One line: the opcode, and the result's shape as XLA writes it, without layouts."""

    opcode: str
    shape: str
    called: tuple[str, ...]

    @property
    def num_elements(self) -> int:
        """Of the largest array that it yields."""
        sizes = re.findall(r"\[([\d,]*)\]", self.shape)
        return max(math.prod(int(size) for size in one.split(",") if size) for one in sizes)


@dataclass
class Module:
    """The computations of a compiled module, by name."""

    computations: dict[str, list[Instruction]] = field(default_factory=dict)
    entry: str = ""

    def reached_from(self, computation: str) -> list[Instruction]:
        """The instructions of a computation and of all that it calls, each computation once a call."""
        found = []
        for instruction in self.computations[computation]:
            found.append(instruction)
            for name in instruction.called:
                found += self.reached_from(name)
        return found

    @property
    def instructions(self) -> list[Instruction]:
        return [one for computation in self.computations.values() for one in computation]

    def loops_over(self, shape: str) -> list[list[Instruction]]:
        """The outermost loops that carry an array of that shape, each as the instructions of its body."""
        found: list[list[Instruction]] = []

        def look(computation: str) -> None:
            for instruction in self.computations[computation]:
                if instruction.opcode == "while" and shape in instruction.shape:
                    found.append([one for name in instruction.called for one in self.reached_from(name)])
                else:
                    for name in instruction.called:
                        look(name)

        look(self.entry)
        return found


def parse(text: str) -> Module:
    """The module of `compiled.as_text()`."""
    module, current = Module(), None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            current = module.computations.setdefault(match[2], [])
            module.entry = match[2] if match[1] else module.entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            line = re.sub(r"\{[\d,]*(:[^}]*)?\}(?=[\s,)])", "", match[2])
            line = re.sub(r"/\*.*?\*/", "", line)
            opcode = _OPCODE.search(line)
            if opcode:
                called = [a or b for a, b in _CALLED.findall(match[2])]
                names = [name.strip(" %") for group in called for name in group.split(",")]
                current.append(Instruction(opcode[1], line[: opcode.start(1)].strip(), tuple(names)))
    return module


def collectives(instructions: list[Instruction]) -> Counter[str]:
    """How often each kind stands there; one that is started and awaited counts once."""
    kinds = (instruction.opcode.removesuffix("-start") for instruction in instructions)
    return Counter(kind for kind in kinds if kind in COLLECTIVES)


def copies_of(instructions: list[Instruction], shapes: set[str]) -> list[Instruction]:
    """Copies whose result has one of the shapes, as in "f32[4,8]"."""
    kinds = ("copy", "copy-start", "transpose", "dynamic-slice", "all-gather", "all-to-all", "reshape")
    return [one for one in instructions if one.opcode in kinds and one.shape in shapes]

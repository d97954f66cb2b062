"""What a compiled module does, read from its text: products, collectives, and how often a loop turns."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace

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
_ARRAY = re.compile(r"[a-z]\w*\[([\d,]*)\]")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


@dataclass(frozen=True)
class Instruction:
    """One line: the opcode, and the result's shape as XLA writes it, without layouts.

    Attributes:
        called: the computations that it calls.
        operands: what stands between the opcode's brackets, up to its end.
        line: all that follows the name.
    """

    name: str
    opcode: str
    shape: str
    called: tuple[str, ...]
    operands: str
    line: str

    @property
    def sizes(self) -> list[int]:
        """Elements of each array that it yields."""
        return [math.prod(_dimensions(one)) for one in _ARRAY.findall(self.shape)]

    @property
    def num_elements(self) -> int:
        """Of the largest array that it yields."""
        return max(self.sizes)

    @property
    def trips(self) -> int | None:
        """How often a loop's body runs; None where only the data say."""
        found = _TRIPS.search(self.line)
        return int(found[1]) if found else None


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
                names = tuple(name.strip(" %") for group in called for name in group.split(","))
                shape, operands = line[: opcode.start(1)].strip(), line[opcode.end(1) + 1 :]
                current.append(Instruction(match[1], opcode[1], shape, names, operands, match[2]))
    return module


def collectives(instructions: list[Instruction]) -> Counter[str]:
    """How often each kind stands there; one that is started and awaited counts once."""
    kinds = (instruction.opcode.removesuffix("-start") for instruction in instructions)
    return Counter(kind for kind in kinds if kind in COLLECTIVES)


@dataclass(frozen=True)
class Work:
    """What one run of a module does on one device.

    Attributes:
        flops: of its products, two for each multiplication and sum.
        collectives: how often each kind runs.
        elements: of the arrays that they yield, by kind.
    """

    flops: int = 0
    collectives: Counter[str] = field(default_factory=Counter)
    elements: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: Work) -> Work:
        return Work(
            self.flops + other.flops, self.collectives + other.collectives, self.elements + other.elements
        )

    def times(self, count: int) -> Work:
        """So much work, so often."""
        if count == 0:
            return Work()
        scaled = (
            Counter({kind: n * count for kind, n in c.items()}) for c in (self.collectives, self.elements)
        )
        return Work(self.flops * count, *scaled)


def work(module: Module) -> Work:
    """What a run does in which nobody asks for more than they must.

    A loop counts as often as it turns, and of the branches of a conditional the cheapest counts. Of loops
    whose number of turns only the data say products are left out, and collectives count once: who exchanges
    rows does it in rounds, and needs one of them unless the data are far off balance.
    """
    known: dict[str, Work] = {}

    def of(computation: str) -> Work:
        if computation not in known:
            arrays = {one.name: one for one in module.computations[computation]}
            known[computation] = sum((of_one(one, arrays) for one in arrays.values()), Work())
        return known[computation]

    def of_one(one: Instruction, arrays: dict[str, Instruction]) -> Work:
        if one.opcode == "while":
            turn = sum((of(name) for name in one.called), Work())
            return replace(turn, flops=0) if one.trips is None else turn.times(one.trips)
        if one.opcode == "conditional":
            return min(map(of, one.called), key=lambda w: (w.flops, sum(w.elements.values())))
        if one.opcode == "dot":
            return Work(flops=_flops(one, arrays))
        kind = one.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            # What is started yields its operand, too, unless the result takes its place.
            both = kind != one.opcode and kind != "all-reduce"
            elements = one.num_elements if both else sum(one.sizes)
            return Work(0, Counter({kind: 1}), Counter({kind: elements}))
        return sum(map(of, one.called), Work())

    return of(module.entry)


def _flops(dot: Instruction, arrays: dict[str, Instruction]) -> int:
    left = dot.operands.split(")")[0]
    inline = _ARRAY.match(left.strip())
    shape = inline[0] if inline else arrays[left.split(",")[0].strip(" %")].shape
    sizes = _dimensions(_ARRAY.findall(shape)[0])
    contracted = _CONTRACTED.search(dot.line)
    inner = math.prod(sizes[d] for d in _dimensions(contracted[1])) if contracted else 1
    return 2 * dot.num_elements * inner


def _dimensions(text: str) -> list[int]:
    return [int(size) for size in text.split(",") if size]

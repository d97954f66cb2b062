"""Bytes that a compiled module moves between the chip and its memory, loop bodies times their trips.

XLA's own analysis counts the body of a loop once and sees little of kernels. Here what an instruction reads
and writes is taken from the module's text: a slice reads what it yields, an update in place writes what it
is given, a kernel of Pallas moves what its cost estimate says, and what XLA keeps in the chip's fast memory
(S(1) in a layout) is not counted. Of a conditional the cheapest branch counts: what few requests ask for,
such as the log-probabilities of a prompt, is not the step's own traffic.
"""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(
    r"(body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|(branch_computations)=\{([^}]*)\}"
)
_ESTIMATE = re.compile(r'bytes_accessed\\*":"?(\d+)')
_BITS = {"pred": 8, "token": 0, "opaque": 0}
# They name, regroup or await what is there already.
_NOTHING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota", "partition-id"),
    *("replica-id", "opt-barrier", "add-dependency", "domain"),
}
_SLICES = {"dynamic-slice", "slice", "gather"}


@dataclass(frozen=True)
class _Line:
    """An instruction: its name, opcode, results as written, operands by name, and all that follows."""

    name: str
    opcode: str
    result: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    def called(self, kind: str) -> list[str]:
        found = [(k or b, one or many) for k, one, b, many in _CALLED.findall(self.attributes)]
        return [name.strip(" %") for key, names in found if key == kind for name in names.split(",")]


class Traffic:
    """The traffic of the module of `compiled.as_text()`.

    Args:
        experts: matrices of its own that a grouped product of XLA's reads; it is
            given those of all layers, and its estimate is of all.
    """

    def __init__(self, text: str, experts: int = 0) -> None:
        self._experts = experts
        self._lines: dict[str, dict[str, _Line]] = {}
        self._entry = ""
        current: dict[str, _Line] = {}
        for line in text.splitlines():
            if match := _COMPUTATION.match(line):
                current = self._lines.setdefault(match[2], {})
                self._entry = match[2] if match[1] else self._entry
            elif (parsed := _parse_line(line)) is not None:
                current[parsed.name] = parsed

    @property
    def bytes(self) -> int:
        """Of one run of the module."""
        return self._of_computation(self._entry)

    def largest(self, count: int = 20) -> list[tuple[int, str, str]]:
        """The instructions outside of fusions that move most in one execution: (bytes, computation, line)."""
        found = []
        for computation in self._reached(self._entry):
            for line in self._lines[computation].values():
                if line.opcode not in ("while", "conditional", "call"):
                    found.append(
                        (self._of_line(computation, line), computation, f"{line.name} {line.result}")
                    )
        return sorted(found, reverse=True)[:count]

    def _reached(self, computation: str) -> list[str]:
        found = [computation]
        for line in self._lines[computation].values():
            if line.opcode in ("while", "conditional", "call"):
                for kind in (
                    "body",
                    "to_apply",
                    "true_computation",
                    "false_computation",
                    "branch_computations",
                ):
                    found += [name for one in line.called(kind) for name in self._reached(one)]
        return found

    @functools.cache  # noqa: B019 - a module is read once and kept by who reads it
    def _of_computation(self, computation: str) -> int:
        return sum(self._of_line(computation, line) for line in self._lines[computation].values())

    def _of_line(self, computation: str, line: _Line) -> int:
        opcode = line.opcode
        if opcode in _NOTHING or opcode.endswith(("-done", "-update")):
            return 0
        if opcode == "while":
            [body], [condition] = line.called("body"), line.called("condition")
            return self._trips(condition) * self._of_computation(body)
        if opcode == "conditional":
            kinds = ("true_computation", "false_computation", "branch_computations")
            branches = [name for kind in kinds for name in line.called(kind)]
            return min(self._of_computation(branch) for branch in branches)
        if opcode == "call":
            [callee] = line.called("to_apply")
            return self._of_computation(callee)
        if opcode == "custom-call" and "ragged_dot_tiling" in line.attributes:
            *others, matrices = (self._lines[computation][name].result for name in line.operands)
            count = int(next(_ARRAY.finditer(matrices))[2].split(",")[0])
            return sum(map(num_bytes, [*others, line.result])) + num_bytes(matrices) * self._experts // count
        if opcode == "custom-call" and (estimate := _ESTIMATE.search(line.attributes)):
            return int(estimate[1])
        if opcode == "custom-call" and "AllocateBuffer" in line.attributes:
            return 0
        operands = [self._lines[computation].get(name) for name in line.operands]
        shapes = ["" if operand is None else operand.result for operand in operands]
        if opcode in ("fusion", "async-start"):
            [callee] = line.called("calls")
            reads = sum(self._read_of_parameter(callee, i, shape) for i, shape in enumerate(shapes))
            return reads + self._written(callee, line.result if opcode == "fusion" else _second(line.result))
        if opcode == "copy-start":
            return num_bytes(shapes[0]) + num_bytes(_first(line.result))
        if opcode.removesuffix("-start") in _SLICES:
            yielded = line.result if not opcode.endswith("-start") else _second(line.result)
            return (_all_bytes(yielded) if num_bytes(shapes[0]) else 0) + num_bytes(yielded)
        if opcode == "dynamic-update-slice":
            return num_bytes(shapes[1]) + (_all_bytes(shapes[1]) if num_bytes(line.result) else 0)
        if opcode == "scatter":
            return sum(map(num_bytes, shapes[1:])) + _all_bytes(shapes[-1])
        return sum(map(num_bytes, shapes)) + num_bytes(line.result)

    def _trips(self, condition: str) -> int:
        """How often a loop that counts up to a constant turns; 1 where it ends otherwise."""
        lines = self._lines[condition]
        [root] = [line for line in lines.values() if line.is_root]
        limits = [lines[name].operands[0] for name in root.operands if lines[name].opcode == "constant"]
        return int(limits[0]) if limits and "direction=LT" in root.attributes else 1

    def _read_of_parameter(self, computation: str, index: int, shape: str) -> int:
        """What a fusion reads of an operand: all, unless it only takes slices or updates it in place."""
        lines = self._lines[computation]
        [parameter] = [
            one for one in lines.values() if one.opcode == "parameter" and one.operands == (str(index),)
        ]
        if not num_bytes(shape):
            return 0
        return min(_all_bytes(shape), self._read_of(computation, parameter.name))

    def _read_of(self, computation: str, name: str) -> int:
        total, whole = 0, _all_bytes(self._lines[computation][name].result)
        for user in self._lines[computation].values():
            if name not in user.operands:
                continue
            if user.opcode in ("bitcast", "reshape") and not user.is_root:
                total += self._read_of(computation, user.name)
            elif user.opcode in _SLICES and user.operands[0] == name and name not in user.operands[1:]:
                total += _all_bytes(user.result)
            elif user.opcode in ("dynamic-update-slice", "scatter") and user.operands[0] == name:
                continue
            elif user.opcode == "fusion":
                [callee] = user.called("calls")
                for index, operand in enumerate(user.operands):
                    if operand == name:
                        total += self._read_of_parameter(callee, index, _in_memory(whole))
            else:
                return whole
        return total

    def _written(self, computation: str, result: str) -> int:
        """What a fusion with that result writes: all of it, but of an update in place only the update."""
        if not num_bytes(result):
            return 0
        [root] = [line for line in self._lines[computation].values() if line.is_root]
        parts = root.operands if root.opcode == "tuple" else (root.name,)
        written = 0
        for part, array in zip(parts, _ARRAY.finditer(result), strict=False):
            if num_bytes(array[0]):
                written += min(_all_bytes(array[0]), self._update(computation, part))
        return written

    def _update(self, computation: str, name: str) -> int:
        line = self._lines[computation][name]
        if line.opcode == "bitcast":
            return self._update(computation, line.operands[0])
        if line.opcode == "dynamic-update-slice":
            return _all_bytes(self._lines[computation][line.operands[1]].result)
        if line.opcode == "scatter":
            return _all_bytes(self._lines[computation][line.operands[-1]].result)
        if line.opcode == "fusion":
            [callee] = line.called("calls")
            return self._written(callee, re.sub(r"S\(\d\)", "", line.result))
        return _all_bytes(line.result)


def num_bytes(shape: str) -> int:
    """Of the arrays of a shape as XLA writes it that are in the chip's main memory."""
    return sum(_size(array) for array in _ARRAY.finditer(shape) if "S(" not in (array[3] or ""))


def _all_bytes(shape: str) -> int:
    return sum(_size(array) for array in _ARRAY.finditer(shape))


def _size(array: re.Match[str]) -> int:
    digits = re.search(r"\d+", array[1])
    bits = _BITS.get(array[1], int(digits[0]) if digits else 0)
    return math.prod(int(size) for size in array[2].split(",") if size) * bits // 8


def _in_memory(size: int) -> str:
    return f"u8[{size}]"


def _first(result: str) -> str:
    return next(_ARRAY.finditer(result))[0]


def _second(result: str) -> str:
    """The destination of what was started: after its operands come its results."""
    arrays = [array[0] for array in _ARRAY.finditer(result)]
    return arrays[1] if len(arrays) > 1 else arrays[0]


def _parse_line(line: str) -> _Line | None:
    head = re.match(r"^\s+(ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        return None
    rest = re.sub(r"/\*.*?\*/", "", line[head.end() :])
    opcode = re.search(r"(?:^|[\s)}\]])([a-z][a-z0-9\-]*)\(", rest)
    if opcode is None:
        return None
    depth, end = 1, opcode.end()
    while depth and end < len(rest):
        depth += {"(": 1, ")": -1}.get(rest[end], 0)
        end += 1
    inside, attributes = rest[opcode.end() : end - 1], rest[end:]
    named = tuple(re.findall(r"%([\w.\-]+)", inside)) or tuple(
        part.strip() for part in inside.split(",") if part.strip()
    )
    return _Line(head[2], opcode[1], rest[: opcode.start(1)].strip(), named, attributes, bool(head[1]))

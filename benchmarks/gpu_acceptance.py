"""One table of what `gpu_acceptance.sh` measured, each figure beside its goal.

python -m benchmarks.gpu_acceptance FOLDER
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import print_table


@dataclass(frozen=True, slots=True)
class Check:
    """A figure, and what it must at least be.

    Attributes:
        measured: None where the part that measures it has not come to it.
    """

    what: str
    measured: float | None
    goal: float

    @property
    def passed(self) -> bool:
        return self.measured is not None and self.measured >= self.goal


def kernel_checks(results: dict[str, Any] | None) -> Iterator[Check]:
    """The kernel against bandwidth, products and the fastest peer."""
    timings = [] if results is None else results["timings"]
    ours = [t for t in timings if t["implementation"] == "gpu"]

    def fraction(work: str, ceiling: str) -> float | None:
        found = [t for t in ours if t["layer"] == "qwen3-8b" and t["work"] == work]
        if not found or results is None:
            return None
        machine, timing = results["machine"], found[0]
        if ceiling == "copy":
            return float(timing["num_bytes"] / timing["seconds"] / machine["copy_bandwidth"])
        return float(timing["flops"] / timing["seconds"] / machine["matmul_flops"]["bfloat16"])

    yield Check("decode 64 x 8k, of copy bandwidth", fraction("decode 64 x 8k", "copy"), 0.80)
    yield Check("prefill 8k, of bfloat16 products", fraction("prefill 8k", "product"), 0.60)
    for timing in ours:
        if timing["times_as_fast_as"]:
            what = f"{timing['layer']}, {timing['work']}: times as fast as the best peer"
            yield Check(what, min(timing["times_as_fast_as"].values()), 1.0)


def engine_checks(results: dict[str, Any] | None) -> Iterator[Check]:
    """The engine against the time that a machine at its ceilings would take."""
    for prompts in (1, 64):
        found = (
            [] if results is None else [r for r in results["rows"] if r["workload"]["num_prompts"] == prompts]
        )
        measured = None
        if found:
            seconds = sorted(found[0]["seconds"])[len(found[0]["seconds"]) // 2]
            measured = found[0]["fastest_seconds"] / seconds
        yield Check(f"Qwen3-8B, {prompts} x 128 -> 128, of the floor", measured, 0.75)


def suite_check(folder: Path) -> Check:
    """Whether pytest ended with success."""
    status = dict(line.split() for line in (folder / "status.txt").read_text().splitlines())
    return Check("the attention suite passes (1: yes)", float(status.get("suite") == "0"), 1.0)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_acceptance", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="what gpu_acceptance.sh wrote")
    folder = parser.parse_args(arguments).folder

    def read(name: str) -> dict[str, Any] | None:
        path = folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    checks = [*kernel_checks(read("kernels")), *engine_checks(read("engine")), suite_check(folder)]
    rows: list[list[object]] = [
        [
            check.what,
            "not measured" if check.measured is None else f"{check.measured:.2f}",
            f"{check.goal:.2f}",
            "yes" if check.passed else "NO",
        ]
        for check in checks
    ]
    print_table(f"GPU acceptance, {folder}", ["", "measured", "at least", "reached"], rows)
    sys.exit(not all(check.passed for check in checks))


if __name__ == "__main__":
    main()

"""How fast weights get into place, and how much host memory it takes on the way.

    python -m benchmarks.loading --shape llama-135m
    python -m benchmarks.loading MODEL --dtype bfloat16 --json loading.json

Every row is a new process, which loads once and reports the time from the call until every array is
ready, and its peak memory while it did. "cold" is with the files dropped from the system's cache, "warm"
with them in it. The ceiling of a row is reading the same files, by plain reads, into fresh memory.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.checkpoint import write_checkpoint
from benchmarks.report import add_output_arguments, print_table, write_json
from benchmarks.shapes import SHAPES

ROOT = Path(__file__).parent.parent

# Runs in the child: arguments as JSON, the measurement as the last line of its output.
_CHILD = """
import json, sys, time
from pathlib import Path
import jax, jax.numpy as jnp
from jaxllm.models.decoder import parameter_specs
from jaxllm.models.families import translate_config
from jaxllm.models.hub import read_config
from jaxllm.models.loader import load_parameters

def memory(field):
    line = next(line for line in open("/proc/self/status") if line.startswith(field))
    return int(line.split()[1]) * 1024

path, dtype, load_format, stack_layers = json.loads(sys.argv[1])
config = translate_config(read_config(Path(path)))
specs = parameter_specs(config)
jnp.zeros(3).block_until_ready()
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak counts from here
before, began = memory("VmRSS"), time.perf_counter()
parameters = load_parameters(
    Path(path), config, specs, dtype=dtype, load_format=load_format, stack_layers=stack_layers
)
jax.block_until_ready(parameters)
seconds = time.perf_counter() - began
weights = sum(array.nbytes for array in jax.tree.leaves(parameters))
print(json.dumps({"seconds": seconds, "weight_bytes": weights, "peak_bytes": memory("VmHWM") - before}))
"""


@dataclass(frozen=True, slots=True)
class Load:
    """One loading of a model.

    Attributes:
        load_format: safetensors, orbax or dummy.
        layers: "list" of arrays, or "stacked" ones.
        cache: "cold" or "warm" files; "" where none are read.
        seconds: until every array was ready.
        ceiling_seconds: reading the files that hold the weights into fresh memory; 0 where none are read.
        peak_bytes: most memory that the process held beyond what it had before. On a CPU it includes
            the weights themselves.
    """

    load_format: str
    layers: str
    cache: str
    dtype: str
    seconds: float
    ceiling_seconds: float
    weight_bytes: int
    peak_bytes: int

    @property
    def peak_ratio(self) -> float:
        return self.peak_bytes / self.weight_bytes


@dataclass(frozen=True, slots=True)
class Results:
    """Everything that one run of this benchmark measured; each load is the median of its repeats by time."""

    model: str
    loads: list[Load]


def weight_files(path: Path, load_format: str) -> list[Path]:
    """The files that a format reads."""
    if load_format == "safetensors":
        return sorted(path.glob("*.safetensors"))
    if load_format == "orbax":
        return sorted(file for file in (path / "orbax").rglob("*") if file.is_file())
    return []


def drop_from_cache(files: list[Path]) -> None:
    """Asks the system to forget the contents of files."""
    for file in files:
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_seconds(files: list[Path]) -> float:
    """Time to read files, one after the other, into memory that was not touched before."""
    import numpy as np

    began = time.perf_counter()
    for file in files:
        buffer = np.empty(file.stat().st_size, np.uint8)
        with file.open("rb", buffering=0) as opened:
            view = memoryview(buffer.data)
            while view and (size := opened.readinto(view)):
                view = view[size:]
    return time.perf_counter() - began


def load_once(
    path: Path,
    *,
    dtype: str,
    load_format: str = "safetensors",
    stack_layers: bool = False,
    cache: str = "warm",
) -> Load:
    """Loads a model in a new process.

    Raises:
        RuntimeError: if it fails; the message holds the end of what it printed.
    """
    files = weight_files(path, load_format)
    prepare = drop_from_cache if cache == "cold" else read_seconds
    prepare(files)
    ceiling = read_seconds(files) if files else 0.0
    prepare(files)
    arguments = json.dumps([str(path), dtype, load_format, stack_layers])
    command = [sys.executable, "-c", _CHILD, arguments]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if child.returncode != 0:
        raise RuntimeError(f"the model did not load:\n{child.stderr[-3000:]}")
    measured = json.loads(child.stdout.splitlines()[-1])
    return Load(
        load_format=load_format,
        layers="stacked" if stack_layers else "list",
        cache=cache if files else "",
        dtype=dtype,
        ceiling_seconds=ceiling,
        **measured,
    )


@contextmanager
def model_directories(options: argparse.Namespace, dtype: str) -> Iterator[dict[str, Path]]:
    """Load format -> directory that holds the model in it, while the context lasts."""
    from jaxllm.convert import convert
    from jaxllm.models.hub import resolve_model

    with tempfile.TemporaryDirectory(prefix="jaxllm-loading-") as scratch:
        if options.shape:
            path = write_checkpoint(options.shape, Path(scratch) / options.shape, dtype=dtype)
        else:
            path = resolve_model(options.model or "demo")
        convert(str(path), Path(scratch) / "converted")
        yield {"safetensors": path, "orbax": Path(scratch) / "converted", "dummy": path}


def run(options: argparse.Namespace) -> Results:
    loads = []
    with model_directories(options, options.dtype) as directories:
        for load_format, path in directories.items():
            for cache in ("cold", "warm") if load_format != "dummy" else ("warm",):
                for stack_layers in (False, True):
                    repeats = [
                        load_once(
                            path,
                            dtype=options.dtype,
                            load_format=load_format,
                            stack_layers=stack_layers,
                            cache=cache,
                        )
                        for _ in range(options.repeats)
                    ]
                    loads.append(_median(repeats))
    return Results(options.shape or options.model or "demo", loads)


def _median(loads: list[Load]) -> Load:
    return sorted(loads, key=lambda load: load.seconds)[(len(loads) - 1) // 2]


def print_results(results: Results) -> None:
    rows: list[list[object]] = []
    for load in results.loads:
        rate = load.weight_bytes / load.seconds / 1e9
        share = f"{100 * load.ceiling_seconds / load.seconds:.0f} %" if load.ceiling_seconds else "-"
        rows.append(
            [
                load.load_format,
                load.layers,
                load.cache or "-",
                f"{load.seconds:.2f}",
                f"{rate:.2f}",
                share,
                f"{load.peak_ratio:.2f}",
            ]
        )
    gigabytes = results.loads[0].weight_bytes / 1e9
    print_table(
        f"{results.model}: {gigabytes:.2f} GB of weights as {results.loads[0].dtype}",
        ["format", "layers", "files", "seconds", "GB/s", "of the ceiling", "peak memory / weights"],
        rows,
        note="ceiling: plain reads of the same files into fresh memory",
    )


def main(arguments: list[str] | None = None) -> None:
    description = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loading", description=description)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("model", nargs="?", help="directory or hub name (default: the demo model)")
    which.add_argument("--shape", choices=sorted(SHAPES), help="a public shape with random weights, on disk")
    parser.add_argument("--dtype", default="float32", help="to load as, and of a shape's files")
    parser.add_argument("--repeats", type=int, default=3)
    add_output_arguments(parser, plot=False)
    options = parser.parse_args(arguments)
    results = run(options)
    print_results(results)
    write_json(options.json, results)


if __name__ == "__main__":
    main()

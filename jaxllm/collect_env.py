"""`python -m jaxllm.collect_env`: what a report of a problem should say about the machine."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import jaxllm

PACKAGES = (
    *("jax", "jaxlib", "flax", "numpy", "ml-dtypes", "libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin"),
    *("jax-triton", "numba", "transformers", "tokenizers", "safetensors", "huggingface-hub"),
    *("orbax-checkpoint", "llguidance", "fastapi", "pydantic", "uvicorn"),
)

# Beginnings of the names of variables that change what is computed, or where.
VARIABLES = ("CUDA_", "HF_", "JAX_", "JAXLLM_", "LIBTPU_", "NCCL_", "TPU_", "XLA_")
_SECRET = ("KEY", "TOKEN", "SECRET", "PASSWORD")


def main(argv: Sequence[str] | None = None, program: str = "python -m jaxllm.collect_env") -> int:
    """Print what there is; returns the exit status."""
    parser = argparse.ArgumentParser(prog=program, description="Describe this machine for a report.")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    arguments = parser.parse_args(argv)
    found = collect()
    if arguments.json:
        print(json.dumps(found, indent=2))
    else:
        print("\n".join(_lines(found)))
    return 0


def collect() -> dict[str, Any]:
    """The machine, by heading."""
    return {
        "jaxllm": jaxllm.__version__,
        "python": sys.version.replace("\n", " "),
        "system": platform.platform(),
        "processor": {"name": _processor(), "cores": os.cpu_count(), "memory GiB": _memory()},
        "packages": {name: version for name in PACKAGES if (version := _version(name)) is not None},
        "devices": _devices(),
        "environment": environment(os.environ),
    }


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """The variables that matter, without the values of secrets."""
    return {
        name: "(set)" if any(word in name for word in _SECRET) else value
        for name, value in sorted(variables.items())
        if name.startswith(VARIABLES)
    }


def _devices() -> list[str] | str:
    try:
        import jax

        return [f"{device.platform} {device.id}: {device.device_kind}" for device in jax.devices()]
    except Exception as error:  # Whatever is wrong is what the report is about.
        return f"{type(error).__name__}: {error}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _lines(found: Mapping[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, value in found.items():
        if isinstance(value, Mapping):
            lines += [f"{name}:", *(f"  {key}: {entry}" for key, entry in value.items())]
        elif isinstance(value, list):
            lines += [f"{name}:", *(f"  {entry}" for entry in value)]
        else:
            lines.append(f"{name}: {value}")
    return lines


if __name__ == "__main__":
    sys.exit(main())

"""The gpu backend compiled for H100 and H200, at the shapes of models: it fits, and copies no cache."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

pytestmark = pytest.mark.skipif(
    jax.__version_info__ < (0, 11)
    or importlib.util.find_spec("jax_cuda12_plugin") is None
    or importlib.util.find_spec("nvidia") is None,
    reason="needs JAX 0.11, its CUDA plugin and ptxas: see tests/kernels/compile_for_gpu.py",
)


@functools.cache
def reports(target: str, *names: str) -> dict[str, dict[str, Any]]:
    """A process of its own: the plugin is to start in an environment of its own."""
    command = [sys.executable, "-m", "tests.kernels.compile_for_gpu", target, *names]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "XLA_FLAGS": ""}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {report.pop("name"): report for report in lines}


def check(name: str, report: dict[str, Any]) -> None:
    # A head_dim of 256 leaves no register free in a prefill: a few of them go to the stack and back, more
    # where pages are widened.
    wide = "gemma" in name or "head_dim 256" in name
    latent = "deepseek" in name
    most_spilled = 0 if "decode" in name or not wide else 64 if "gemma" in name else 400
    assert report["spilled_bytes"] <= most_spilled, (name, report)
    # Two warpgroups that compute and two that fetch share 65,536 registers; 0: compiled for another name.
    most = 128 if "decode" in name and not wide and not latent else 255
    assert report["registers"] <= most, (name, report)
    assert report["cache_copies"] == 0, name
    # Queries of 128 heads of 576 numbers take much, and are gathered once.
    assert report["temporary_bytes"] < report["cache_bytes"] * (0.75 if latent else 0.5), name


def test_every_shape_compiles_for_h200() -> None:
    for name, report in reports("h200").items():
        check(name, report)


def test_the_common_shape_compiles_for_h100() -> None:
    names = "llama-3.1-8b, decode", "llama-3.1-8b, mixed"
    assert reports("h100", *names).keys() == set(names)
    for name, report in reports("h100", *names).items():
        check(name, report)

"""Runs the suites in `eight_devices/` where XLA simulates eight devices, which it does from its start on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# `families` takes as long as all others, and is run by a file of its own, which another core is given.
SUITES = sorted((Path(__file__).parent / "eight_devices").glob("*.py"))
OTHERS = [suite for suite in SUITES if suite.stem != "families"]


@pytest.mark.parametrize("suite", OTHERS, ids=lambda path: path.stem)
def test_on_eight_devices(suite: Path) -> None:
    run_suite(suite)


def run_suite(suite: Path) -> None:
    """Runs a suite in a process of its own."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(suite)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]

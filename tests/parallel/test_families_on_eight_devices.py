"""Runs `eight_devices/families.py`."""

from __future__ import annotations

from tests.parallel.test_eight_devices import SUITES, run_suite


def test_families() -> None:
    [suite] = [suite for suite in SUITES if suite.stem == "families"]
    run_suite(suite)

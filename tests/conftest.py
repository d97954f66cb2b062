"""What every test runs under: the CPU unless told otherwise, no network, deterministic examples in CI,
and engines that compile no more than they need, quickly.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from importlib.metadata import version

# Before anything imports JAX or huggingface_hub, which read these once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if os.environ["JAX_PLATFORMS"] == "cpu":
    # Optimising a step takes longer than a test runs it for. `XLA_FLAGS= pytest` tests what users run.
    quick = "--xla_backend_optimization_level=0"
    if version("jaxlib").startswith("0.10."):  # newer ones emit fusions in one way only
        quick += " --xla_cpu_use_fusion_emitters=false"
    os.environ.setdefault("XLA_FLAGS", quick)

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "local", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")

# A background job of a shell starts with SIGINT ignored, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Files that take long. They begin first, so that no core idles at the end while another is at one of them.
LONGEST = (
    "tests/parallel/test_eight_devices.py",
    "tests/parallel/test_families_on_eight_devices.py",
    "tests/hosts/test_processes.py",
    "tests/hosts/test_ray_hosts.py",
    "tests/test_readme.py",
    "tests/test_benchmarks.py",
    "tests/parity/test_live.py",
    "tests/parity/test_goldens.py",
    "tests/kernels/test_gpu.py",
    "tests/kernels/test_tpu.py",
    "tests/kernels/test_mla_tpu.py",
    "tests/kernels/test_ragged_paged_attention.py",
    "tests/llm/test_batched_equals_alone.py",
    "tests/llm/test_structured_outputs.py",
    "tests/serve/test_demo_server.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    missing = [name for name in LONGEST if not (config.rootpath / name).exists()]
    if missing:
        raise pytest.UsageError(f"tests/conftest.py: LONGEST names files that are not there: {missing}")
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.location[0], len(place)))


@pytest.fixture(scope="session", autouse=True)
def _largest_shapes() -> Iterator[None]:
    if "jax" not in sys.modules:  # all tests are collected: there will be no engine
        yield
        return
    from tests.engine_shapes import largest_shapes

    with largest_shapes():
        yield

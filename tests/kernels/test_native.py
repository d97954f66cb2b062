"""What kernels that numba compiles stand on: how they are compiled and kept, and tiles of products."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import jax
import pytest

from pallas_kernels.native import loading

HANDLER = "pallas_kernels.ragged_paged_attention.cpu_handler"
PACKAGE = Path(loading.__file__).parent.parent / "ragged_paged_attention"


def test_machine_code_lies_beside_that_of_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a folder for the sources as they are, since numba looks at the time of one of them alone."""
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    try:
        for place, parent in (
            (str(tmp_path), tmp_path),
            (None, PACKAGE / "__pycache__"),
            ("gs://bucket/compiled", PACKAGE / "__pycache__"),
        ):
            jax.config.update("jax_compilation_cache_dir", place)
            directory = loading.cache_directory(HANDLER)
            assert directory.parent == parent / "numba"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "pointers.py"))
    assert loading.cache_directory(HANDLER).name != directory.name


def test_a_kernel_that_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise RuntimeError("no space left\nin this house")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert (
        loading.load.__wrapped__("decodes", HANDLER) == "could not be compiled or registered: no space left"
    )

"""The CPU's kernel for decodes: what it promises beyond the suite, and how it is compiled and kept."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from pallas_kernels.ragged_paged_attention import cpu
from tests.kernels.backends import BACKENDS
from tests.kernels.ragged_batches import Shape, random_batch

BACKEND = next(backend for backend in BACKENDS if backend.name == "cpu")
# A chunk is of 32 keys here: sequences have up to 12 of them, which threads share.
SHAPE = Shape(16, 8, 128, 16, 24, 6, 6, decode_only=True, lse=True)


def test_a_decode_is_the_same_alone_bit_for_bit() -> None:
    """Whoever computes its chunks, and whatever else there is to compute."""
    batch = random_batch(SHAPE, 0, 1.0)
    out, cache, lse = BACKEND.run(batch, SHAPE)
    assert max(batch.seq_lens) > 5 * 32
    for s in range(int(batch.query_starts[-1])):
        first = [s, *(x for x in range(SHAPE.num_seqs) if x != s)]
        rows = {name: getattr(batch, name)[first] for name in ("q", "k", "v", "page_table")}
        lens = np.where(np.arange(SHAPE.num_seqs) == 0, batch.seq_lens[s], 0).astype(np.int32)
        starts = np.minimum(np.arange(SHAPE.num_seqs + 1), 1).astype(np.int32)
        alone = replace(batch, **rows, kv_pages=cache, seq_lens=lens, query_starts=starts)
        own_out, _, own_lse = BACKEND.run(alone, SHAPE)
        np.testing.assert_array_equal(own_out[0], out[s])
        np.testing.assert_array_equal(own_lse[0], lse[s])


def test_machine_code_lies_beside_that_of_steps(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In a folder for the sources as they are, since numba looks at the time of one of them alone."""
    before = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    try:
        for place, parent in (
            (str(tmp_path), tmp_path),
            (None, Path(cpu.__file__).parent / "__pycache__"),
            ("gs://bucket/compiled", Path(cpu.__file__).parent / "__pycache__"),
        ):
            jax.config.update("jax_compilation_cache_dir", place)
            directory = cpu._cache_directory()
            assert directory.parent == parent / "numba"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path.name == "native.py"))
    assert cpu._cache_directory().name != directory.name


def test_a_kernel_that_cannot_be_had_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> Any:
        raise RuntimeError("no space left\nin this house")

    monkeypatch.setattr(importlib, "import_module", fail)
    assert cpu._load.__wrapped__() == "could not be compiled or registered: no space left"

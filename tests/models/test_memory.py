"""Peak host memory of loading stays near the weights' own bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.loading import load_once
from tests.models.checkpoints import LLAMA, llama_tensors, write_model

CONFIG = {**LLAMA, "hidden_size": 1024, "intermediate_size": 2560, "vocab_size": 6000, "head_dim": 512}
_LARGE = {12: 1024, 24: 2048, 8: 2560, 22: 6000}


@pytest.fixture(scope="module")
def large_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tensors = {
        name: np.full([_LARGE[n] for n in value.shape], 0.5, np.float32)
        for name, value in llama_tensors().items()
    }
    return write_model(tmp_path_factory.mktemp("large"), tensors, CONFIG)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc, which only Linux has")
@pytest.mark.parametrize(
    ("dtype", "stack_layers"), [("float32", False), ("float32", True), ("bfloat16", False)]
)
def test_peak_memory_is_at_most_1_3_times_the_weights(
    large_model: Path, dtype: str, stack_layers: bool
) -> None:
    loaded = load_once(large_model, dtype=dtype, stack_layers=stack_layers)
    num_weights = (
        2 * 6000 * 1024 + 1024 + 2 * (2 * 1024 + 2 * 2048 * 1024 + 2 * 1024 * 1024 + 3 * 2560 * 1024)
    )
    assert loaded.weight_bytes == num_weights * (4 if dtype == "float32" else 2)
    assert 1.0 <= loaded.peak_ratio <= 1.3

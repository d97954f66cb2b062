"""Which attention kernel an engine runs."""

from __future__ import annotations

import logging

import jax
import pytest

from jaxllm.errors import ConfigError
from jaxllm.layers.attention import choose_backend
from pallas_kernels.ragged_paged_attention import BACKENDS


def test_the_choice_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_backend(None, "cpu") == choose_backend(None, "gpu") == "xla"
        assert choose_backend(None, "tpu") == "tpu"
        assert choose_backend("xla", "tpu") == "xla"
        assert choose_backend("reference", "cpu") == "reference"
        assert choose_backend("tpu", "tpu") == "tpu"
    assert "xla (the portable one" in caplog.text
    assert "reference (asked for)" in caplog.text


def test_what_cannot_run_here_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"there are {', '.join(BACKENDS)}"):
        choose_backend("cuda", "gpu")
    for backend in ("tpu", "gpu"):
        with pytest.raises(ConfigError, match=f"runs on a {backend.upper()}, and this process on cpu"):
            choose_backend(backend, "cpu")
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(ConfigError, match=r"needs JAX 0\.11"):
        choose_backend("gpu", "gpu")

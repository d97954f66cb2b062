"""Which attention kernel an engine runs."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import logging
import re
from typing import Any

import jax
import pytest

from jaxllm.errors import ConfigError
from jaxllm.layers.attention import choose_backend
from jaxllm.layers.latent_attention import choose_latent_backend
from jaxllm.models.config import MLAConfig
from pallas_kernels.native import loading, xla_ffi
from pallas_kernels.ragged_paged_attention import BACKENDS


@pytest.fixture(params=[True, False])
def has_jax_triton(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    found = object() if request.param else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.4.1")
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 2))
    return bool(request.param)


def test_the_choice_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_backend(None, "cpu", 64) == choose_backend("cpu", "cpu", 64) == "cpu"
        assert choose_backend(None, "gpu", 64) == "xla"
        assert choose_backend(None, "tpu", 64) == "tpu"
        assert choose_backend("xla", "tpu", 64) == "xla"
        assert choose_backend("reference", "cpu", 64) == "reference"
        assert choose_backend("tpu", "tpu", 64) == "tpu"
    assert "cpu (kernels for decodes and for prefills, compiled by numba)" in caplog.text
    assert "xla (the portable one" in caplog.text
    assert "reference (asked for)" in caplog.text


def test_a_gpu_older_than_hopper_takes_triton(has_jax_triton: bool, caplog: pytest.LogCaptureFixture) -> None:
    best = "triton" if has_jax_triton else "xla"
    with caplog.at_level(logging.INFO):
        assert choose_backend(None, "gpu", 128, 8.0) == choose_backend(None, "gpu", 256, 8.9) == best
    assert (
        "older than Hopper, its compute capability 8.9" if has_jax_triton else "pip install"
    ) in caplog.text
    with caplog.at_level(logging.INFO):
        assert choose_backend(None, "gpu", 128, 7.5) == choose_backend(None, "gpu", 512, 8.0) == "xla"
        assert choose_backend(None, "gpu", 128, 9.0) == choose_backend(None, "gpu", 128, None) == "xla"
    assert "8.0 (Ampere) or newer, and this one has 7.5" in caplog.text
    assert "head_dim of up to 256, and this model has 512" in caplog.text


def test_triton_may_be_asked_for_where_it_runs(has_jax_triton: bool) -> None:
    if has_jax_triton:
        assert choose_backend("triton", "gpu", 128, 9.0) == "triton"
    else:
        with pytest.raises(ConfigError, match=r"needs jax-triton: pip install"):
            choose_backend("triton", "gpu", 128, 9.0)
    with pytest.raises(ConfigError, match=r"NVIDIA GPU.*and this one is of none; or ask for xla"):
        choose_backend("triton", "gpu", 128)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ((importlib.util, "find_spec", lambda name: None), r"needs numba: pip install numba"),
        ((xla_ffi, "missing", lambda: "knows other versions"), r"knows other versions"),
        ((loading, "load", lambda target, module: "could not be compiled"), r"could not be compiled"),
    ],
    ids=["numba", "version", "compiler"],
)
def test_a_cpu_without_its_kernel_takes_the_portable_one(
    change: tuple[Any, str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(*change)
    with caplog.at_level(logging.INFO):
        assert choose_backend(None, "cpu", 64) == "xla"
    assert re.search(rf"xla \(the portable one; cpu {message}", caplog.text)
    with pytest.raises(ConfigError, match=rf"attention_backend='cpu' {message}; or ask for xla"):
        choose_backend("cpu", "cpu", 64)


def test_a_cpu_with_a_narrow_cache_takes_the_portable_one() -> None:
    assert choose_backend(None, "cpu", 64, dtype="bfloat16") == "xla"
    with pytest.raises(ConfigError, match=r"runs on a CPU, and this process on tpu"):
        choose_backend("cpu", "tpu", 64)


def test_a_version_of_the_ffi_that_is_not_known_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert xla_ffi.missing() is None
    monkeypatch.setattr(xla_ffi, "KNOWN_VERSIONS", ((9, 9),))
    reason = xla_ffi.missing.__wrapped__() or ""
    assert re.match(r"knows versions 9\.9 of XLA's FFI, and this is 0\.\d", reason)


DEEPSEEK = MLAConfig(q_lora_rank=0, kv_lora_rank=512, nope_head_dim=128, rope_head_dim=64, value_head_dim=128)


def test_latent_attention_has_a_choice_of_its_own(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.INFO):
        assert choose_latent_backend(None, "cpu", DEEPSEEK) == "xla"
        assert choose_latent_backend(None, "tpu", DEEPSEEK) == "tpu"
        assert choose_latent_backend("tpu", "tpu", DEEPSEEK) == "tpu"
    assert "xla (the portable one; latent attention" in caplog.text
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(ConfigError, match=r"'gpu': needs JAX 0\.11 .* ask for one of reference, xla\."):
        choose_latent_backend("gpu", "gpu", DEEPSEEK)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert choose_latent_backend("gpu", "gpu", DEEPSEEK) == "gpu"
    for backend, needed in (("tpu", "TPU"), ("gpu", "GPU"), ("triton", "GPU")):
        with pytest.raises(ConfigError, match=f"'{backend}': runs on a {needed}, and this process on cpu"):
            choose_latent_backend(backend, "cpu", DEEPSEEK)
    with pytest.raises(ConfigError, match=r"'cuda': .*no such backend.*reference, xla, tpu\."):
        choose_latent_backend("cuda", "tpu", DEEPSEEK)


@pytest.mark.parametrize("capability", [8.0, 9.0])
def test_latent_attention_takes_triton_on_every_gpu_that_runs_it(
    has_jax_triton: bool, capability: float, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        chosen = choose_latent_backend(None, "gpu", DEEPSEEK, capability)
    assert chosen == ("triton" if has_jax_triton else "xla")
    assert ("latent attention's own on GPUs" if has_jax_triton else "pip install") in caplog.text
    with caplog.at_level(logging.INFO):
        assert choose_latent_backend(None, "gpu", DEEPSEEK, 7.5) == "xla"
    assert "this one has 7.5" in caplog.text
    wide = dataclasses.replace(DEEPSEEK, kv_lora_rank=576)
    with pytest.raises(ConfigError, match=r"latents of up to 512 .* and this model has 576 and 64"):
        choose_latent_backend("triton", "gpu", wide, capability)


def test_a_jax_that_jax_triton_does_not_know_yet_is_named(
    has_jax_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    assert choose_backend(None, "gpu", 128, 8.0) == "xla"
    message = r"needs JAX 0\.11 beside jax-triton 0\.4\.1" if has_jax_triton else "pip install"
    with pytest.raises(ConfigError, match=message):
        choose_backend("triton", "gpu", 128, 8.0)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.0")
    assert choose_backend(None, "gpu", 128, 8.0) == ("triton" if has_jax_triton else "xla")


def test_what_cannot_run_here_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"there are {', '.join(BACKENDS)}"):
        choose_backend("cuda", "gpu", 64)
    for backend, needed in (("tpu", "TPU"), ("gpu", "GPU"), ("triton", "GPU")):
        with pytest.raises(ConfigError, match=f"runs on a {needed}, and this process on cpu"):
            choose_backend(backend, "cpu", 64)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    with pytest.raises(ConfigError, match=r"needs JAX 0\.11"):
        choose_backend("gpu", "gpu", 64)

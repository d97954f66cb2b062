"""How many pages the cache gets, and what is said where it is too small."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from benchmarks.shapes import SHAPES
from jaxllm.config import EngineConfig
from jaxllm.errors import InsufficientMemoryError
from jaxllm.execution import memory
from jaxllm.execution.memory import num_kv_pages, page_bytes, step_bytes, weight_bytes
from jaxllm.execution.platform import free_memory
from jaxllm.models.config import ModelConfig, MoEConfig
from jaxllm.models.families import translate_config
from jaxllm.models.fitting import fit_to_shards, shard_of
from jaxllm.models.parameters import ParameterSpec

MODEL = ModelConfig("LlamaForCausalLM", 100, 16, 32, 3, 4, 2, 8, 4096)
SPECS = {
    "embed.weight": ParameterSpec((100, 16), (None, None)),
    "layers.w": ParameterSpec((5, 7), (None, None), 3),
}
FLOAT32 = jnp.dtype(jnp.float32)
PAGE = 3 * 16 * 2 * 2 * 8 * 4
GIB = 2**30


def device_with(total: int, used: int = 0, platform: str = "gpu") -> Any:
    stats = {"bytes_limit": total, "bytes_in_use": used}
    return SimpleNamespace(platform=platform, memory_stats=lambda: stats)


def pages(device: Any = None, **arguments: Any) -> int:
    defaults = {"max_model_len": 100, "max_num_seqs": 4, "max_num_batched_tokens": 64}
    config = EngineConfig(**{**defaults, **arguments})
    return num_kv_pages(config, MODEL, FLOAT32, SPECS, [device or device_with(GIB)])


def test_sizes() -> None:
    assert page_bytes(MODEL, 16, FLOAT32) == PAGE
    assert page_bytes(MODEL, 16, jnp.dtype(jnp.bfloat16)) == PAGE // 2
    # One latent and one rotated key a layer; a TPU fills both of their rows up to whole registers.
    latent = translate_config(SHAPES["deepseek-v3"])
    assert page_bytes(latent, 16, jnp.dtype(jnp.bfloat16)) == 61 * 16 * 576 * 2
    assert page_bytes(latent, 16, jnp.dtype(jnp.bfloat16), "tpu") == 61 * 16 * 768 * 2
    assert weight_bytes(SPECS, FLOAT32) == (1600 + 3 * 35) * 4


def test_rows_of_experts_are_part_of_a_step() -> None:
    """At least what goes into the experts of all layers' tokens and comes out of them, in float32."""
    config = EngineConfig(max_num_seqs=4, max_num_batched_tokens=64)
    sparse = replace(MODEL, moe=MoEConfig(9, 5, 24, (0, 1, 2), True))
    more = step_bytes(config, sparse, FLOAT32) - step_bytes(config, MODEL, FLOAT32)
    assert more >= 64 * 5 * (16 + 24 + 24 + 16) * 4


def test_explicit_sizes_are_kept_to() -> None:
    """With one page more, the null page."""
    assert pages(num_gpu_blocks_override=9) == 10
    assert pages(kv_cache_memory_bytes=8 * PAGE + PAGE - 1) == 9
    assert pages(num_gpu_blocks_override=9, kv_cache_memory_bytes=100 * PAGE) == 10


def test_an_accelerator_gives_its_fraction_less_weights_and_a_step() -> None:
    config = EngineConfig(max_model_len=100, max_num_seqs=4, max_num_batched_tokens=64)
    needed = weight_bytes(SPECS, FLOAT32) + step_bytes(config, MODEL, FLOAT32)
    assert pages(device_with(GIB), gpu_memory_utilization=0.5) == (GIB // 2 - needed) // PAGE + 1
    # What others use of the device counts against the fraction, ...
    used = GIB // 4
    assert pages(device_with(GIB, used), gpu_memory_utilization=0.5) == (GIB // 4 - needed) // PAGE + 1
    # ... and all of it is never more than what is free.
    assert pages(device_with(GIB, used), gpu_memory_utilization=1.0) == (GIB - used - needed) // PAGE + 1


def test_a_cpu_gives_no_more_than_can_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: (GIB, GIB))
    cpu = device_with(GIB, platform="cpu")
    assert pages(cpu) == 2 * 4 * 7 + 1
    large = {"max_model_len": 4096, "max_num_seqs": 400, "max_num_batched_tokens": 512}
    assert pages(cpu, **large) == GIB // 8 // PAGE + 1
    needed = weight_bytes(SPECS, FLOAT32) + step_bytes(EngineConfig(**large), MODEL, FLOAT32)
    for free in (needed + GIB // 8, needed + GIB // 16 + 1):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: (GIB, free))
        assert (free - needed) // 4 // PAGE <= pages(cpu, **large) - 1 <= (free - needed) // 2 // PAGE


def test_a_little_more_or_less_free_memory_gives_a_cpu_the_same_cache(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The number of pages is part of what a compiled step is kept under.
    cpu, sizes = device_with(GIB, platform="cpu"), set()
    for free in range(GIB, GIB // 2, -GIB // 64):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: (GIB, free))
        sizes.add(pages(cpu, max_model_len=4096, max_num_seqs=400, max_num_batched_tokens=512))
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("arguments", "basis", "fits", "remedy"),
    [
        (
            {"num_gpu_blocks_override": 6},
            "num_gpu_blocks_override",
            96,
            "Pass a smaller max_model_len (at most 96), or raise num_gpu_blocks_override.",
        ),
        (
            {"kv_cache_memory_bytes": 3 * PAGE},
            "kv_cache_memory_bytes",
            48,
            "Pass a smaller max_model_len (at most 48), or raise kv_cache_memory_bytes.",
        ),
        ({"kv_cache_memory_bytes": 1}, "kv_cache_memory_bytes", 0, "Raise kv_cache_memory_bytes."),
        (
            {"gpu_memory_utilization": 0.0001},
            "gpu_memory_utilization=0.0001 of 1.00 GiB, less 0.00 GiB for weights and a step",
            0,
            "Raise gpu_memory_utilization, lower max_num_seqs or max_num_batched_tokens, or set "
            "kv_cache_memory_bytes.",
        ),
    ],
)
def test_a_cache_that_is_too_small(arguments: dict[str, Any], basis: str, fits: int, remedy: str) -> None:
    with pytest.raises(InsufficientMemoryError) as caught:
        pages(**arguments)
    assert str(caught.value) == (
        f"The KV cache ({basis}) would hold {fits} tokens, and one sequence of max_model_len=100 needs 112 "
        f"(0.00 GiB). {remedy}"
    )
    assert isinstance(caught.value, MemoryError)


def test_a_cpu_whose_memory_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: (GIB, 1000))
    with pytest.raises(
        InsufficientMemoryError,
        match=r"a share of 1\.00 GiB of which 0\.00 GiB are free.* would hold 0 tokens",
    ) as caught:
        pages(device_with(GIB, platform="cpu"))
    assert "Lower max_num_seqs or max_num_batched_tokens, or set kv_cache_memory_bytes." in str(caught.value)


def test_devices_that_share_a_model_have_more_pages() -> None:
    """kv_cache_memory_bytes is of each, and a page takes a device the less the more of them share it."""
    config = EngineConfig(
        max_model_len=100, max_num_seqs=4, max_num_batched_tokens=64, kv_cache_memory_bytes=8 * PAGE
    )
    for tensor, expected in ((1, 8), (2, 16), (4, 16)):  # two KV heads: four devices have a copy of one each
        shard = shard_of(fit_to_shards(MODEL, tensor), tensor)
        pages_of_shard = num_kv_pages(config, shard, FLOAT32, SPECS, [device_with(GIB)] * tensor)
        assert pages_of_shard == expected + 1


def test_the_fullest_device_decides() -> None:
    config = EngineConfig(max_model_len=100, max_num_seqs=4, max_num_batched_tokens=64)
    devices = [device_with(GIB), device_with(GIB, GIB // 4), device_with(GIB)]
    assert num_kv_pages(config, MODEL, FLOAT32, SPECS, devices) == pages(devices[1])


def test_one_sequence_is_enough() -> None:
    assert pages(num_gpu_blocks_override=7) == 8


def test_free_memory_of_this_machine_is_measured() -> None:
    total, free = free_memory(jax.devices("cpu")[0])
    assert 0 < free <= total
    assert free_memory(device_with(1000, 300)) == (1000, 700)


def test_a_tpu_holds_whole_tiles() -> None:
    bfloat16 = jnp.dtype(jnp.bfloat16)
    for kv_heads, head_dim, rows in ((8, 128, 16), (1, 128, 2), (3, 64, 4), (3, 128, 8), (5, 128, 16)):
        model = replace(MODEL, num_heads=kv_heads, num_kv_heads=kv_heads, head_dim=head_dim)
        assert page_bytes(model, 16, bfloat16, "tpu") == model.num_layers * 16 * rows * 128 * 2
    specs = {
        "layers.mlp.experts.down.weight": ParameterSpec((4, 8, 200), (None, None, "embed"), 2),
        "layers.mlp.down.weight": ParameterSpec((8, 200), ("embed", "mlp"), 2),
    }
    assert weight_bytes(specs, bfloat16, "xla") == 2 * (4 * 8 * 200 + 8 * 200) * 2
    assert weight_bytes(specs, bfloat16, "tpu") == 2 * (4 * 8 * 256 + 8 * 200) * 2

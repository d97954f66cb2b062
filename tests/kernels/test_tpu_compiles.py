"""The TPU kernel, compiled for v5e, v6e and v7x at the shapes that models serve."""

from __future__ import annotations

import importlib.util
import math
import re
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import pytest

from tests.kernels.compile_tpu import TOPOLOGIES, Served, compile_layers

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler (pip install 'jaxllm[compilers]')",
)

MODELS = {
    "llama-3.1-8b": Served(),
    "qwen3-0.6b": Served(heads=16),
    "llama-3.2-1b": Served(head_dim=64),
    "llama-3.1-70b, tp 8": Served(heads=8, kv_heads=1),
}
HEADS = {
    "head_dim 80": Served(head_dim=80),
    "head_dim 96": Served(head_dim=96),
    "head_dim 256, no groups": Served(heads=16, kv_heads=16, head_dim=256),
    "seven heads of one": Served(heads=7, kv_heads=1),
    "one narrow head": Served(heads=4, kv_heads=1, head_dim=64),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "window, cap, sinks, alibi, lse": {
        "options": {"window": 1000, "soft_cap": 30.0, "sinks": 1, "alibi_slopes": 1, "return_lse": True}
    },
    "spans": {"options": {"span_ends": 1}},
    "tree": {"options": {"tree_mask": 1}},
    "int8 pages": {"cache_dtype": "int8", "options": {"k_scale": 1, "v_scale": 1}},
    "float8 pages": {"cache_dtype": "float8_e4m3fn", "options": {"k_scale": 1, "v_scale": 1}},
    "float32": {"dtype": "float32", "cache_dtype": "float32"},
    "a million tokens": {"context": 2**20, "num_seqs": 2, "page_size": 16},
}


def copies_of_the_cache(module: str, served: Served) -> list[str]:
    shape = re.escape(f"[{','.join(map(str, served.cache_shape))}]")
    return re.findall(rf"= \w+{shape}\S* (?:copy|transpose|convert|copy-start)\(", module)


def check(chip: str, served: Served) -> None:
    compiled = compile_layers(chip, served)
    assert "tpu_custom_call" in compiled.as_text()
    assert not copies_of_the_cache(compiled.as_text(), served)
    cache_bytes = math.prod(served.cache_shape) * jnp.dtype(served.cache_dtype).itemsize
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache_bytes
    # Besides q, out, and the new keys and values of a layer there is nothing of any size.
    activations = served.num_tokens * served.heads * max(served.head_dim, 128) * 4
    table = served.num_seqs * served.context // served.page_size * 4
    assert memory.temp_size_in_bytes <= 8 * activations + 4 * table + 2**20


# Each model on each chip, and each size of page on each chip, without all that can be paired.
PAGE_SIZES = (16, 32, 128, 256)
DECODES = [
    (name, chip, PAGE_SIZES[(i + j) % 4])
    for i, name in enumerate(MODELS)
    for j, chip in enumerate(TOPOLOGIES)
]
MIXED = list(zip(MODELS, [*TOPOLOGIES, "v6e"], strict=True))


@pytest.mark.parametrize(("name", "chip", "page_size"), DECODES)
def test_decodes(name: str, chip: str, page_size: int) -> None:
    check(chip, replace(MODELS[name], page_size=page_size))


@pytest.mark.parametrize(("name", "chip"), MIXED)
def test_mixed(name: str, chip: str) -> None:
    check(chip, replace(MODELS[name], num_tokens=2048))


@pytest.mark.parametrize("name", HEADS)
def test_any_heads(name: str) -> None:
    check("v5e", replace(HEADS[name], num_tokens=256))


@pytest.mark.parametrize("name", OPTIONS)
def test_any_options(name: str) -> None:
    check("v6e", replace(Served(heads=8, kv_heads=2, num_tokens=256), **OPTIONS[name]))


def test_a_cache_that_is_kept_is_seen_to_be_copied() -> None:
    served = MODELS["llama-3.1-8b"]
    assert copies_of_the_cache(compile_layers("v5e", served, donate=False).as_text(), served)

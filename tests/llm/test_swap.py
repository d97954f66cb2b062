"""On the device: pages that go to the host and come back are the same, and so are all tokens."""

from __future__ import annotations

import random
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm import LLM, SamplingParams, TokensPrompt
from jaxllm.errors import ConfigError
from jaxllm.execution import host_pages
from jaxllm.execution.host_pages import HostPages

Traffic = tuple[list[TokensPrompt], list[SamplingParams]]


def test_copies_against_numpy() -> None:
    rng = np.random.default_rng(0)
    cache = rng.normal(size=(3, 40, 2, 4, 5)).astype(np.float32)
    device, host = cache.copy(), np.zeros((70, 3, 2, 4, 5), np.float32)
    kv_pages = jnp.asarray(cache)
    pages = HostPages(jax.ShapeDtypeStruct(cache.shape, cache.dtype), 70)
    kv_pages = pages.warm_up(kv_pages)
    for _ in range(12):
        out = tuple(zip(rng.permutation(39)[: rng.integers(39)] + 1, rng.permutation(70), strict=False))
        for page, to in out:
            host[to] = device[:, page]
        known = np.flatnonzero(host.any(axis=(1, 2, 3, 4)))
        back = tuple(zip(rng.permutation(known), rng.permutation(39)[: rng.integers(39)] + 1, strict=False))
        for page, to in back:
            device[:, to] = host[page]
        kv_pages = pages.copy(kv_pages, out, back)
        np.testing.assert_array_equal(np.asarray(kv_pages)[:, 1:], device[:, 1:])
        # The step goes on writing to pages that are still being copied out.
        kv_pages, device = kv_pages * 2, device * 2
    assert pages._gather._cache_size() == pages._scatter._cache_size() == 1, "a copy was compiled again"


def test_the_cache_is_written_in_place() -> None:
    cache = jax.ShapeDtypeStruct((4, 512, 16, 4, 32), jnp.float32)
    ids = jax.ShapeDtypeStruct((16,), jnp.int32)
    content = jax.ShapeDtypeStruct((16, 4, 16, 4, 32), jnp.float32)
    compiled = jax.jit(host_pages._scatter, donate_argnums=0).lower(cache, ids, content).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.size * 4
    assert memory.temp_size_in_bytes < cache.size


@pytest.fixture(scope="module")
def traffic() -> Traffic:
    rng = random.Random(2)
    stem = [rng.randrange(1000) for _ in range(40)]
    prompts = [
        TokensPrompt(prompt_token_ids=stem[: rng.randrange(40)] + rng.choices(range(1000), k=9 + i))
        for i in range(12)
    ]
    params = [
        SamplingParams(
            temperature=index % 2, seed=index, max_tokens=rng.randrange(20, 50), ignore_eos=True,
            presence_penalty=0.5 * (index % 3),
        )
        for index in range(12)
    ]  # fmt: skip
    return prompts, params


LIMITS: dict[str, Any] = {
    "max_model_len": 128,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 32,
    "num_gpu_blocks_override": 11,  # too few for two long sequences
    "forbid_recompile": True,
}


def run(traffic: Traffic, **arguments: Any) -> tuple[list[list[int]], int, int]:
    prompts, params = traffic
    with LLM(**LIMITS, **arguments) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
        scheduler = llm.llm_engine.scheduler
        scheduler.check_integrity()
        return [o.outputs[0].token_ids for o in outputs], scheduler.num_preemptions, scheduler.num_swaps


@pytest.fixture(scope="module")
def expected(traffic: Traffic) -> list[list[int]]:
    """What each gets when it runs alone, and so has room."""
    with LLM(**LIMITS) as llm:
        outputs = [llm.generate(*one, use_tqdm=False)[0] for one in zip(*traffic, strict=True)]
        assert llm.llm_engine.scheduler.num_preemptions == 0
        return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_tokens_are_those_of_requests_that_have_room(
    traffic: Traffic, expected: list[list[int]], prefix_caching: bool
) -> None:
    tokens, preemptions, swaps = run(traffic, enable_prefix_caching=prefix_caching, swap_space=0.01)
    assert preemptions == swaps > 0
    assert tokens == expected


def test_recompute_leaves_the_host_alone(traffic: Traffic, expected: list[list[int]]) -> None:
    tokens, preemptions, swaps = run(traffic, swap_space=0.01, preemption_mode="recompute")
    assert preemptions > 0 == swaps
    assert tokens == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"swap_space": -1.0}, "swap_space=-1.0"),
        ({"swap_space": 1e7}, "swap_space is .* GiB, and this machine has"),
        ({"preemption_mode": "swap"}, "needs memory of the host"),
        ({"preemption_mode": "both"}, "preemption_mode='both'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(max_model_len=32, max_num_seqs=1, max_num_batched_tokens=16, **arguments)

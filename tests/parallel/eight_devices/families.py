"""Every family on meshes of every kind: the tokens of one device, whatever the engine does to its requests.

Chunked prefill, a prefix cache, preemption, n > 1, biases and log-probabilities are all on. Each family is
on all axes of a mesh at once, and each kind of attention and of layers on four devices of one, where heads
are copied and stages hold fewest layers; `EVERY_MESH=1` has each family on every mesh.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from jaxllm.models.families import translate_config
from tests.parallel.eight_devices.same_tokens import LENGTHS, make_llm, serve, use_one_shape
from tests.parallel.models import FAMILIES, Oracle, hf_config, write_model


def mesh(data: int = 1, pipe: int = 1, tensor: int = 1, *, experts: bool = False) -> dict[str, Any]:
    """What an engine is told, with so few pages that requests are preempted."""
    return {
        "data_parallel_size": data,
        "pipeline_parallel_size": pipe,
        "tensor_parallel_size": tensor,
        "enable_expert_parallel": experts,
        # As many as stages can be busy with.
        **({"max_num_seqs": 4, "num_gpu_blocks_override": 19} if pipe > 1 else {}),
    }


MESHES = {
    "tp2": mesh(tensor=2),
    "tp4": mesh(tensor=4),
    "pp2": mesh(pipe=2),
    "pp4": mesh(pipe=4),
    "pp2-tp2": mesh(pipe=2, tensor=2),
    "dp2": mesh(data=2),
    "dp2-pp2-tp2": mesh(data=2, pipe=2, tensor=2),
    "tp4-ep": mesh(tensor=4, experts=True),
    "dp2-tp2-ep": mesh(data=2, tensor=2, experts=True),
    "dp2-pp2-tp2-ep": mesh(data=2, pipe=2, tensor=2, experts=True),
}
WITHOUT_EXPERTS = tuple(name for name, settings in MESHES.items() if not settings["enable_expert_parallel"])
CHOSEN: dict[str, tuple[str, ...]] = {
    "llama": ("tp4", "dp2-pp2-tp2"),
    "mistral-window": ("dp2-pp2-tp2",),
    "qwen2-layer-types": ("pp4", "dp2-pp2-tp2"),
    "qwen3-biases-mqa": ("tp4", "dp2-pp2-tp2"),
    "mixtral": ("tp4-ep", "dp2-pp2-tp2"),
    "qwen2-moe-every-other-layer": ("dp2-pp2-tp2-ep",),
    "qwen3-moe-mlp-in-the-middle": ("pp4", "dp2-pp2-tp2-ep"),
    "olmoe-clipped": ("dp2-pp2-tp2-ep",),
    "deepseek-v2": ("dp2-tp2-ep", "dp2-pp2-tp2"),
    "deepseek-v3": ("tp4", "dp2-pp2-tp2-ep"),
    "opt-post-norm-projected": ("dp2-pp2-tp2",),
    "gpt2": ("dp2-pp2-tp2",),
}
EVERY = {family: MESHES if "experts" in str(hf_config(family)) else WITHOUT_EXPERTS for family in FAMILIES}


def cases() -> list[tuple[str, str]]:
    chosen = EVERY if "EVERY_MESH" in os.environ else CHOSEN
    return [(family, name) for family in FAMILIES for name in chosen[family]]


@pytest.fixture(scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Oracle]:
    name, changes = request.param, FAMILIES[request.param]
    directory = write_model(tmp_path_factory.mktemp(name), name, **changes)
    return directory, Oracle(directory, translate_config(hf_config(name, **changes)))


@pytest.mark.parametrize(("model", "name"), cases(), indirect=["model"])
def test_tokens_and_logprobs(model: tuple[Path, Oracle], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, oracle = model
    if oracle.model.architecture != "LlamaForCausalLM":  # which decodes in a step of its own
        use_one_shape(monkeypatch)
    settings = MESHES[name]
    lengths = (*LENGTHS, 9, 17, 22, 20, 19, 11, 23, 18)
    at_once = settings["data_parallel_size"] * settings.get("max_num_seqs", 2)
    with make_llm(directory, **settings) as llm:
        serve(llm, oracle, lengths[: max(at_once * 3 // 2, 4)])
        stats = llm.llm_engine.stats()
        assert stats.num_preemptions > 0
        assert stats.prefix_cache_hits > 0

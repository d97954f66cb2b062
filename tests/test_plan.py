"""What each device would hold, against arithmetic by hand and the shardings that an engine compiles for."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from benchmarks.shapes import SHAPES
from jaxllm.config import EngineConfig
from jaxllm.execution.abstract import abstract_cache, abstract_parameters
from jaxllm.execution.layout import Layout, lay_out
from jaxllm.models.blocks import DecoderForm
from jaxllm.models.decoder import Decoder
from jaxllm.models.families import translate_config
from jaxllm.plan import _held, main
from sharding import MESH_AXES
from tests.parity.cases import CASES

ROOT = Path(__file__).parent.parent
GIB = 2**30


def layout_of(name: str, tensor: int = 1, pipe: int = 1, **settings: Any) -> Layout:
    model = translate_config(SHAPES[name])
    defaults = {
        "dtype": "bfloat16",
        "max_model_len": 8192,
        "max_num_seqs": 64,
        "max_num_batched_tokens": 2048,
    }
    config = EngineConfig(**{**defaults, **settings})
    return lay_out(config, model, tensor=tensor, pipe=pipe, device_memory=32e9)


def write_config(path: Path, name: str, **changes: Any) -> str:
    path.write_text(json.dumps({**SHAPES[name], **changes}))
    return str(path)


def test_llama_70b_on_eight_devices_by_hand() -> None:
    layout = layout_of("llama-3.1-70b", tensor=8)
    split = 80 * (2 * 64 * 128 * 8192 + 2 * 8 * 128 * 8192 + 3 * 28672 * 8192) + 2 * 129024 * 8192
    whole = (2 * 80 + 1) * 8192
    assert layout.num_bytes == 2 * (split + whole)
    assert layout.device_bytes == 2 * (split // 8 + whole)
    assert layout.page_bytes == 80 * 16 * 2 * 128 * 2
    assert layout.memory == int(32e9 * 0.92)
    pages = (layout.memory - layout.device_bytes - layout.step_bytes) // layout.page_bytes
    assert layout.num_tokens == (pages - 1) * 16  # the null page
    assert layout.concurrency == layout.num_tokens / 8192


def test_deepseek_v3_on_eight_devices_by_hand() -> None:
    layout = layout_of("deepseek-v3", tensor=8)
    # Split by heads, by inner widths, and by the vocabulary, filled up to whole chunks of every shard.
    attention = 128 * (1536 * 192 + 512 * (128 + 128) + 128 * 7168)
    experts = 58 * (256 + 1) * 3 * 2048 * 7168 + 3 * 3 * 18432 * 7168
    split = 61 * attention + experts + 2 * 131072 * 7168
    projections = 61 * 7168 * (1536 + 512 + 64) + 58 * (256 * 7168 + 256)
    norms = 61 * (2 * 7168 + 1536 + 512) + 7168
    assert layout.num_bytes == 2 * (split + projections + norms)
    assert layout.device_bytes == 2 * (split // 8 + projections + norms)
    # One row a token, which every device has.
    assert layout.page_bytes == 61 * 16 * (512 + 64) * 2
    on_tpu = layout_of("deepseek-v3", tensor=8, attention_backend="tpu")
    assert (on_tpu.page_bytes, on_tpu.cache_rows) == (61 * 16 * 768 * 2, (2, 384))


@pytest.mark.parametrize(
    ("name", "tensor", "pipe"),
    [
        *itertools.product(["llama-3.1-70b", "qwen3-30b-a3b"], [1, 2, 16], [1]),
        *itertools.product(["llama-3.1-70b", "qwen3-30b-a3b"], [4], [2]),
        *itertools.product(["llama-3.1-70b", "qwen3-30b-a3b"], [8], [4]),
        ("deepseek-v3", 1, 1),
        ("deepseek-v3", 16, 1),
        ("deepseek-v3", 8, 3),
    ],
)
def test_shapes_are_those_that_an_engine_compiles_for(name: str, tensor: int, pipe: int) -> None:
    model = translate_config(SHAPES[name])
    mesh = AbstractMesh((1, pipe, tensor), MESH_AXES)
    decoder = Decoder(model, DecoderForm(jnp.dtype("bfloat16"), False, True, "xla", mesh))
    arrays = abstract_parameters(decoder)
    layout = layout_of(name, tensor, pipe)
    assert {array.name for array in layout.arrays} == arrays.keys()
    for array in layout.arrays:
        held = arrays[array.name]  # in places for layers, some of which are empty
        assert array.shape[1:] == held.shape[1:]
        assert array.shape[0] == held.shape[0] or array.axes[0] == "layers"
        assert array.device_shape == held.sharding.shard_shape(held.shape), array.name
    cache = abstract_cache(decoder, 10, 16)
    per_device = jax.ShapeDtypeStruct(cache.sharding.shard_shape(cache.shape), cache.dtype)
    assert layout.page_bytes == per_device.size * 2 // 10


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_replicas_have_all_but_the_experts_each(expert_parallel: bool) -> None:
    model = translate_config(SHAPES["qwen3-30b-a3b"])
    mesh = AbstractMesh((4, 1, 2), MESH_AXES)
    form = DecoderForm(jnp.dtype("bfloat16"), False, True, "xla", mesh, expert_parallel)
    arrays = abstract_parameters(Decoder(model, form))
    settings = {"data_parallel_size": 4, "enable_expert_parallel": expert_parallel}
    layout = layout_of("qwen3-30b-a3b", 2, **settings)
    for array in layout.arrays:
        assert array.device_shape == arrays[array.name].sharding.shard_shape(array.shape), array.name
    one = layout_of("qwen3-30b-a3b", 2)
    experts = sum(array.num_bytes for array in one.arrays if ".experts." in array.name)
    assert experts == 48 * 128 * 3 * 2048 * 768 * 2
    assert layout.device_bytes == one.device_bytes - (experts // 2 - experts // 8) * expert_parallel
    assert layout.page_bytes == one.page_bytes
    assert (layout.num_tokens > one.num_tokens) == expert_parallel


def test_stages_share_the_layers_as_evenly_as_they_can() -> None:
    layout = layout_of("llama-3.2-1b", pipe=3)
    assert [list(layout.layers_of(stage)) for stage in range(3)] == [
        list(range(6)), list(range(6, 11)), list(range(11, 16)),
    ]  # fmt: skip
    down = next(array for array in layout.arrays if array.name == "layers.mlp.down.weight")
    assert (down.shape[0], down.device_shape[0]) == (16, 6)


def test_the_picture_says_what_a_device_holds() -> None:
    """Eight copies of four KV heads on 32 devices, and a part of every expert; there is no other MLP."""
    layout = layout_of("qwen3-30b-a3b", tensor=32, pipe=3)
    assert list(_held(layout, 1, 31)) == [
        "layers 16-31", "KV heads 3", "experts 0-127", "of each 744-767", "vocab 112896-114687",
    ]  # fmt: skip
    spread = layout_of("qwen3-30b-a3b", tensor=4, data_parallel_size=2, enable_expert_parallel=True)
    assert list(_held(spread, 0, 1))[2] == "experts 16-31, 80-95"
    dense = layout_of("llama-3.1-70b", tensor=2)
    assert list(_held(dense, 0, 1)) == [
        "layers 0-79",
        "KV heads 4-7",
        "MLP 14336-28671",
        "vocab 64256-128511",
    ]


def test_no_device_is_touched_and_no_weight_is_read(tmp_path: Path) -> None:
    model = write_config(tmp_path / "config.json", "llama-3.1-70b")
    code = (
        "import sys, jax\nfrom jax._src import xla_bridge\nfrom jaxllm.plan import main\n"
        "assert main(sys.argv[1:]) == 0\nassert not xla_bridge.backends_are_initialized()"
    )
    command = [sys.executable, "-c", code, model, "-tp", "8", "--device", "v6e", "--max-model-len", "8192"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "layers.mlp.down.weight" in result.stdout
    assert "80 x 8192 x 3584" in result.stdout


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_config(tmp_path / "config.json", "qwen3-8b")
    arguments = [str(tmp_path), "-tp", "16", "-pp", "2", "--max-model-len", "4096"]
    paths = ["--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.png")]
    assert main([*arguments, *paths]) == 0
    printed = capsys.readouterr().out
    assert "each of 8 KV heads is kept 2 times" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["stages"] == [[0, 18], [18, 36]]
    assert written["per_device"]["weight_bytes"] == sum(a["device_bytes"] for a in written["arrays"])
    assert (written["kv_heads"], written["kv_heads_with_copies"]) == (8, 16)
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, ["-tp", "3"], "'kv_heads' of size 8 does not divide by the 3 shards"),
        ({}, ["-pp", "33"], "pipeline_parallel_size=33 is more than the 32 layers"),
        ({}, ["--enable-expert-parallel"], "LlamaForCausalLM has no experts"),
        ({}, ["--device", "v5e"], "Raise --tensor-parallel-size, or lower --max-model-len"),
        ({"architectures": ["MambaForCausalLM"]}, [], "architectures=['MambaForCausalLM']"),
    ],
)
def test_what_cannot_be_is_an_error(
    changes: dict[str, Any],
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = write_config(tmp_path / "config.json", "llama-3.1-8b", **changes)
    assert main([model, *arguments]) == 1
    assert message in capsys.readouterr().err


def test_stages_of_unlike_layers_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Three MLPs, all in the first of four stages, which has 13 layers of experts; the others have 15."""
    layout = layout_of("deepseek-v3", tensor=8, pipe=4)
    places = {array.name: (array.shape[0], array.device_shape[0]) for array in layout.arrays}
    assert places["layers.attention.output.weight"] == (61, 16)
    assert places["layers.mlp.down.weight"] == (3, 3)
    assert places["layers.mlp.experts.down.weight"] == (58, 15)
    mlp, expert = 3 * 18432 * 7168, 3 * 2048 * 7168
    router = 256 * 7168 + 256
    attention = 128 * (1536 * 192 + 512 * (128 + 128) + 128 * 7168) // 8
    attention += 7168 * (1536 + 512 + 64) + 2 * 7168 + 1536 + 512
    assert layout.empty_bytes == 2 * (9 * mlp // 8 + 2 * (257 * expert // 8 + router) + 3 * attention)
    lines = [list(_held(layout, stage, 0)) for stage in (0, 1)]
    assert lines[0][2:4] == ["MLP 0-2303 of 3 layers", "experts 0-255 of 13 layers"]
    assert lines[1][2:4] == ["experts 0-255", "of each 0-255"]
    config = dict(CASES["qwen3-moe-mlp-in-the-middle"].config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main([str(tmp_path), "-pp", "2", "-dp", "2"]) == 0
    assert "as many layers of a kind as one of them has at most" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["opt", "gpt2", "qwen2-moe", "mixtral", "deepseek-v2"])
def test_every_family_has_a_plan(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(CASES[name].config)))
    assert main([str(tmp_path), "--max-num-seqs", "8"]) == 0
    assert "concurrency" in capsys.readouterr().out


def test_replicas_are_told_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(dict(CASES["mixtral"].config)))
    arguments = ["-dp", "2", "--enable-expert-parallel", "--max-num-seqs", "8"]
    arguments += ["--hf-overrides", '{"num_local_experts": 6}']
    assert main([str(tmp_path), *arguments, "--json", str(tmp_path / "out.json")]) == 0
    printed = capsys.readouterr().out
    assert "2 x 1 x 1 h200 (data x pipe x tensor)" in printed
    assert "experts by data" in printed and "pages by data" in printed
    assert printed.count("in each of 2 replicas") == 2
    assert json.loads((tmp_path / "out.json").read_text())["mesh"] == {"data": 2, "pipe": 1, "tensor": 1}

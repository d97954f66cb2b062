"""Whatever is wrong with a request or a model has an error that says so, and the engine serves on."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy bfloat16)
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm import LLM, BeamSearchParams, SamplingParams
from jaxllm.demo import demo_model_path
from jaxllm.errors import (
    CheckpointError,
    ConfigError,
    InsufficientMemoryError,
    InvalidRequestError,
    JaxLLMError,
    ModelNotFoundError,
    UnsupportedModelError,
)

GREEDY = SamplingParams(temperature=0, max_tokens=4)
LIMITS: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 64}
GOOD = "Q: What is the capital of France?\nA:"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**LIMITS) as llm:
        yield llm


@pytest.fixture(scope="module")
def good_answer(llm: LLM) -> str:
    return llm.generate(GOOD, GREEDY, use_tqdm=False)[0].outputs[0].text


@pytest.mark.parametrize(
    ("prompt", "fields", "says"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, None),
        ({"prompt_token_ids": []}, {}, "the prompt is empty"),
        ([5, 1536], {}, r"token id 1536 .*\[0, 1535\]"),
        ([5, -1], {}, "token id -1"),
        ([5, 2**40], {}, f"token id {2**40}"),
        ([5, "x"], {}, "must be integers; got 'x'"),
        ([5, 1.0], {}, "must be integers; got 1.0"),
        ([3] * 128, {}, "128 tokens.*max_model_len=128"),
        ("word " * 5000, {}, "max_model_len=128"),
        (7, {}, "a prompt must be"),
        ({"prompt": 7}, {}, "prompt must be a string"),
        ({"multi_modal_data": {}, "prompt_embeds": np.zeros(3)}, {}, "not supported"),
        (GOOD, {"stop_token_ids": [1536]}, "stop_token_ids"),
        (GOOD, {"allowed_token_ids": [1536]}, "allowed_token_ids"),
        (GOOD, {"logit_bias": {1536: 1.0}}, "logit_bias"),
        (GOOD, {"logprobs": 21}, "logprobs=21 is more than the 20"),
        (GOOD, {"prompt_logprobs": -1}, "prompt_logprobs=-1"),
        (GOOD, {"bad_words": ["  "]}, "bad_words"),
    ],
)
def test_a_bad_request(
    llm: LLM, good_answer: str, prompt: Any, fields: dict[str, Any], says: str | None
) -> None:
    params = SamplingParams(temperature=0, max_tokens=4, **fields)
    if says is None:
        assert llm.generate(prompt, params) == []
        return
    with pytest.raises(InvalidRequestError, match=says) as caught:
        llm.generate([GOOD, prompt], params)
    assert len(str(caught.value)) < 600
    assert not llm.llm_engine.has_unfinished_requests()
    assert llm.generate(GOOD, GREEDY, use_tqdm=False)[0].outputs[0].text == good_answer


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_p": 0},
        {"top_k": 1.5},
        {"n": 0},
        {"max_tokens": 0},
    ],
)
def test_a_parameter_changed_to_what_it_may_not_be(
    llm: LLM, good_answer: str, fields: dict[str, Any]
) -> None:
    params = SamplingParams()
    ((name, value),) = fields.items()
    setattr(params, name, value)
    with pytest.raises(InvalidRequestError, match=f"^{name} must be") as caught:
        llm.generate(GOOD, params)
    assert caught.value.param == name
    assert llm.generate(GOOD, GREEDY, use_tqdm=False)[0].outputs[0].text == good_answer


def test_a_beam_wider_than_the_engine_allows(llm: LLM, good_answer: str) -> None:
    with pytest.raises(InvalidRequestError, match="beam_width=11 needs 22"):
        llm.beam_search(GOOD, BeamSearchParams(11, 4))
    assert llm.generate(GOOD, GREEDY, use_tqdm=False)[0].outputs[0].text == good_answer


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the demo model, to be spoilt."""
    return Path(
        shutil.copytree(demo_model_path(), tmp_path / "model", ignore=shutil.ignore_patterns("__pycache__"))
    )


def change_config(model: Path, **values: Any) -> None:
    file = model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def shard(model: Path) -> list[Path]:
    """Split the weights in two files with an index."""
    file = model / "model.safetensors"
    tensors = load_file(file)
    names = sorted(tensors)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard_name, members in halves.items():
        save_file({name: tensors[name] for name in members}, model / shard_name, metadata={"format": "pt"})
    weight_map = {name: shard_name for shard_name, members in halves.items() for name in members}
    (model / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    file.unlink()
    return [model / shard_name for shard_name in halves]


def refuses(model: Path, error: type[JaxLLMError], says: str, **arguments: Any) -> None:
    with pytest.raises(error, match=says):
        LLM(str(model), **{**LIMITS, **arguments})


def test_more_context_than_the_model_has(model: Path) -> None:
    refuses(model, ConfigError, r"max_model_len.*4096.*2048", max_model_len=4096)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_model_len": 0},
        {"max_num_seqs": 0},
        {"max_num_batched_tokens": -1},
        {"block_size": 0},
        {"gpu_memory_utilization": 1.5},
        {"dtype": "float99"},
        {"load_format": "pickle"},
        {"seed": "x"},
        {"max_model_len": "128"},
        {"scheduling_policy": "fifo"},
        {"tensor_parallel_size": 0},
    ],
)
def test_an_argument_out_of_range(model: Path, arguments: dict[str, Any]) -> None:
    ((name, value),) = arguments.items()
    refuses(model, ConfigError, rf"(?s){name}.*{str(value).replace('.', '[.]')}", **arguments)


def test_a_missing_shard(model: Path) -> None:
    shard(model)[1].unlink()
    refuses(model, CheckpointError, "model-00002-of-00002.safetensors")


def test_a_truncated_file(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    refuses(model, CheckpointError, "model.safetensors")


def test_a_corrupt_file(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\xff" * 4096)
    refuses(model, CheckpointError, "model.safetensors")


def test_an_unknown_architecture(model: Path) -> None:
    change_config(model, architectures=["NovelForCausalLM"], model_type="novel")
    refuses(model, UnsupportedModelError, "NovelForCausalLM")


def test_a_shape_that_is_not_the_configs(model: Path) -> None:
    change_config(model, intermediate_size=479)
    refuses(model, CheckpointError, "479")


def test_no_memory_for_one_sequence(model: Path) -> None:
    refuses(model, InsufficientMemoryError, "128", kv_cache_memory_bytes=100)
    refuses(model, InsufficientMemoryError, "128", num_gpu_blocks_override=2)


def test_no_model_there(tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", ModelNotFoundError, "nowhere")
    (tmp_path / "empty").mkdir()
    refuses(tmp_path / "empty", ModelNotFoundError, "config.json")


def test_a_bad_generation_config(model: Path) -> None:
    (model / "generation_config.json").write_text(json.dumps({"temperature": -3}))
    refuses(model, ConfigError, r"temperature must be .*; got -3")


def test_two_shards_are_one_model(model: Path, good_answer: str) -> None:
    shard(model)
    with LLM(str(model), **LIMITS) as llm:
        assert llm.generate(GOOD, GREEDY, use_tqdm=False)[0].outputs[0].text == good_answer

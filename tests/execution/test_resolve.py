"""What a configuration leaves open is filled in; what contradicts the model or itself is named."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from typing import Any

import pytest

from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError
from jaxllm.execution.platform import Platform
from jaxllm.execution.resolve import resolve
from jaxllm.models.config import ModelConfig, RopeConfig

MODEL = ModelConfig("LlamaForCausalLM", 100, 16, 32, 2, 2, 1, 8, 4096, dtype="bfloat16")
CPU = Platform("cpu", default_max_num_seqs=64, default_max_num_batched_tokens=2048, checkpoint_dtype=False)
GPU = Platform("gpu")


def resolved(model: ModelConfig = MODEL, platform: Platform = CPU, **arguments: Any) -> EngineConfig:
    return resolve(EngineConfig(**arguments), model, platform)


@pytest.mark.parametrize(
    ("arguments", "param", "message"),
    [
        *(
            ({name: value}, name, f"{name}={value} must be an integer of at least 1.")
            for name in (
                "tensor_parallel_size",
                "pipeline_parallel_size",
                "data_parallel_size",
                "block_size",
                "max_model_len",
                "max_num_seqs",
                "max_num_batched_tokens",
                "kv_cache_memory_bytes",
                "num_gpu_blocks_override",
            )
            for value in (0, -3)
        ),
        *(
            (
                {"gpu_memory_utilization": value},
                "gpu_memory_utilization",
                f"gpu_memory_utilization={value} must be above 0 and at most 1.",
            )
            for value in (0.0, -0.5, 1.01, 90, float("nan"), float("inf"))
        ),
        ({"max_logprobs": -2}, "max_logprobs", "max_logprobs=-2 must be -1 (no limit) or more."),
        (
            {"max_model_len": 4097},
            "max_model_len",
            "max_model_len=4097 is beyond the 4096 positions that the model was made for (LlamaForCausalLM). "
            "Pass at most that, or set max_position_embeddings or a rope scaling through hf_overrides.",
        ),
        (
            {"max_num_batched_tokens": 8, "max_num_seqs": 9},
            "max_num_batched_tokens",
            "max_num_batched_tokens=8 is less than max_num_seqs=9, so that not every running request could "
            "get a token in a step. Raise the one or lower the other.",
        ),
        (
            {"max_num_batched_tokens": 64, "max_model_len": 65, "enable_chunked_prefill": False},
            "max_num_batched_tokens",
            "max_num_batched_tokens=64 is less than max_model_len=65, and without chunked prefill a prompt "
            "is computed in one step. Raise it, or leave enable_chunked_prefill on.",
        ),
        (
            {"dtype": "float8"},
            "dtype",
            "dtype='float8'; there are auto, half, float, float32, float16, bfloat16.",
        ),
    ],
)
def test_a_bad_value_is_named(arguments: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(**arguments)
    assert caught.value.param == param
    assert str(caught.value) == message


def test_devices_may_share_the_model() -> None:
    config = resolved(tensor_parallel_size=2, pipeline_parallel_size=MODEL.num_layers)
    assert (config.tensor_parallel_size, config.pipeline_parallel_size) == (2, MODEL.num_layers)
    assert resolved(data_parallel_size=2).data_parallel_size == 2


def test_a_stage_has_a_layer() -> None:
    message = f"pipeline_parallel_size={MODEL.num_layers + 1} is more than the {MODEL.num_layers} layers of"
    with pytest.raises(ConfigError, match=message):
        resolved(pipeline_parallel_size=MODEL.num_layers + 1)


def test_nothing_is_left_open() -> None:
    config = resolved()
    open_by_nature = {
        "tokenizer", "revision", "tokenizer_revision", "download_dir", "kv_cache_memory_bytes",
        "num_gpu_blocks_override", "attention_backend", "compilation_cache_dir",
        "record_schedule", "record_trace", "distributed_executor_backend", "distributed_timeout_seconds",
            "otlp_traces_endpoint",
    }  # fmt: skip
    unset = {f.name for f in fields(config) if getattr(config, f.name) is None}
    assert unset == open_by_nature
    assert (config.max_model_len, config.max_num_seqs, config.max_num_batched_tokens) == (4096, 64, 2048)


def test_what_was_given_stays() -> None:
    config = resolved(max_model_len=4096, max_num_seqs=3, max_num_batched_tokens=3, max_logprobs=-1)
    assert (config.max_model_len, config.max_num_seqs, config.max_num_batched_tokens) == (4096, 3, 3)
    assert resolve(config, MODEL, CPU) == config


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_model_len": 10, "max_num_seqs": 5}, 50),  # no step could ever fill more
        ({"max_model_len": 1, "max_num_seqs": 9}, 9),
        ({"max_num_seqs": 3000}, 3000),
        ({"enable_chunked_prefill": False}, 4096),
    ],
)
def test_default_token_budget(arguments: dict[str, Any], expected: int) -> None:
    assert resolved(**arguments).max_num_batched_tokens == expected


def test_default_number_of_sequences_follows_a_small_budget() -> None:
    """Whoever names the budget alone must not be told off for a number that they did not choose."""
    config = resolved(max_num_batched_tokens=16)
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (16, 16)
    assert resolved(max_num_batched_tokens=4000).max_num_seqs == 64


@pytest.mark.parametrize(
    ("dtype", "platform", "expected"),
    [
        ("auto", CPU, "float32"),
        ("auto", GPU, "bfloat16"),
        ("half", CPU, "float16"),
        ("float", GPU, "float32"),
        ("bfloat16", CPU, "bfloat16"),
    ],
)
def test_dtype(dtype: str, platform: Platform, expected: str) -> None:
    assert resolved(dtype=dtype, platform=platform).dtype == expected


def test_a_checkpoint_of_another_dtype_runs_in_float32() -> None:
    assert resolved(replace(MODEL, dtype="float64"), GPU).dtype == "float32"


def test_dynamic_rope_turns_prefix_caching_off(caplog: pytest.LogCaptureFixture) -> None:
    dynamic = replace(MODEL, rope=RopeConfig(10000.0, 8, "dynamic", 2.0))
    with caplog.at_level(logging.WARNING, logger="jaxllm"):
        assert resolved(dynamic).enable_prefix_caching is False
    assert "prefix caching is off" in caplog.text
    caplog.clear()
    assert resolved(replace(MODEL, rope=RopeConfig(10000.0, 8))).enable_prefix_caching is True
    assert resolved(dynamic, enable_prefix_caching=False).enable_prefix_caching is False
    assert not caplog.text

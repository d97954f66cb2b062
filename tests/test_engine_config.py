from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from jaxllm.config import EngineConfig, engine_config_from
from jaxllm.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("seed", "x", "an integer"),
        ("seed", True, "an integer"),
        ("seed", 1.0, "an integer"),
        ("seed", None, "an integer"),
        ("max_model_len", "128", "an integer or None"),
        ("gpu_memory_utilization", "0.5", "a number"),
        ("gpu_memory_utilization", True, "a number"),
        ("enable_prefix_caching", 1, "True or False"),
        ("dtype", 32, "a string"),
        ("hf_overrides", [("a", 1)], "a dict"),
        ("load_format", "pickle", "'auto' or 'safetensors'"),
        ("logprobs_mode", "logits", "'raw_logprobs'"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused(name: str, value: Any, allowed: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{name}={value!r} must be {allowed}")) as caught:
        EngineConfig(**{name: value})
    assert caught.value.param == name


def test_what_fits_is_accepted() -> None:
    config = EngineConfig(
        gpu_memory_utilization=1, max_model_len=None, hf_overrides={"a": 1}, load_format="dummy"
    )
    assert dataclasses.replace(config, seed=3).seed == 3
    assert engine_config_from("m", {"seed": None}).seed == 0

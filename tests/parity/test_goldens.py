"""Recorded results of Hugging Face, without torch: the translation and the tables, then the engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm.convert import convert
from jaxllm.models.decoder import parameter_specs
from jaxllm.models.families import translate_config
from jaxllm.models.hub import read_config
from jaxllm.models.loader import load_parameters
from tests.parity import engine
from tests.parity.cases import CASES
from tests.parity.checkpoints import NUM_GREEDY_TOKENS, write_checkpoint
from tests.parity.reference_forward import forward

GOLDENS = Path(__file__).parent / "goldens"
NAMES = list(CASES)
TOLERANCE = 1e-4


def read_golden(name: str) -> dict[str, Any]:
    return json.loads((GOLDENS / f"{name}.json").read_text())


def checkpoint(golden: dict[str, Any], directory: Path) -> Path:
    return write_checkpoint(directory, golden["config"], golden["shapes"], golden["seed"])


def test_every_case_is_recorded_as_it_stands() -> None:
    assert sorted(path.stem for path in GOLDENS.glob("*.json")) == sorted(NAMES)
    for name, case in CASES.items():
        golden = read_golden(name)
        assert golden["config"] == dict(case.config), f"record {name} anew"
        assert len(golden["prompt"]) == case.prompt_length
        assert len(golden["greedy"]) == NUM_GREEDY_TOKENS


@pytest.mark.parametrize("name", NAMES)
def test_parameters_compute_what_hugging_face_does(name: str, tmp_path: Path) -> None:
    golden = read_golden(name)
    directory = checkpoint(golden, tmp_path)
    config = translate_config(read_config(directory))
    parameters = load_parameters(directory, config, parameter_specs(config), dtype="float32")
    tokens = golden["prompt"] + golden["greedy"]
    num_prompt = len(golden["prompt"])
    logits = forward(config, parameters, tokens, num_prompt)
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    got = [logprobs[i, token] for i, token in enumerate(tokens[1:num_prompt])]
    np.testing.assert_allclose(got, golden["prompt_logprobs"], atol=TOLERANCE, rtol=0)
    assert logits[num_prompt - 1 : -1].argmax(-1).tolist() == golden["greedy"]


@pytest.mark.parametrize("name", NAMES)
def test_engine_equals_hugging_face(name: str, tmp_path: Path) -> None:
    golden = read_golden(name)
    logprobs, tokens = engine.run(checkpoint(golden, tmp_path), golden["prompt"], chunk=16)
    np.testing.assert_allclose(logprobs, golden["prompt_logprobs"], atol=TOLERANCE, rtol=0)
    assert tokens == golden["greedy"]


def test_a_converted_model_equals_hugging_face(tmp_path: Path) -> None:
    golden = read_golden("qwen2-window-upper-layers")
    convert(str(checkpoint(golden, tmp_path / "model")), tmp_path / "converted")
    logprobs, tokens = engine.run(tmp_path / "converted", golden["prompt"], chunk=16)
    np.testing.assert_allclose(logprobs, golden["prompt_logprobs"], atol=TOLERANCE, rtol=0)
    assert tokens == golden["greedy"]

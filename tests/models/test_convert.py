"""`python -m jaxllm.convert`: the same model, in our own layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxllm.convert import convert, main
from jaxllm.errors import ConfigError
from jaxllm.models.decoder import parameter_specs
from jaxllm.models.families import translate_config
from jaxllm.models.hub import read_config, resolve_model
from jaxllm.models.loader import load_parameters
from tests.models.checkpoints import LLAMA, llama_tensors, write_model


def load(directory: Path, dtype: str = "float32") -> dict[str, np.ndarray]:
    config = translate_config(read_config(directory))
    parameters = load_parameters(directory, config, parameter_specs(config), dtype=dtype)
    return {name: np.stack(value) for name, value in parameters.items()}


def test_a_converted_model_is_the_same_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "in", llama_tensors(), {**LLAMA, "torch_dtype": "float32"}, num_shards=2)
    (source / "tokenizer.json").write_text("{}")
    (source / "generation_config.json").write_text('{"top_k": 5}')
    (source / "chat_template.jinja").write_text("x")
    out = tmp_path / "out"
    assert main([str(source), str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "orbax",
        "tokenizer.json",
    ]
    want, got = load(source), load(resolve_model(str(out)))
    assert list(want) == list(got)
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_dtype_and_overrides_stay_with_the_copy(tmp_path: Path) -> None:
    source = write_model(tmp_path / "in", llama_tensors(), {**LLAMA, "torch_dtype": "float32"})
    convert(str(source), tmp_path / "out", dtype="bfloat16", hf_overrides={"rope_theta": 77.0})
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (saved["dtype"], saved["rope_theta"], "torch_dtype" in saved) == ("bfloat16", 77.0, False)
    want, got = load(source, "bfloat16"), load(tmp_path / "out", "bfloat16")
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)


def test_what_cannot_be_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_model(tmp_path / "in", llama_tensors())
    with pytest.raises(ConfigError, match="not an empty directory"):
        convert(str(source), source)
    convert(str(source), tmp_path / "out")
    with pytest.raises(ConfigError, match="in the layout of jaxllm already"):
        convert(str(tmp_path / "out"), tmp_path / "again")
    (source / "modules.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"of sentence-transformers, whose further files"):
        convert(str(source), tmp_path / "x")
    (source / "modules.json").unlink()
    assert main([str(tmp_path / "absent"), str(tmp_path / "x")]) == 1
    assert "there is no directory" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    (source / "model.safetensors").write_bytes(b"")
    assert main([str(source), str(tmp_path / "x")]) == 1
    assert not (tmp_path / "x").exists()

"""Hugging Face itself, side by side: models that it makes and saves, in every layout that it writes.

Needs torch (`pip install -e '.[test,parity]'`); `test_goldens.py` runs without it.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from jaxllm.errors import CheckpointError
from jaxllm.models.decoder import parameter_specs
from jaxllm.models.families import translate_config
from jaxllm.models.hub import read_config
from jaxllm.models.loader import load_parameters
from tests.parity import engine
from tests.parity.cases import CASES
from tests.parity.checkpoints import NUM_GREEDY_TOKENS, make_prompt, make_tensor
from tests.parity.reference_forward import forward

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[test,parity]'")
pytestmark = [
    pytest.mark.parity,
    # Of torch and transformers, about themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

# One case of each family, in the layouts that Hugging Face writes; all cases go through the engine.
WITH_EXPERTS = ["mixtral", "qwen2-moe", "qwen3-moe-mlp-in-the-middle", "olmoe-clipped", "deepseek-v3"]
LAYOUTS = [
    "llama-biases",
    "mistral-window",
    "qwen2-window-upper-layers",
    "qwen3",
    "opt",
    "gpt2",
    *WITH_EXPERTS,
]
TOLERANCE = 1e-4
SEED = 1234
# A greedy token counts only where no rounding can turn it.
LEAST_LEAD = 2e-4


def make_model(name: str, directory: Path, seed: int = SEED) -> torch.nn.Module:
    """A model of a case, made by Hugging Face, with weights under which every part matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from tests.parity.hugging_face import IMPLEMENTATIONS

    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(dict(CASES[name].config)))
    config = AutoConfig.from_pretrained(directory)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **IMPLEMENTATIONS)
    with torch.no_grad():
        # Also buffers that are part of the checkpoint: what DeepSeek-V3 adds to its routers' scores.
        for tensor, values in model.state_dict().items():
            values.copy_(torch.from_numpy(make_tensor(tensor, tuple(values.shape), seed)))
    return model.eval()


@pytest.mark.parametrize("name", CASES)
def test_engine_equals_hugging_face(name: str, tmp_path: Path) -> None:
    from tests.parity import hugging_face

    case = CASES[name]
    for seed in range(SEED, SEED + 10):
        model = make_model(name, tmp_path / f"config {seed}", seed)
        prompt = make_prompt(case.prompt_length, case.config["vocab_size"], seed)
        # First, since dynamic rope scaling in Hugging Face remembers the longest sequence it has seen.
        want_logprobs = hugging_face.prompt_logprobs(model, prompt)
        want_tokens, lead = hugging_face.greedy(model, prompt, NUM_GREEDY_TOKENS)
        if lead >= LEAST_LEAD:
            break
    assert lead >= LEAST_LEAD, "every seed had a close call"
    model.save_pretrained(tmp_path / "model")

    logprobs, tokens = engine.run(tmp_path / "model", prompt)
    np.testing.assert_allclose(logprobs, want_logprobs, atol=TOLERANCE, rtol=0)
    assert tokens == want_tokens


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for layout in ("one file", "shards", "bfloat16", "without prefix") for name in LAYOUTS]
    + [(name, "as in memory") for name in WITH_EXPERTS],
)
def test_every_layout_that_hugging_face_saves(name: str, layout: str, tmp_path: Path) -> None:
    from tests.parity import hugging_face

    model = make_model(name, tmp_path / "config")
    out = tmp_path / "model"
    if layout == "without prefix":
        model.base_model.save_pretrained(out)
        values = json.loads((out / "config.json").read_text())
        values["architectures"] = list(CASES[name].config["architectures"])
        (out / "config.json").write_text(json.dumps(values))
    else:
        model = model.to(torch.bfloat16) if layout == "bfloat16" else model
        # Experts are fused in memory, and apart in the format that models are published in.
        as_published = layout != "as in memory"
        size = "20KB" if layout == "shards" else "50GB"
        model.save_pretrained(out, max_shard_size=size, save_original_format=as_published)
    if layout == "bfloat16":
        # Read again, since casting a model also rounds its rotary frequencies.
        model = hugging_face.load(out)
    assert (out / "model.safetensors.index.json").exists() == (layout == "shards")

    config = translate_config(read_config(out))
    assert config.dtype == ("bfloat16" if layout == "bfloat16" else "float32")
    # What Hugging Face writes anew means what was asked for.
    assert dataclasses.replace(config, dtype="float32") == translate_config(CASES[name].config)
    if layout == "without prefix" and not config.tie_word_embeddings:
        with pytest.raises(CheckpointError, match=r"1 missing: lm_head\.weight"):
            load_parameters(out, config, parameter_specs(config), dtype="float32")
        return
    parameters = load_parameters(out, config, parameter_specs(config), dtype="float32")
    prompt = make_prompt(CASES[name].prompt_length, config.vocab_size, SEED)
    want = hugging_face.logits(model, prompt).numpy()
    np.testing.assert_allclose(forward(config, parameters, prompt), want, atol=2e-4, rtol=0)

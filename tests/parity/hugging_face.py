"""What Hugging Face computes: the expected values, live or to be recorded. Needs torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

transformers.utils.logging.set_verbosity_error()

# The plain ones; torch's grouped product does not take odd sizes.
IMPLEMENTATIONS = {"attn_implementation": "eager", "experts_implementation": "eager"}


def tensor_shapes(config: Mapping[str, Any], scratch: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes that Hugging Face itself saves for a model of this config."""
    scratch.mkdir(parents=True, exist_ok=True)
    import json

    from safetensors import safe_open

    (scratch / "config.json").write_text(json.dumps(dict(config)))
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(scratch))
    model.save_pretrained(scratch / "saved")
    with safe_open(scratch / "saved" / "model.safetensors", framework="numpy") as saved:
        return {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118


def load(directory: Path) -> torch.nn.Module:
    """The model in float32, with every weight accounted for."""
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, **IMPLEMENTATIONS
    )
    left = {kind: sorted(names) for kind, names in info.items() if names}
    assert not left, f"Hugging Face did not take the checkpoint as it is: {left}"
    return model.eval()


@torch.no_grad()
def logits(model: torch.nn.Module, token_ids: list[int]) -> torch.Tensor:
    """float32[tokens, vocabulary] of one sequence."""
    return model(torch.tensor([token_ids]), use_cache=False).logits[0]


def prompt_logprobs(model: torch.nn.Module, token_ids: list[int]) -> list[float]:
    """Log-probability of each prompt token but the first, given those before it."""
    logprobs = logits(model, token_ids).log_softmax(-1)
    return [logprobs[i, token].item() for i, token in enumerate(token_ids[1:])]


@torch.no_grad()
def greedy(model: torch.nn.Module, token_ids: list[int], num_tokens: int) -> tuple[list[int], float]:
    """Greedy continuation through the cache, and the smallest lead that a chosen token had."""
    tokens: list[int] = []
    lead = float("inf")
    inputs, cache = torch.tensor([token_ids]), None
    for _ in range(num_tokens):
        output = model(inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        top = output.logits[0, -1].topk(2)
        lead = min(lead, (top.values[0] - top.values[1]).item())
        tokens.append(int(top.indices[0]))
        inputs = torch.tensor([tokens[-1:]])
    return tokens, lead

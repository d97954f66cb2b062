"""A small model of every family whose heads two and four devices can share, with weights for all of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.models.config import ModelConfig
from jaxllm.models.decoder import parameter_specs
from jaxllm.models.families import checkpoint_table, translate_config
from jaxllm.models.loader import load_parameters
from tests.parity.cases import CASES
from tests.parity.checkpoints import write_checkpoint
from tests.parity.reference_forward import forward

# Vocabularies that end within a shard, and before the last one begins. Fewer KV heads than four shards
# wherever a family knows grouped queries.
_CHANGES: dict[str, dict[str, Any]] = {
    "llama": {"num_attention_heads": 8, "head_dim": 6, "vocab_size": 601},
    "mistral-window": {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 601},
    "qwen2-layer-types": {"num_attention_heads": 8, "vocab_size": 601},
    "qwen3-biases-mqa": {"num_attention_heads": 4, "vocab_size": 601, "tie_word_embeddings": True},
    "mixtral": {"num_attention_heads": 8, "head_dim": 6, "vocab_size": 601},
    "qwen2-moe": {"num_attention_heads": 8, "vocab_size": 601},
    "qwen2-moe-every-other-layer": {"num_attention_heads": 8, "vocab_size": 601},
    "qwen3-moe-mlp-in-the-middle": {"num_attention_heads": 8, "vocab_size": 601},
    "olmoe-clipped": {"num_attention_heads": 8, "vocab_size": 601, "intermediate_size": 28},
    "deepseek-v2": {"vocab_size": 601},
    "deepseek-v3": {"vocab_size": 601},
    "opt-post-norm-projected": {"num_attention_heads": 8, "vocab_size": 601},
    "gpt2": {"n_embd": 40, "n_head": 4, "vocab_size": 601},
}
# The same with layers that four stages share, and experts that as many devices do.
_WINDOWS = [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 5},
    "mistral-window": {"num_hidden_layers": 4},
    "qwen2-layer-types": {"num_hidden_layers": 5, "layer_types": _WINDOWS},
    "qwen3-biases-mqa": {"num_hidden_layers": 4},
    "mixtral": {"num_hidden_layers": 5, "num_local_experts": 8},
    "qwen2-moe-every-other-layer": {"num_hidden_layers": 5, "num_experts": 8, "layer_types": _WINDOWS},
    "qwen3-moe-mlp-in-the-middle": {"num_hidden_layers": 4, "num_experts": 8},
    "olmoe-clipped": {"num_hidden_layers": 4, "num_experts": 8},
    "deepseek-v2": {"num_hidden_layers": 4},
    "deepseek-v3": {"num_hidden_layers": 5, "first_k_dense_replace": 2},
    "opt-post-norm-projected": {"num_hidden_layers": 5},
    "gpt2": {"n_layer": 4},
}


def hf_config(name: str, **changes: Any) -> dict[str, Any]:
    return {**CASES[name].config, **_CHANGES[name], **changes}


def write_model(directory: Path, name: str, **changes: Any) -> Path:
    """A model directory with random weights."""
    config = hf_config(name, **changes)
    model = translate_config(config)
    table = checkpoint_table(model)
    pieces = (*table.pieces, *(table.alternatives[0] if table.alternatives else ()))
    shapes = {name: piece.disk_shape for piece in pieces for name in piece.names}
    return write_checkpoint(directory, config, shapes, seed=3)


class Oracle:
    """What a model must say, by the plain forward pass in float64."""

    def __init__(self, directory: Path, model: ModelConfig) -> None:
        self.model = model
        specs = parameter_specs(model)
        loaded = load_parameters(directory, model, specs, dtype="float32", stack_layers=True)
        self._parameters = {name: np.asarray(array, np.float64) for name, array in loaded.items()}
        self._logprobs = cache(self._compute)

    def logprobs(self, tokens: list[int]) -> np.ndarray:
        """float64[tokens, vocabulary] of what follows each token."""
        return self._logprobs(tuple(tokens))

    def _compute(self, tokens: tuple[int, ...]) -> np.ndarray:
        logits = forward(self.model, self._parameters, list(tokens))
        return logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)

    def check_greedy(
        self, prompt: list[int], output: list[int], count: int, bias: dict[int, float] | None = None
    ) -> None:
        """That the output is what `greedy` says: each token the best after all before it, in one pass."""
        logits = self.logprobs(prompt + output[:-1])[len(prompt) - 1 :].copy()
        for token, value in (bias or {}).items():
            logits[:, token] += value
        assert len(output) == count and output == logits.argmax(axis=-1).tolist()

    def greedy(self, prompt: list[int], count: int, bias: dict[int, float] | None = None) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            logits = self.logprobs(tokens)[-1].copy()
            for token, value in (bias or {}).items():
                logits[token] += value
            tokens.append(int(logits.argmax()))
        return tokens[len(prompt) :]

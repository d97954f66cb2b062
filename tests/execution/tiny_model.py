"""A model of a few thousand random weights, in the directory that an engine asks for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 131,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 5,
}


def write_config(directory: Path, **changes: Any) -> str:
    """The directory, now with a config.json; for `load_format="dummy"` nothing else is needed."""
    (directory / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return str(directory)

"""Small checkpoints on disk, and ways to spoil them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 22,
    "hidden_size": 12,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
}
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def llama_tensors(seed: int = 0, dtype: str = "float32") -> dict[str, np.ndarray]:
    """The tensors of a `LLAMA`, named and shaped as Hugging Face does."""
    shapes = {"model.embed_tokens.weight": (22, 12), "model.norm.weight": (12,), "lm_head.weight": (22, 12)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (12,),
            f"{prefix}.self_attn.q_proj.weight": (24, 12),
            f"{prefix}.self_attn.k_proj.weight": (12, 12),
            f"{prefix}.self_attn.v_proj.weight": (12, 12),
            f"{prefix}.self_attn.o_proj.weight": (12, 24),
            f"{prefix}.post_attention_layernorm.weight": (12,),
            f"{prefix}.mlp.gate_proj.weight": (8, 12),
            f"{prefix}.mlp.up_proj.weight": (8, 12),
            f"{prefix}.mlp.down_proj.weight": (12, 8),
        }
    generator = np.random.default_rng(seed)
    return {name: generator.standard_normal(shape).astype(DTYPES[dtype]) for name, shape in shapes.items()}


def write_model(
    directory: Path,
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any] = LLAMA,
    *,
    num_shards: int = 0,
) -> Path:
    """Writes a model directory: one file, or so many shards with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if not num_shards:
        save_file(dict(tensors), directory / "model.safetensors")
        return directory
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[shard::num_shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory

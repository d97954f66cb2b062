"""Checkpoints of random weights in Hugging Face's layout, for engines that must load the same files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from benchmarks.shapes import SHAPES, write_model_directory

_DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_SHARD_BYTES = 2 << 30


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a Llama, Mistral, Qwen3, Mixtral or Qwen3-MoE checkpoint."""
    hidden = config["hidden_size"]
    intermediate = config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.self_attn.q_proj.weight", (queries, hidden)
        yield f"{prefix}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, queries)
        if config["model_type"] in ("qwen3", "qwen3_moe"):
            yield f"{prefix}.self_attn.q_norm.weight", (head_dim,)
            yield f"{prefix}.self_attn.k_norm.weight", (head_dim,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
        yield from _mlp_shapes(config, prefix, hidden, intermediate)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def _mlp_shapes(
    config: dict[str, Any], prefix: str, hidden: int, intermediate: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """The MLP of a layer, or its router and experts."""
    block, names = "mlp", ("gate_proj", "up_proj", "down_proj")
    if config["model_type"] == "mixtral":
        block, names = "block_sparse_moe", ("w1", "w3", "w2")
    num_experts = config.get("num_local_experts") or config.get("num_experts")
    inner = config.get("moe_intermediate_size") or intermediate
    blocks = [f"{prefix}.{block}"]
    if num_experts:
        yield f"{prefix}.{block}.gate.weight", (num_experts, hidden)
        blocks = [f"{prefix}.{block}.experts.{expert}" for expert in range(num_experts)]
    gate, up, down = names
    for name in blocks:
        yield f"{name}.{gate}.weight", (inner, hidden)
        yield f"{name}.{up}.weight", (inner, hidden)
        yield f"{name}.{down}.weight", (hidden, inner)


def random_tensor(name: str, shape: tuple[int, ...], *, scale: float, seed: int) -> np.ndarray:
    """Norm weights are ones, the rest is normal; each tensor depends on its name and the seed alone."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
    return generator.standard_normal(shape, np.float32) * np.float32(scale)


def write_checkpoint(name: str, directory: Path, *, dtype: str = "float32", seed: int = 0) -> Path:
    """Writes a named shape with random weights into `directory`, in shards of at most 2 GiB.

    Raises:
        KeyError: if there is no shape or dtype of this name.
    """
    config = {**SHAPES[name], "dtype": dtype}
    write_model_directory(config, directory)
    shards: list[dict[str, np.ndarray]] = [{}]
    weight_map: dict[str, str] = {}
    size = total = 0

    def flush() -> None:
        file = f"model-{len(shards):05d}.safetensors"
        save_file(shards[-1], directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shards[-1], file))
        shards[-1] = {}

    for tensor_name, shape in tensor_shapes(config):
        tensor = random_tensor(tensor_name, shape, scale=config["initializer_range"], seed=seed)
        tensor = tensor.astype(_DTYPES[dtype])
        if shards[-1] and size + tensor.nbytes > _SHARD_BYTES:
            flush()
            shards.append({})
            size = 0
        shards[-1][tensor_name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory

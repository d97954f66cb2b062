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
from jaxllm.models.families import checkpoint_table, translate_config

_DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
_SHARD_BYTES = 2 << 30


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a checkpoint, as the model's family publishes them."""
    table = checkpoint_table(translate_config(config))
    pieces = (*table.pieces, *(table.alternatives[0] if table.alternatives else ()))
    for name, shape in {name: piece.disk_shape for piece in pieces for name in piece.names}.items():
        yield name if name == "lm_head.weight" else table.prefixes[0] + name, shape


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

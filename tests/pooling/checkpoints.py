"""Small pooling checkpoints, written by Hugging Face itself with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SIZES: dict[str, Any] = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 48,
}
BERT = {**SIZES, "type_vocab_size": 2, "pad_token_id": 0}
ROBERTA = {**SIZES, "max_position_embeddings": 50, "type_vocab_size": 1, "pad_token_id": 1}
QWEN3 = {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}


def save_model(directory: Path, kind: str, fields: dict[str, Any], seed: int = 0) -> Any:
    """Writes a random model of a Hugging Face class, and returns it; biases and norms are random, too."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model_class = getattr(transformers, kind)
    model = model_class(model_class.config_class(**fields)).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.ndim == 1:
                value.normal_(1.0 if "norm" in name.lower() and name.endswith("weight") else 0.0, 0.3)
            else:
                value.normal_(0.0, 1.2 / min(value.shape) ** 0.5)
    model.save_pretrained(directory)
    return model


def add_sentence_transformers(
    directory: Path, pooling: str, *, normalize: bool, dense: Sequence[Mapping[str, Any]] = ()
) -> None:
    """The files by which sentence-transformers says how a model pools.

    Args:
        dense: settings of the layers after the pooling.
    """
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling")]
    for i, layer in enumerate(dense):
        kinds.append((f"{i + 2}_Dense", "Dense"))
        (directory / f"{i + 2}_Dense").mkdir(exist_ok=True)
        (directory / f"{i + 2}_Dense" / "config.json").write_text(json.dumps(dict(layer)))
    if normalize:
        kinds.append((f"{len(kinds)}_Normalize", "Normalize"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    modes = (
        "cls_token",
        "mean_tokens",
        "max_tokens",
        "mean_sqrt_len_tokens",
        "weightedmean_tokens",
        "lasttoken",
    )
    settings = {f"pooling_mode_{mode}": mode == pooling for mode in modes}
    (directory / "1_Pooling").mkdir(exist_ok=True)
    (directory / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 24, **settings})
    )

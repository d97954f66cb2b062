"""What the files of sentence-transformers add to a model: how it pools, dense layers, prompts, its length."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxllm.errors import ConfigError, UnsupportedModelError
from jaxllm.models.config import ModelConfig, Pooler, Projection

# Keys of a pooling config that may be true, and what they mean here.
_POOLING_MODES = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
_SHORT_MODES = {"cls": "pooling_mode_cls_token", "mean": "pooling_mode_mean_tokens"}
# Classes of torch, by their last names, and what they are here.
_ACTIVATIONS = {
    "Identity": "identity",
    "Tanh": "tanh",
    "GELU": "gelu",
    "ReLU": "relu",
    "SiLU": "silu",
    "Sigmoid": "sigmoid",
}
_ORDER = ("Transformer", "Pooling", "Dense", "Normalize")


def read_modules(path: Path) -> list[Mapping[str, Any]] | None:
    """The entries of `modules.json`; None where sentence-transformers has not written one."""
    modules = read_json(path / "modules.json")
    if modules is None:
        return None
    return [entry for entry in modules if isinstance(entry, Mapping)] if isinstance(modules, list) else []


def add_modules(pooler: Pooler, modules: list[Mapping[str, Any]], path: Path) -> Pooler:
    """A pooler with what the modules after the transformer say.

    Raises:
        UnsupportedModelError: a module, or something that one asks for, is not served.
    """
    kinds = [str(entry.get("type", "")).rpartition(".")[2] for entry in modules]
    unknown = [kind for kind in kinds if kind not in _ORDER]
    if unknown:
        raise UnsupportedModelError(
            f"{path / 'modules.json'} has {', '.join(unknown)} after the transformer, which is not served; "
            f"{', '.join(_ORDER)} are."
        )
    if kinds != sorted(kinds, key=_ORDER.index):
        raise UnsupportedModelError(
            f"{path / 'modules.json'} has {', '.join(kinds)}, in this order; served is {', '.join(_ORDER)}."
        )
    folders = [str(entry.get("path", "")) for entry in modules]
    pooler = replace(
        pooler,
        normalize="Normalize" in kinds,
        projections=tuple(
            _projection(path, folder) for kind, folder in zip(kinds, folders, strict=True) if kind == "Dense"
        ),
    )
    includes_prompt = True
    for kind, folder in zip(kinds, folders, strict=True):
        if kind == "Pooling":
            settings = read_json(path / folder / "config.json") or {}
            includes_prompt = settings.get("include_prompt", True) is not False
            pooler = replace(pooler, pooling=_pooling(settings, path))  # type: ignore[arg-type]
    return _add_prompts(pooler, path, includes_prompt)


def _pooling(settings: Mapping[str, Any], path: Path) -> str:
    chosen = [key for key, value in settings.items() if key.startswith("pooling_mode_") and value is True]
    mode = settings.get("pooling_mode")
    if isinstance(mode, str):
        chosen = [_SHORT_MODES.get(mode, f"pooling_mode_{mode}")]
    if len(chosen) != 1 or chosen[0] not in _POOLING_MODES:
        raise UnsupportedModelError(
            f"the pooling of {path} is {', '.join(chosen) or 'not given'}; served is one of "
            f"{', '.join(_POOLING_MODES)}. Choose with pooler_config={{'pooling_type': ...}} and "
            "without modules.json."
        )
    return _POOLING_MODES[chosen[0]]


def _projection(path: Path, folder: str) -> Projection:
    """A `Dense` module."""
    file = path / folder / "config.json"
    settings = read_json(file) or {}
    inputs, outputs = settings.get("in_features"), settings.get("out_features")
    if type(inputs) is not int or type(outputs) is not int or min(inputs, outputs) < 1:
        raise ConfigError(
            f"{file} must give in_features and out_features, whole numbers above 0; {settings}."
        )
    name = str(settings.get("activation_function", "torch.nn.modules.activation.Tanh"))
    activation = _ACTIVATIONS.get(name.rpartition(".")[2].removesuffix("()"))
    if activation is None:
        raise UnsupportedModelError(
            f"{file} asks for {name} after its layer; served are {', '.join(_ACTIVATIONS)}."
        )
    for key in ("module_input_name", "module_output_name"):
        if settings.get(key) not in (None, "sentence_embedding"):
            raise UnsupportedModelError(
                f"{file} has {key}={settings[key]!r}; served are layers from sentence_embedding to "
                "sentence_embedding."
            )
    bias = settings.get("bias", True) is not False
    return Projection(folder, inputs, outputs, bias, activation)  # type: ignore[arg-type]


def _add_prompts(pooler: Pooler, path: Path, includes_prompt: bool) -> Pooler:
    """The texts that a model was trained to find before its inputs."""
    file = path / "config_sentence_transformers.json"
    settings = read_json(file) or {}
    prompts, default = settings.get("prompts") or {}, settings.get("default_prompt_name")
    if not isinstance(prompts, Mapping) or not all(isinstance(text, str) for text in prompts.values()):
        raise ConfigError(f"{file} has prompts={prompts!r}; it must be an object from names to texts.")
    if default is not None and default not in prompts:
        raise ConfigError(f"{file} has default_prompt_name={default!r}, which is none of its prompts.")
    if not includes_prompt and any(prompts.values()):
        raise UnsupportedModelError(
            f"the pooling of {path} leaves out the prompts of config_sentence_transformers.json "
            "(include_prompt=false), which is not served; remove the prompts from that file to do without."
        )
    return replace(pooler, prompts=tuple(prompts.items()), default_prompt=default)


def trained_length(config: ModelConfig, path: Path) -> int:
    """Tokens that sentence-transformers gives the model at most; it has seen no more in training."""
    settings = read_json(path / "sentence_bert_config.json") or {}
    if settings.get("do_lower_case"):
        raise UnsupportedModelError(
            f"{path / 'sentence_bert_config.json'} has do_lower_case, which is not served; where the "
            "tokenizer lowers its texts by itself, set it to false."
        )
    length = settings.get("max_seq_length")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        return config.max_position_embeddings
    return min(length, config.max_position_embeddings)


def read_json(path: Path) -> Any:
    """What a file holds; None where there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); download it again.") from error

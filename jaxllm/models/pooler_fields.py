"""How a model pools: from its architecture, its sentence-transformers files, and what the user says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from jaxllm.errors import ConfigError, UnsupportedModelError
from jaxllm.models.config import ModelConfig, Pooler
from jaxllm.models.fields import ConfigFields
from jaxllm.models.sentence_transformers import add_modules, read_modules, trained_length

_CLASSIFIER = "ForSequenceClassification"
_ACTIVATION_OF_PROBLEM = {
    "regression": "identity",
    "single_label_classification": "softmax",
    "multi_label_classification": "sigmoid",
}
_POOLING_TYPES = {"LAST": "last", "CLS": "first", "MEAN": "mean"}


def read_pooler(fields: ConfigFields, config: ModelConfig) -> Pooler | None:
    """What `config.json` says of pooling; None where the architecture is one that generates.

    Args:
        config: the rest of what it says; an encoder brings a pooler of its own.
    """
    architecture = fields.architecture
    # Written by sentence-transformers into the config of a cross-encoder.
    activation_name = fields.get("sbert_ce_default_activation_function")
    sentence_transformers = fields.get("sentence_transformers")
    matryoshka = _matryoshka(fields)
    if not architecture.endswith(("Model", _CLASSIFIER)) or architecture.endswith("LMHeadModel"):
        return None
    pooler = replace(config.pooler or Pooler("last"), matryoshka=matryoshka)
    if not architecture.endswith(_CLASSIFIER):
        return pooler
    labels = _labels(fields)
    problem = fields.get("problem_type")
    activation = "sigmoid" if len(labels) == 1 else "softmax"
    if problem is not None:
        activation = fields.choice("problem_type", _ACTIVATION_OF_PROBLEM, problem)
    if isinstance(sentence_transformers, Mapping):
        activation_name = sentence_transformers.get("activation_fn", activation_name)
    if activation_name is not None:
        activation = _activation_of_class(str(activation_name))
    return replace(
        pooler,
        labels=labels,
        dense=config.bidirectional,
        classifier_bias=config.bidirectional,
        activation=activation,  # type: ignore[arg-type]
    )


def resolve_pooling(
    config: ModelConfig, path: Path, *, runner: str, convert: str, overrides: Mapping[str, Any]
) -> ModelConfig:
    """The model as it is to be run: with a pooler where it shall pool, without where it shall generate.

    Args:
        path: the model's directory, which may hold files of sentence-transformers.
        runner: "auto", "generate" or "pooling".
        convert: "auto", "none" or "embed": whether a model that generates may be run as one that embeds.
        overrides: vLLM's `pooler_config`.

    Raises:
        ConfigError: the arguments contradict each other or the model.
        UnsupportedModelError: the model pools in a way that is not served.
    """
    modules = read_modules(path)
    pools = config.pooler is not None or modules is not None
    if runner == "generate" and config.pooler is not None:
        raise ConfigError(
            f"runner='generate', but {config.architecture} has no output head to generate with; leave runner "
            "out, or give runner='pooling'.",
            param="runner",
        )
    if convert == "classify":
        raise ConfigError(
            "convert='classify' would need a classifier that this checkpoint has not got; give one whose "
            f"architecture ends in {_CLASSIFIER}, or convert='embed'.",
            param="convert",
        )
    wanted = "pooling" if runner == "auto" and (pools or convert == "embed") else runner
    if wanted != "pooling":
        if overrides:
            raise ConfigError(
                f"pooler_config={dict(overrides)!r} belongs to pooling models; give runner='pooling', too.",
                param="pooler_config",
            )
        if convert == "embed":
            raise ConfigError("convert='embed' goes with runner='pooling'.", param="convert")
        return config
    if config.pooler is None and modules is None and convert == "none":
        raise ConfigError(
            f"runner='pooling' and convert='none': {config.architecture} generates. Leave convert out to run "
            "it as a model that embeds.",
            param="convert",
        )
    pooler = config.pooler or Pooler("last")
    if modules is not None:
        config = replace(config, max_position_embeddings=trained_length(config, path))
    if modules is not None and not pooler.labels:
        pooler = add_modules(pooler, modules, path)
        width = config.hidden_size
        for projection in pooler.projections:
            if projection.in_features != width:
                raise ConfigError(
                    f"{path / projection.folder} takes vectors of {projection.in_features} numbers, and gets "
                    f"some of {width}."
                )
            width = projection.out_features
    return replace(config, pooler=_overridden(pooler, overrides))


def _overridden(pooler: Pooler, overrides: Mapping[str, Any]) -> Pooler:
    for name, value in overrides.items():
        if value is None:
            continue
        if name in ("pooling_type", "seq_pooling_type"):
            if value not in _POOLING_TYPES:
                raise ConfigError(
                    f"pooler_config has {name}={value!r}; there are {', '.join(_POOLING_TYPES)}.",
                    param="pooler_config",
                )
            if pooler.labels and pooler.dense:
                raise ConfigError(
                    f"pooler_config has {name}={value!r}, but the classifier of this model was made for its "
                    "first token; leave it out.",
                    param="pooler_config",
                )
            pooler = replace(pooler, pooling=_POOLING_TYPES[value])  # type: ignore[arg-type]
        elif name == "use_activation" and isinstance(value, bool):
            if pooler.labels:
                pooler = pooler if value else replace(pooler, activation="identity")
            else:
                pooler = replace(pooler, normalize=value)
        else:
            raise ConfigError(
                f"pooler_config has {name}={value!r}; it takes pooling_type ({', '.join(_POOLING_TYPES)}) "
                "and use_activation (True or False).",
                param="pooler_config",
            )
    return pooler


def _labels(fields: ConfigFields) -> tuple[str, ...]:
    """Names of the classes by their index; two where the config says nothing, as Hugging Face has it."""
    names = fields.get("id2label")
    count = fields.optional_integer("num_labels")
    if not names:
        return tuple(f"LABEL_{i}" for i in range(count or 2))
    expected = [str(i) for i in range(len(names))] if isinstance(names, Mapping) else None
    if expected is None or sorted(map(str, names), key=str) != sorted(expected, key=str):
        raise fields.wrong("id2label", names, "an object from the class indices 0, 1, ... to names")
    if count is not None and count != len(names):
        raise fields.wrong("num_labels", count, f"{len(names)}, which is how many id2label has")
    return tuple(str({str(k): v for k, v in names.items()}[i]) for i in expected)


def _matryoshka(fields: ConfigFields) -> tuple[int, ...] | None:
    """Dimensions that embeddings may be cut to: () is any, None is none."""
    dimensions = fields.get("matryoshka_dimensions")
    if dimensions is not None:
        if not isinstance(dimensions, list) or any(type(d) is not int or d < 1 for d in dimensions):
            raise fields.wrong("matryoshka_dimensions", dimensions, "a list of whole numbers above 0")
        return tuple(dimensions)
    return () if fields.boolean("is_matryoshka", False) else None


def _activation_of_class(name: str) -> str:
    """ "torch.nn.modules.activation.Sigmoid" and its kind."""
    kind = name.rpartition(".")[2].removesuffix("()").lower()
    if kind not in ("identity", "sigmoid", "softmax"):
        raise UnsupportedModelError(
            f"config.json asks for {name!r} on scores; served are Identity, Sigmoid and Softmax"
        )
    return kind

"""Rotary embedding and its scalings, from either spelling of a Hugging Face config.

Transformers 4 writes `rope_theta` and `rope_scaling`; transformers 5 writes both into
`rope_parameters`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from jaxllm.errors import ConfigError, UnsupportedModelError
from jaxllm.models.config import RopeConfig
from jaxllm.models.fields import ConfigFields, as_number

Scaling = Literal["none", "linear", "dynamic", "llama3", "yarn"]
_SCALINGS: dict[str, Scaling] = {
    "default": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
}
_COMMON_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "finetuned"}
_SCALING_KEYS: dict[Scaling, set[str]] = {
    "none": set(),
    "linear": {"factor"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {
        "factor",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "truncate",
    },
}
_DEFAULT_THETA = 10_000.0


def read_rope(fields: ConfigFields, head_dim: int, max_position_embeddings: int) -> RopeConfig:
    """The rotary embedding that a config describes.

    Args:
        max_position_embeddings: as the config has it; the training context where the scaling does
            not name one.

    Raises:
        UnsupportedModelError: a scaling, or a field of one, that is not served.
        ConfigError: a value of the wrong type or range, or an odd `head_dim`.
    """
    values, label = _rope_values(fields)
    rope_type = values.get("rope_type", values.get("type", "default"))
    if rope_type not in _SCALINGS:
        raise UnsupportedModelError(
            f"config.json has {label} of rope_type={rope_type!r}; supported: {', '.join(_SCALINGS)}"
        )
    scaling = _SCALINGS[rope_type]
    unknown = {
        key: value
        for key, value in values.items()
        if key not in _COMMON_KEYS | _SCALING_KEYS[scaling] and value is not None
    }
    if unknown:
        raise UnsupportedModelError(
            f"config.json has {label} of rope_type={rope_type!r} with fields that it does not have: "
            f"{', '.join(f'{key}={value!r}' for key, value in sorted(unknown.items()))}"
        )
    if values.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise UnsupportedModelError(
            f"config.json has {label} with partial_rotary_factor={values['partial_rotary_factor']!r}; "
            "supported: 1.0"
        )
    if values.get("truncate") not in (None, True):
        raise UnsupportedModelError(
            f"config.json has {label} with truncate={values['truncate']!r}; supported: true"
        )
    if head_dim % 2:
        raise ConfigError(
            f"config.json gives head_dim={head_dim}; rotary embedding needs an even number", param="head_dim"
        )

    def number(key: str, default: float | None = None, *, minimum: float = 0.0) -> float:
        value = values.get(key)
        value = default if value is None else value
        if value is None:
            raise ConfigError(
                f"config.json has {label} of rope_type={rope_type!r} without {key!r}; add it", param=label
            )
        return as_number(fields, f"{label}.{key}", value, minimum=minimum)

    theta = number("rope_theta", minimum=1.0)
    if scaling == "none":
        return RopeConfig(theta=theta, rotary_dim=head_dim)

    outer_original = fields.optional_integer("original_max_position_embeddings")
    original = outer_original or int(
        number("original_max_position_embeddings", max_position_embeddings, minimum=1)
    )
    implied = max_position_embeddings / original if scaling == "yarn" else None
    factor = number("factor", implied, minimum=1.0)
    if scaling == "linear":
        return RopeConfig(theta=theta, rotary_dim=head_dim, scaling=scaling, factor=factor)
    if scaling == "dynamic":
        if head_dim < 4:
            raise ConfigError(
                f"config.json gives head_dim={head_dim}; dynamic scaling needs at least 4", param="head_dim"
            )
        # The length from which it acts is max_position_embeddings, whatever else the entry says.
        return RopeConfig(
            theta=theta,
            rotary_dim=head_dim,
            scaling=scaling,
            factor=factor,
            original_max_position=max_position_embeddings,
        )
    if scaling == "llama3":
        low, high = number("low_freq_factor"), number("high_freq_factor")
        if not 0 < low < high:
            raise ConfigError(
                f"config.json has {label} with low_freq_factor={low:g} and high_freq_factor={high:g}; the "
                "first must be above 0 and below the second",
                param=label,
            )
        return RopeConfig(
            theta=theta,
            rotary_dim=head_dim,
            scaling=scaling,
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=original,
        )
    return RopeConfig(
        theta=theta,
        rotary_dim=head_dim,
        scaling=scaling,
        factor=factor,
        original_max_position=original,
        # Zero and absent both mean the published default.
        beta_fast=number("beta_fast", 32.0) or 32.0,
        beta_slow=number("beta_slow", 1.0) or 1.0,
        attention_factor=_yarn_attention_factor(values, factor, number),
    )


def yarn_logit_scale(fields: ConfigFields, rope: RopeConfig) -> float:
    """What logits are multiplied by under `yarn` with `mscale_all_dim` (DeepSeek-V2), beside cos and sin."""
    values, label = _rope_values(fields)
    weight = values.get("mscale_all_dim")
    if rope.scaling != "yarn" or not weight:
        return 1.0
    return _yarn_scale(as_number(fields, f"{label}.mscale_all_dim", weight), rope.factor) ** 2


def served_positions(rope: RopeConfig, max_position_embeddings: int) -> int:
    """How many positions a model reaches with its scaling, as vLLM counts them.

    `max_position_embeddings` names the training context under `linear` and `dynamic`, and already
    the extended one under `llama3`; `yarn` configs do either, and name the training context apart.
    """
    if rope.scaling in ("linear", "dynamic"):
        return int(max_position_embeddings * rope.factor)
    if rope.scaling == "yarn":
        return int(rope.original_max_position * rope.factor)
    return max_position_embeddings


def _rope_values(fields: ConfigFields) -> tuple[dict[str, Any], str]:
    """The rope entry with `rope_theta` in it, and the name of the field it came from."""
    old, new = fields.get("rope_scaling"), fields.get("rope_parameters")
    for name, value in (("rope_scaling", old), ("rope_parameters", new)):
        if value is not None and not isinstance(value, Mapping):
            raise fields.wrong(name, value, "an object or null")
    if new:
        new = _one_for_all_layers(new)
    entry, label = (old, "rope_scaling") if old else (new or {}, "rope_parameters")
    thetas = (entry.get("rope_theta"), fields.get("rope_theta"), (new or {}).get("rope_theta"))
    theta = next((value for value in thetas if value is not None), _DEFAULT_THETA)
    return {**entry, "rope_theta": theta}, label


def _one_for_all_layers(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Transformers 5 may keep an entry for each layer type; they are served where all are the same."""
    entries = [value for value in values.values() if isinstance(value, Mapping)]
    if not entries:
        return values
    if len(entries) < len(values) or any(entry != entries[0] for entry in entries):
        raise UnsupportedModelError(
            f"config.json has rope_parameters that differ by layer type: {dict(values)!r}; supported: one "
            "for all layers"
        )
    return entries[0]


def _yarn_attention_factor(values: Mapping[str, Any], factor: float, number: Any) -> float:
    """What cos and sin are multiplied by (YaRN, Peng et al. 2023, section 3.4)."""
    if values.get("attention_factor") is not None:
        return float(number("attention_factor"))

    numerator, denominator = number("mscale", 0.0), number("mscale_all_dim", 0.0)
    if numerator and denominator:
        return _yarn_scale(numerator, factor) / _yarn_scale(denominator, factor)
    return _yarn_scale(1.0, factor)


def _yarn_scale(weight: float, factor: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0

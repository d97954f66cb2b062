"""Sliding attention windows of each layer, as families say them in a Hugging Face config."""

from __future__ import annotations

from jaxllm.errors import ConfigError
from jaxllm.models.fields import ConfigFields


def no_windows(fields: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    """Full attention everywhere."""
    return (None,) * num_layers


def same_window(fields: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    """The same in every layer."""
    return (fields.optional_integer("sliding_window"),) * num_layers


def qwen_windows(fields: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    """Windows by `layer_types` where given, else in every layer from `max_window_layers` on."""
    first = fields.optional_integer("max_window_layers", minimum=0)
    first = 28 if first is None else first
    return _windows_by_type(fields, [i >= first for i in range(num_layers)])


def qwen2_moe_windows(fields: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    """Windows by `layer_types` where given, else in every other layer before `max_window_layers`."""
    last = fields.optional_integer("max_window_layers", minimum=0)
    last = 28 if last is None else last
    return _windows_by_type(fields, [i % 2 == 0 and i < last for i in range(num_layers)])


def qwen3_moe_windows(fields: ConfigFields, num_layers: int) -> tuple[int | None, ...]:
    """Windows in every layer or in none; the family has outgrown the field that said in which."""
    fields.get("max_window_layers")
    return (_qwen_window(fields),) * num_layers


def _windows_by_type(fields: ConfigFields, otherwise: list[bool]) -> tuple[int | None, ...]:
    """Windows by `layer_types`, or in the layers given where it is absent."""
    window = _qwen_window(fields)
    kinds = fields.get("layer_types")
    if kinds is None:
        return tuple(window if has_one else None for has_one in otherwise)
    allowed = ("full_attention", "sliding_attention")
    expected = len(otherwise)
    if not isinstance(kinds, list) or len(kinds) != expected or any(kind not in allowed for kind in kinds):
        raise fields.wrong("layer_types", kinds, f"a list of {expected}, each one of {', '.join(allowed)}")
    if "sliding_attention" in kinds and window is None:
        raise ConfigError(
            "config.json has layer_types with 'sliding_attention', but use_sliding_window is false or "
            "sliding_window is null; set both",
            param="layer_types",
        )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _qwen_window(fields: ConfigFields) -> int | None:
    """`sliding_window` where `use_sliding_window` is set; transformers 5 may write 0 where it is not."""
    enabled = fields.boolean("use_sliding_window", False)
    window = fields.optional_integer("sliding_window", minimum=1 if enabled else 0)
    return window if enabled else None

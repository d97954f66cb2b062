"""Mixtures of experts, as families say them in a Hugging Face config."""

from __future__ import annotations

from jaxllm.errors import ConfigError
from jaxllm.models.config import MoEConfig
from jaxllm.models.fields import ConfigFields

# Either name may be the one that a config was saved with.
EXPERTS_ALIASES = {"num_local_experts": "num_experts"}
MIXTRAL_DEFAULTS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 131072,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
}
QWEN2_MOE_DEFAULTS = {
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 1408,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "shared_expert_intermediate_size": 5632,
    "sliding_window": 4096,
}
QWEN3_MOE_DEFAULTS = {
    "max_position_embeddings": 32768,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_key_value_heads": 4,
    "sliding_window": 4096,
}
OLMOE_DEFAULTS = {
    "eos_token_id": 50279,
    "max_position_embeddings": 4096,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "rms_norm_eps": 1e-5,
}


def experts_in_every_layer(fields: ConfigFields, *, normalize_weights: bool) -> MoEConfig:
    """Experts of `intermediate_size` in place of every MLP (Mixtral, OLMoE)."""
    layers = tuple(range(fields.integer("num_hidden_layers")))
    return read_experts(fields, fields.integer("intermediate_size"), layers, normalize_weights)


def experts_in_some_layers(fields: ConfigFields, shared_intermediate_size: int = 0) -> MoEConfig | None:
    """Experts in every `decoder_sparse_step`-th layer but `mlp_only_layers` (Qwen); None if that is none."""
    num_layers = fields.integer("num_hidden_layers")
    without = fields.get("mlp_only_layers") or []
    if not isinstance(without, list) or any(type(i) is not int or not 0 <= i < num_layers for i in without):
        raise fields.wrong("mlp_only_layers", without, f"a list of layers from 0 to {num_layers - 1}")
    step = fields.optional_integer("decoder_sparse_step") or 1
    layers = tuple(i for i in range(num_layers) if i not in without and (i + 1) % step == 0)
    normalize = fields.boolean("norm_topk_prob", False)
    size = fields.integer("moe_intermediate_size")
    moe = read_experts(fields, size, layers, normalize, shared_intermediate_size)
    return moe if layers else None


def read_experts(
    fields: ConfigFields, size: int, layers: tuple[int, ...], normalize_weights: bool, shared_size: int = 0
) -> MoEConfig:
    """As many experts as the config says, of inner width `size`, in these layers."""
    num_experts = fields.integer("num_experts")
    chosen = fields.integer("num_experts_per_tok")
    if chosen > num_experts:
        raise ConfigError(
            f"config.json has num_experts_per_tok={chosen} and {num_experts} experts (num_experts or "
            "num_local_experts); a token cannot take more experts than there are",
            param="num_experts_per_tok",
        )
    return MoEConfig(num_experts, chosen, size, layers, normalize_weights, shared_size)

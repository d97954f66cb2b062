"""DeepSeek-V2 and V3: latent attention, experts in groups, as their Hugging Face configs say them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxllm.errors import ConfigError
from jaxllm.models.config import Activation, MLAConfig, ModelConfig, MoEConfig
from jaxllm.models.expert_fields import read_experts
from jaxllm.models.fields import ConfigFields
from jaxllm.models.rope_fields import read_rope, served_positions, yarn_logit_scale

DEEPSEEK_ALIASES = {
    "n_routed_experts": "num_experts",
    "num_local_experts": "num_experts",
    "num_mtp_layers": "num_nextn_predict_layers",
}
DEEPSEEK_V2_DEFAULTS = {
    "bos_token_id": 1,
    "eos_token_id": 2,
    "first_k_dense_replace": 0,
    "intermediate_size": 11008,
    "kv_lora_rank": 512,
    "max_position_embeddings": 2048,
    "moe_intermediate_size": 1407,
    "n_shared_experts": 2,
    "num_experts": 64,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
DEEPSEEK_V3_DEFAULTS = {
    **DEEPSEEK_V2_DEFAULTS,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "first_k_dense_replace": 3,
    "intermediate_size": 18432,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 2048,
    "n_group": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_nextn_predict_layers": 1,
    "routed_scaling_factor": 2.5,
    "topk_group": 4,
}


def deepseek_config(
    fields: ConfigFields, basics: Mapping[str, Any], activations: Mapping[str, Activation]
) -> ModelConfig:
    """One of either version.

    Args:
        basics: the fields of a `ModelConfig` that every family reads alike.
    """
    v3 = fields.architecture.startswith("DeepseekV3")
    mla = MLAConfig(
        q_lora_rank=fields.optional_integer("q_lora_rank") or 0,
        kv_lora_rank=fields.integer("kv_lora_rank"),
        nope_head_dim=fields.integer("qk_nope_head_dim"),
        rope_head_dim=fields.integer("qk_rope_head_dim"),
        value_head_dim=fields.integer("v_head_dim"),
    )
    head_dim = mla.nope_head_dim + mla.rope_head_dim
    # Hugging Face saves what follows from others, under names that mean something else elsewhere.
    fields.require("num_key_value_heads", basics["num_heads"])
    fields.require("head_dim", mla.rope_head_dim)
    fields.require("qk_head_dim", head_dim)
    fields.require("mlp_bias", False)
    fields.require("moe_layer_freq", 1)
    positions = fields.integer("max_position_embeddings")
    rope = read_rope(fields, mla.rope_head_dim, positions)
    interleaved = fields.boolean("rope_interleave", True) if v3 else True
    bias = fields.boolean("attention_bias", False)
    extra = fields.optional_integer("num_nextn_predict_layers", minimum=0) or 0
    return ModelConfig(
        **basics,
        num_kv_heads=1,
        head_dim=head_dim,
        attention_scale=head_dim**-0.5 * yarn_logit_scale(fields, rope),
        intermediate_size=fields.integer("intermediate_size"),
        max_position_embeddings=served_positions(rope, positions),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=fields.choice("hidden_act", activations, "silu"),
        qkv_bias=bias,
        output_bias=bias,
        rope=replace(rope, interleaved=interleaved),
        embedding_dim=basics["hidden_size"],
        layer_windows=(None,) * basics["num_layers"],
        moe=_experts(fields, basics["num_layers"], v3=v3),
        mla=mla,
        extra_layers=extra if v3 else 0,
    )


def _experts(fields: ConfigFields, num_layers: int, *, v3: bool) -> MoEConfig | None:
    """The experts of every layer from `first_k_dense_replace` on; None where there are none."""
    first = fields.optional_integer("first_k_dense_replace", minimum=0) or 0
    size = fields.integer("moe_intermediate_size")
    shared = (fields.optional_integer("n_shared_experts", minimum=0) or 0) * size
    fields.require("scoring_func", "sigmoid" if v3 else "softmax")
    if v3:
        fields.require("topk_method", "noaux_tc")
        normalize, in_groups = fields.boolean("norm_topk_prob", True), True
    else:
        # Published checkpoints have it false, and what it would mean differs between implementations.
        fields.require("norm_topk_prob", False)
        methods = {"greedy": False, "group_limited_greedy": True}
        normalize, in_groups = False, fields.choice("topk_method", methods, "greedy")
    moe = replace(
        read_experts(fields, size, tuple(range(first, num_layers)), normalize, shared),
        shared_gate=False,
        scoring="sigmoid" if v3 else "softmax",
        selection_bias=v3,
        weight_scale=fields.number("routed_scaling_factor", 1.0),
    )
    groups = fields.optional_integer("n_group") or 1
    taken = fields.optional_integer("topk_group") or 1
    if in_groups:
        moe = replace(moe, num_groups=groups, groups_per_token=taken, group_experts=2 if v3 else 1)
        _check_groups(moe)
    return moe if moe.layers else None


def _check_groups(moe: MoEConfig) -> None:
    """That experts share groups evenly, and those of a token hold as many as it takes."""
    groups, size = moe.num_groups, moe.num_experts // moe.num_groups
    problem = None
    if moe.num_experts % groups:
        problem = f"{moe.num_experts} experts do not stand in n_group={groups} groups of a size"
    elif moe.groups_per_token > groups:
        problem = f"topk_group={moe.groups_per_token} is more than the n_group={groups} groups there are"
    elif moe.groups_per_token * size < moe.experts_per_token:
        problem = (
            f"topk_group={moe.groups_per_token} groups of {size} experts hold less than the "
            f"num_experts_per_tok={moe.experts_per_token} that a token takes"
        )
    elif size < moe.group_experts:
        problem = f"n_group={groups} leaves {size} expert to a group, which is judged by its best two"
    if problem is not None:
        raise ConfigError(f"config.json is of no use: {problem}", param="n_group")

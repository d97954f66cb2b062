"""Model families as data: a Hugging Face `config.json` becomes a `ModelConfig`.

To add a family whose data flow the decoder already has: a function that names its fields, a table
of its tensors in `jaxllm.models.tables`, and an entry in `FAMILIES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from jaxllm.errors import ConfigError, UnsupportedModelError
from jaxllm.models.config import Activation, ModelConfig
from jaxllm.models.deepseek import (
    DEEPSEEK_ALIASES,
    DEEPSEEK_V2_DEFAULTS,
    DEEPSEEK_V3_DEFAULTS,
    deepseek_config,
)
from jaxllm.models.encoders import BERT_DEFAULTS, ROBERTA_DEFAULTS, bert_config
from jaxllm.models.expert_fields import (
    EXPERTS_ALIASES,
    MIXTRAL_DEFAULTS,
    OLMOE_DEFAULTS,
    QWEN2_MOE_DEFAULTS,
    QWEN3_MOE_DEFAULTS,
    experts_in_every_layer,
    experts_in_some_layers,
)
from jaxllm.models.fields import ConfigFields
from jaxllm.models.pooler_fields import read_pooler
from jaxllm.models.rope_fields import read_rope, served_positions
from jaxllm.models.table_builder import CheckpointTable
from jaxllm.models.tables import (
    bert_table,
    deepseek_table,
    gpt2_table,
    llama_table,
    mixtral_table,
    opt_table,
)
from jaxllm.models.window_fields import (
    no_windows,
    qwen2_moe_windows,
    qwen3_moe_windows,
    qwen_windows,
    same_window,
)

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}
_DTYPES = {name: name for name in ("float32", "float16", "bfloat16")}


@dataclass(frozen=True, slots=True)
class Family:
    """How one Hugging Face architecture maps to ours.

    Attributes:
        translate: from its config fields to a `ModelConfig`.
        table: from a `ModelConfig` to where each parameter is found in a checkpoint.
        defaults: what its Hugging Face class assumes where config.json is silent.
        aliases: its own names of fields that others call by the second name.
    """

    translate: Callable[[ConfigFields], ModelConfig]
    table: Callable[[ModelConfig], CheckpointTable]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


def translate_config(
    hf_config: Mapping[str, Any], hf_overrides: Mapping[str, Any] | None = None
) -> ModelConfig:
    """What a Hugging Face `config.json` says, as the decoder reads it.

    Args:
        hf_config: the parsed file.
        hf_overrides: fields that replace those of the file; None removes one.

    Raises:
        UnsupportedModelError: an architecture without a family, or a field that changes what the
            model computes in a way that is not served.
        ConfigError: a field that is missing, or has a value of the wrong type or range.
    """
    values = {**hf_config, **(hf_overrides or {})}
    architecture = _architecture(values)
    family = family_of(architecture)
    values = {family.aliases.get(name, name): value for name, value in values.items()}
    # A null is a value: `"eos_token_id": null` means that there is none, not the default.
    config = family.translate(fields := ConfigFields({**family.defaults, **values}, architecture))
    config = replace(config, pooler=read_pooler(fields, config))
    fields.finish()
    return config


def checkpoint_table(config: ModelConfig) -> CheckpointTable:
    """Where each parameter of the model is found in a Hugging Face checkpoint of its family."""
    return family_of(config.architecture).table(config)


def family_of(architecture: str) -> Family:
    """The family of an architecture; a decoder's covers its bare model and its sequence classifier."""
    return FAMILIES[_generating(architecture)]


def _generating(architecture: str) -> str:
    """The name under which FAMILIES has an architecture, where it has it."""
    for ending in ("Model", "ForSequenceClassification"):
        stem = architecture.removesuffix(ending)
        if stem != architecture and architecture not in FAMILIES:
            for generating in ("ForCausalLM", "LMHeadModel"):
                if stem + generating in FAMILIES:
                    return stem + generating
    return architecture


def _architecture(values: Mapping[str, Any]) -> str:
    architectures = values.get("architectures")
    names = architectures if isinstance(architectures, list) else []
    for name in names:
        if isinstance(name, str) and _generating(name) in FAMILIES:
            return name
    what = f"architectures={architectures!r}" if architectures else "no 'architectures'"
    raise UnsupportedModelError(
        f"config.json has {what} (model_type={values.get('model_type')!r}); supported: {', '.join(FAMILIES)}"
        ". If the model is one of these under another name, give hf_overrides={'architectures': ['...']}"
    )


def _common(fields: ConfigFields) -> dict[str, Any]:
    """Fields that every family has whose attention is of keys and values."""
    basics = _basics(fields)
    hidden_size, num_heads = basics["hidden_size"], basics["num_heads"]
    num_kv_heads = fields.optional_integer("num_key_value_heads") or num_heads
    head_dim = fields.optional_integer("head_dim")
    if num_heads % num_kv_heads:
        raise ConfigError(
            f"config.json has num_attention_heads={num_heads}, which does not divide by "
            f"num_key_value_heads={num_kv_heads}",
            param="num_key_value_heads",
        )
    if head_dim is None:
        if hidden_size % num_heads:
            raise ConfigError(
                f"config.json has hidden_size={hidden_size}, which does not divide by "
                f"num_attention_heads={num_heads}, and no head_dim",
                param="hidden_size",
            )
        head_dim = hidden_size // num_heads
    return basics | {
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "attention_scale": head_dim**-0.5,
    }


def _basics(fields: ConfigFields) -> dict[str, Any]:
    """Fields that every family has under the same name."""
    return {
        "architecture": fields.architecture,
        "vocab_size": fields.integer("vocab_size"),
        "hidden_size": fields.integer("hidden_size"),
        "num_layers": fields.integer("num_hidden_layers"),
        "num_heads": fields.integer("num_attention_heads"),
        "tie_word_embeddings": fields.boolean("tie_word_embeddings", False),
        "dtype": _dtype(fields),
        "bos_token_id": fields.optional_integer("bos_token_id", minimum=0),
        "eos_token_ids": _token_ids(fields, "eos_token_id"),
    }


def _rotary(
    fields: ConfigFields, windows: Callable[[ConfigFields, int], tuple[int | None, ...]], **more: Any
) -> ModelConfig:
    """The Llama lineage: RMSNorm, rotary positions, a gated MLP."""
    common = _common(fields)
    positions = fields.integer("max_position_embeddings")
    rope = read_rope(fields, common["head_dim"], positions)
    return ModelConfig(
        **common,
        intermediate_size=fields.integer("intermediate_size"),
        max_position_embeddings=served_positions(rope, positions),
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        activation=fields.choice("hidden_act", _ACTIVATIONS, "silu"),
        rope=rope,
        embedding_dim=common["hidden_size"],
        layer_windows=windows(fields, common["num_layers"]),
        **more,
    )


def _llama(fields: ConfigFields) -> ModelConfig:
    bias = fields.boolean("attention_bias", False)
    return _rotary(
        fields,
        no_windows,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.boolean("mlp_bias", False),
    )


def _mistral(fields: ConfigFields) -> ModelConfig:
    return _rotary(fields, same_window)


def _qwen2(fields: ConfigFields) -> ModelConfig:
    return _rotary(fields, qwen_windows, qkv_bias=True)


def _qwen3(fields: ConfigFields) -> ModelConfig:
    bias = fields.boolean("attention_bias", False)
    return _rotary(fields, qwen_windows, qk_norm="head", qkv_bias=bias, output_bias=bias)


def _mixtral(fields: ConfigFields) -> ModelConfig:
    return _rotary(fields, same_window, moe=experts_in_every_layer(fields, normalize_weights=True))


def _qwen2_moe(fields: ConfigFields) -> ModelConfig:
    return _rotary(
        fields,
        qwen2_moe_windows,
        qkv_bias=fields.boolean("qkv_bias", True),
        moe=experts_in_some_layers(fields, fields.integer("shared_expert_intermediate_size")),
    )


def _qwen3_moe(fields: ConfigFields) -> ModelConfig:
    bias = fields.boolean("attention_bias", False)
    return _rotary(
        fields,
        qwen3_moe_windows,
        qk_norm="head",
        qkv_bias=bias,
        output_bias=bias,
        moe=experts_in_some_layers(fields),
    )


def _olmoe(fields: ConfigFields) -> ModelConfig:
    bias = fields.boolean("attention_bias", False)
    normalize = fields.boolean("norm_topk_prob", False)
    return _rotary(
        fields,
        no_windows,
        qk_norm="width",
        qkv_clip=None if fields.get("clip_qkv") is None else fields.number("clip_qkv", 0.0),
        qkv_bias=bias,
        output_bias=bias,
        moe=experts_in_every_layer(fields, normalize_weights=normalize),
    )


def _deepseek(fields: ConfigFields) -> ModelConfig:
    return deepseek_config(fields, _basics(fields), _ACTIVATIONS)


def _opt(fields: ConfigFields) -> ModelConfig:
    common = _common(fields)
    positions = fields.integer("max_position_embeddings")
    bias = fields.boolean("enable_bias", True)
    pre_norm = fields.boolean("do_layer_norm_before", True)
    # A final norm that a checkpoint was made without, in the first releases of the small models.
    without_final_norm = fields.boolean("_remove_final_layer_norm", False)
    fields.require("layer_norm_elementwise_affine", True)
    return ModelConfig(
        **common,
        intermediate_size=fields.integer("ffn_dim"),
        max_position_embeddings=positions,
        norm="layer",
        norm_placement="pre" if pre_norm else "post",
        norm_eps=1e-5,
        activation=fields.choice("activation_function", _ACTIVATIONS, "relu"),
        gated_mlp=False,
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
        num_learned_positions=positions + 2,
        learned_position_offset=2,
        embedding_dim=fields.optional_integer("word_embed_proj_dim") or common["hidden_size"],
        layer_windows=(None,) * common["num_layers"],
        final_norm=pre_norm and not without_final_norm,
    )


def _gpt2(fields: ConfigFields) -> ModelConfig:
    common = _common(fields)
    positions = fields.integer("max_position_embeddings")
    fields.require("scale_attn_by_inverse_layer_idx", False)
    if not fields.boolean("scale_attn_weights", True):
        common["attention_scale"] = 1.0
    return ModelConfig(
        **common,
        intermediate_size=fields.optional_integer("n_inner") or 4 * common["hidden_size"],
        max_position_embeddings=positions,
        norm="layer",
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        activation=fields.choice("activation_function", _ACTIVATIONS, "gelu_new"),
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        num_learned_positions=positions,
        embedding_dim=common["hidden_size"],
        layer_windows=(None,) * common["num_layers"],
    )


def _bert(fields: ConfigFields) -> ModelConfig:
    return bert_config(fields, _common(fields), _ACTIVATIONS, roberta=False)


def _roberta(fields: ConfigFields) -> ModelConfig:
    return bert_config(fields, _common(fields), _ACTIVATIONS, roberta=True)


def _dtype(fields: ConfigFields) -> str:
    name = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    value = fields.get(name)
    if isinstance(value, str) and value.removeprefix("torch.") in _DTYPES:
        return value.removeprefix("torch.")
    return str(fields.choice(name, _DTYPES, "float32"))


def _token_ids(fields: ConfigFields, name: str) -> tuple[int, ...]:
    value = fields.get(name)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise fields.wrong(name, value, "a token id, a list of them, or null")
    return tuple(ids)


_LLAMA_DEFAULTS = {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048}

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(_llama, llama_table, _LLAMA_DEFAULTS),
    "MistralForCausalLM": Family(
        _mistral,
        llama_table,
        {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
        },
    ),
    "Qwen2ForCausalLM": Family(
        _qwen2, llama_table, {"max_position_embeddings": 32768, "sliding_window": 4096}
    ),
    "Qwen3ForCausalLM": Family(
        _qwen3, llama_table, {"max_position_embeddings": 32768, "sliding_window": 4096, "head_dim": 128}
    ),
    "MixtralForCausalLM": Family(_mixtral, mixtral_table, MIXTRAL_DEFAULTS, EXPERTS_ALIASES),
    "Qwen2MoeForCausalLM": Family(_qwen2_moe, llama_table, QWEN2_MOE_DEFAULTS, EXPERTS_ALIASES),
    "Qwen3MoeForCausalLM": Family(_qwen3_moe, llama_table, QWEN3_MOE_DEFAULTS, EXPERTS_ALIASES),
    "OlmoeForCausalLM": Family(_olmoe, llama_table, OLMOE_DEFAULTS, EXPERTS_ALIASES),
    "DeepseekV2ForCausalLM": Family(_deepseek, deepseek_table, DEEPSEEK_V2_DEFAULTS, DEEPSEEK_ALIASES),
    "DeepseekV3ForCausalLM": Family(_deepseek, deepseek_table, DEEPSEEK_V3_DEFAULTS, DEEPSEEK_ALIASES),
    "OPTForCausalLM": Family(
        _opt,
        opt_table,
        {"bos_token_id": 2, "eos_token_id": 2, "max_position_embeddings": 2048, "tie_word_embeddings": True},
    ),
    "GPT2LMHeadModel": Family(
        _gpt2,
        gpt2_table,
        {
            "bos_token_id": 50256,
            "eos_token_id": 50256,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
        },
        aliases={
            "n_embd": "hidden_size",
            "n_head": "num_attention_heads",
            "n_layer": "num_hidden_layers",
            "n_positions": "max_position_embeddings",
        },
    ),
    "BertModel": Family(_bert, bert_table, BERT_DEFAULTS),
    "BertForSequenceClassification": Family(_bert, bert_table, BERT_DEFAULTS),
    "RobertaModel": Family(_roberta, bert_table, ROBERTA_DEFAULTS),
    "RobertaForSequenceClassification": Family(_roberta, bert_table, ROBERTA_DEFAULTS),
    "XLMRobertaModel": Family(_roberta, bert_table, ROBERTA_DEFAULTS),
    "XLMRobertaForSequenceClassification": Family(_roberta, bert_table, ROBERTA_DEFAULTS),
}

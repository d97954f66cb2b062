"""Small models of every family, with sizes and features that a translation could get wrong.

Odd vocabularies, head_dim other than hidden_size / heads, grouped and multi-query attention, windows
shorter than the prompt, rope scalings whose training context is shorter than the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}
_QWEN = {**_LLAMA, "rms_norm_eps": 1e-6, "vocab_size": 139, "use_sliding_window": False, "rope_theta": 1e6}
_QWEN2 = {**_QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
_QWEN3 = {**_QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 20}
_MISTRAL = {
    **_LLAMA,
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "head_dim": 10,
    "sliding_window": None,
}
_MIXTRAL = {
    **_LLAMA,
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "num_local_experts": 5,
    "num_experts_per_tok": 2,
    "intermediate_size": 52,
    "sliding_window": None,
}
_QWEN_MOE = {
    **_QWEN,
    "num_experts": 7,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 28,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
}
_QWEN2_MOE = {
    **_QWEN_MOE,
    "architectures": ["Qwen2MoeForCausalLM"],
    "model_type": "qwen2_moe",
    "shared_expert_intermediate_size": 36,
    "norm_topk_prob": False,
}
_QWEN3_MOE = {
    **_QWEN_MOE,
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "head_dim": 20,
}
_OLMOE = {
    **_LLAMA,
    "architectures": ["OlmoeForCausalLM"],
    "model_type": "olmoe",
    "num_experts": 9,
    "num_experts_per_tok": 4,
    "intermediate_size": 26,
    "norm_topk_prob": False,
}
_DEEPSEEK_V2 = {
    **_LLAMA,
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 18,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "v_head_dim": 9,
    "n_routed_experts": 6,
    "num_experts_per_tok": 2,
    "n_shared_experts": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "topk_method": "greedy",
    "rms_norm_eps": 1e-6,
}
_DEEPSEEK_V3 = {
    **_DEEPSEEK_V2,
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "q_lora_rank": 22,
    "n_routed_experts": 12,
    "num_experts_per_tok": 3,
    "n_shared_experts": 1,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
}
_OPT = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 127,
    "hidden_size": 40,
    "ffn_dim": 68,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "max_position_embeddings": 160,
    "activation_function": "relu",
    "do_layer_norm_before": True,
    "enable_bias": True,
    "word_embed_proj_dim": 40,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 149,
    "n_embd": 42,
    "n_head": 3,
    "n_layer": 3,
    "n_positions": 160,
    "n_inner": None,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """A model by its config.json, and how long a prompt it is compared on."""

    config: Mapping[str, Any]
    prompt_length: int = 45


def _case(base: Mapping[str, Any], prompt_length: int = 45, **changes: Any) -> Case:
    return Case({**base, **changes}, prompt_length)


CASES: dict[str, Case] = {
    "llama": _case(_LLAMA),
    "llama-mha-tied": _case(_LLAMA, num_key_value_heads=6, tie_word_embeddings=True),
    "llama-mqa-wide-heads": _case(_LLAMA, num_key_value_heads=1, head_dim=14, rope_theta=500000.0),
    "llama-biases": _case(_LLAMA, attention_bias=True, mlp_bias=True, hidden_act="gelu"),
    "llama-linear": _case(_LLAMA, rope_scaling={"type": "linear", "factor": 4.0}),
    # Hugging Face's frequencies follow the length of the sequence when a token is computed: here the
    # prompt ends within the training context and the output goes on beyond it, ...
    "llama-dynamic": _case(
        _LLAMA, 25, max_position_embeddings=32, rope_scaling={"rope_type": "dynamic", "factor": 4.0}
    ),
    # ... and here the prompt itself is longer.
    "llama-dynamic-long-prompt": _case(
        _LLAMA, 50, max_position_embeddings=32, rope_scaling={"rope_type": "dynamic", "factor": 4.0}
    ),
    "llama-llama3": _case(
        _LLAMA,
        head_dim=16,
        rope_theta=100.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    ),
    "llama-yarn": _case(
        _LLAMA,
        head_dim=16,
        rope_theta=100.0,
        max_position_embeddings=128,
        rope_scaling={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16},
    ),
    "llama-rope-parameters-yarn": _case(
        {key: value for key, value in _LLAMA.items() if key != "rope_theta"},
        max_position_embeddings=160,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 5.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 4.0,
            "beta_slow": 0.5,
            "mscale": 1.3,
            "mscale_all_dim": 0.7,
        },
    ),
    "mistral": _case(_MISTRAL),
    "mistral-window": _case(_MISTRAL, sliding_window=9, num_key_value_heads=3),
    "qwen2": _case(_QWEN2),
    "qwen2-window-upper-layers": _case(
        _QWEN2, use_sliding_window=True, sliding_window=7, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen2-layer-types": _case(
        _QWEN2,
        use_sliding_window=True,
        sliding_window=11,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3": _case(_QWEN3, tie_word_embeddings=True),
    "qwen3-biases-mqa": _case(_QWEN3, num_key_value_heads=1, attention_bias=True),
    "mixtral": _case(_MIXTRAL),
    "mixtral-window-one-expert": _case(
        _MIXTRAL, num_experts_per_tok=1, num_local_experts=3, sliding_window=9, tie_word_embeddings=True
    ),
    "qwen2-moe": _case(_QWEN2_MOE, qkv_bias=True),
    # Layers 0 and 2 have an MLP, 1 and 3 experts; windows change where that does not.
    "qwen2-moe-every-other-layer": _case(
        _QWEN2_MOE,
        num_hidden_layers=4,
        decoder_sparse_step=2,
        norm_topk_prob=True,
        qkv_bias=False,
        use_sliding_window=True,
        sliding_window=7,
        layer_types=["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
    ),
    "qwen3-moe": _case(_QWEN3_MOE),
    "qwen3-moe-mlp-in-the-middle": _case(
        _QWEN3_MOE,
        mlp_only_layers=[1],
        norm_topk_prob=False,
        attention_bias=True,
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=11,
    ),
    "olmoe": _case(_OLMOE),
    "olmoe-clipped": _case(_OLMOE, clip_qkv=1.2, norm_topk_prob=True, attention_bias=True),
    "deepseek-v2-lite": _case(_DEEPSEEK_V2),
    "deepseek-v2": _case(
        _DEEPSEEK_V2,
        q_lora_rank=22,
        n_routed_experts=12,
        num_experts_per_tok=3,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        routed_scaling_factor=3.0,
        rope_scaling={
            "type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 0.7,
        },
        rope_theta=500.0,
    ),
    "deepseek-v3": _case(_DEEPSEEK_V3),
    "deepseek-v3-biases-halves": _case(
        _DEEPSEEK_V3,
        attention_bias=True,
        rope_interleave=False,
        norm_topk_prob=False,
        first_k_dense_replace=2,
    ),
    "opt": _case(_OPT),
    "opt-post-norm-projected": _case(_OPT, do_layer_norm_before=False, word_embed_proj_dim=24),
    "opt-no-biases-untied": _case(
        _OPT, enable_bias=False, activation_function="gelu", tie_word_embeddings=False
    ),
    "opt-without-final-norm": _case(_OPT, _remove_final_layer_norm=True),
    "gpt2": _case(_GPT2),
    "gpt2-unscaled-inner": _case(_GPT2, n_inner=50, scale_attn_weights=False, activation_function="relu"),
}

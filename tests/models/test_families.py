"""From config.json to ModelConfig: both spellings, every refusal by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from benchmarks.shapes import SHAPES
from jaxllm.errors import ConfigError, JaxLLMError, UnsupportedModelError
from jaxllm.models.config import MLAConfig, ModelConfig, MoEConfig, RopeConfig
from jaxllm.models.families import FAMILIES, translate_config
from tests.models.checkpoints import LLAMA
from tests.parity.cases import CASES

# Published configurations, with all the fields that they come with.
LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008, 128009],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.42.3",
    "use_cache": True,
    "vocab_size": 128256,
}
QWEN2_5_7B: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}
OPT_350M: dict[str, Any] = {
    "_name_or_path": "opt-350m",
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": False,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 4096,
    "hidden_size": 1024,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 16,
    "num_hidden_layers": 24,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "transformers_version": "4.20.0.dev0",
    "use_cache": True,
    "vocab_size": 50272,
    "word_embed_proj_dim": 512,
}
GPT2: dict[str, Any] = {
    "activation_function": "gelu_new",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.1,
    "bos_token_id": 50256,
    "embd_pdrop": 0.1,
    "eos_token_id": 50256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_ctx": 1024,
    "n_embd": 768,
    "n_head": 12,
    "n_layer": 12,
    "n_positions": 1024,
    "resid_pdrop": 0.1,
    "summary_activation": None,
    "summary_first_dropout": 0.1,
    "summary_proj_to_labels": True,
    "summary_type": "cls_index",
    "summary_use_proj": True,
    "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
    "vocab_size": 50257,
}


def rope_of(**changes: Any) -> RopeConfig:
    rope = translate_config({**LLAMA, **changes}).rope
    assert rope is not None
    return rope


def test_llama_3_1() -> None:
    assert translate_config(LLAMA_3_1_8B) == ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=131072,
        norm_eps=1e-5,
        attention_scale=128**-0.5,
        rope=RopeConfig(
            theta=500000.0,
            rotary_dim=128,
            scaling="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position=8192,
        ),
        embedding_dim=4096,
        layer_windows=(None,) * 32,
        dtype="bfloat16",
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )


def test_qwen2_without_windows_although_it_names_one() -> None:
    config = translate_config(QWEN2_5_7B)
    assert config.layer_windows == (None,) * 28
    assert (config.qkv_bias, config.output_bias, config.qk_norm) == (True, False, None)
    windowed = translate_config(QWEN2_5_7B, {"use_sliding_window": True, "max_window_layers": 26})
    assert windowed.layer_windows == (None,) * 26 + (131072,) * 2


def test_opt_350m() -> None:
    config = translate_config(OPT_350M)
    assert (config.norm, config.norm_placement, config.final_norm) == ("layer", "post", False)
    assert (config.embedding_dim, config.hidden_size) == (512, 1024)
    assert (config.num_learned_positions, config.learned_position_offset) == (2050, 2)
    assert config.max_position_embeddings == 2048
    assert config.tie_word_embeddings and config.rope is None and not config.gated_mlp
    assert (config.activation, config.dtype) == ("relu", "float16")


def test_gpt2_and_its_own_names() -> None:
    config = translate_config(GPT2)
    assert (config.hidden_size, config.intermediate_size, config.num_layers) == (768, 3072, 12)
    assert config.activation == "gelu_tanh" and config.tie_word_embeddings
    assert config.attention_scale == 64**-0.5
    assert (config.num_learned_positions, config.learned_position_offset) == (1024, 0)
    assert translate_config(GPT2, {"num_hidden_layers": 3}).num_layers == 3
    with pytest.raises(UnsupportedModelError, match="scale_attn_by_inverse_layer_idx=True"):
        translate_config(GPT2, {"scale_attn_by_inverse_layer_idx": True})


def test_mistral_windows_are_in_every_layer() -> None:
    values = {**LLAMA, "architectures": ["MistralForCausalLM"]}
    assert translate_config({**values, "sliding_window": 7}).layer_windows == (7, 7)
    assert translate_config({**values, "sliding_window": None}).layer_windows == (None, None)
    # The class's default, where the file is silent.
    assert translate_config(values).layer_windows == (4096, 4096)


QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
MIXTRAL_8X7B: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_attention_heads": 32,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.02,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": 32000,
}


def test_mixtures_of_experts() -> None:
    config = translate_config(QWEN3_30B_A3B)
    assert config.moe == MoEConfig(128, 8, 768, tuple(range(48)), True)
    assert (config.qk_norm, config.mlp_layers, config.layer_windows[0]) == ("head", (), None)
    # 3 of 30 billion weights are active, as its name says; here embeddings and head are counted, too.
    active = config.layer_parameters + 2 * config.head_parameters
    assert round(active / 1e9, 2) == 3.35
    assert round((active + 120 * config.expert_parameters) / 1e9, 1) == 30.5
    mixtral = translate_config(MIXTRAL_8X7B)
    assert mixtral.moe == MoEConfig(8, 2, 14336, tuple(range(32)), True)
    active = mixtral.layer_parameters + 2 * mixtral.head_parameters
    assert round(active / 1e9, 1) == 12.9
    assert round((active + 6 * mixtral.expert_parameters) / 1e9, 1) == 46.7


def test_latent_attention_and_experts_in_groups() -> None:
    config = translate_config(SHAPES["deepseek-v3"])
    assert config.mla == MLAConfig(1536, 512, 128, 64, 128)
    assert config.moe == MoEConfig(
        256, 8, 2048, tuple(range(3, 61)), True, 2048, shared_gate=False, scoring="sigmoid",
        selection_bias=True, num_groups=8, groups_per_token=4, group_experts=2, weight_scale=2.5,
    )  # fmt: skip
    assert (config.num_kv_heads, config.head_dim, config.cache_rows) == (1, 192, (1, 576))
    assert (config.max_position_embeddings, config.extra_layers) == (163840, 1)
    # 37 of 671 billion weights are active, embeddings and head included.
    active = config.layer_parameters + 2 * config.head_parameters
    assert round(active / 1e9) == 37 + 1
    assert round((active + 248 * config.expert_parameters) / 1e9) == 671
    scale = 0.1 * math.log(40) + 1
    assert config.attention_scale == pytest.approx(192**-0.5 * scale**2)
    assert config.rope is not None and config.rope.attention_factor == 1.0
    assert (config.rope.rotary_dim, config.rope.interleaved) == (64, True)

    lite = translate_config(SHAPES["deepseek-v2-lite"])
    assert lite.mla == MLAConfig(0, 512, 128, 64, 128)
    assert lite.moe is not None
    assert (lite.moe.num_groups, lite.moe.scoring, lite.moe.shared_intermediate_size) == (1, "softmax", 2816)
    assert lite.moe.layers == tuple(range(1, 27)) and not lite.moe.selection_bias
    # What Hugging Face saves beside, and a model without experts.
    saved = {**SHAPES["deepseek-v3"], "head_dim": 64, "qk_head_dim": 192, "num_local_experts": 256}
    assert translate_config(saved) == config
    assert translate_config({**SHAPES["deepseek-v3"], "first_k_dense_replace": 61}).moe is None


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("v3", {"n_group": 7}, "256 experts do not stand in n_group=7"),
        ("v3", {"topk_group": 9}, "topk_group=9 is more than the n_group=8"),
        ("v3", {"n_group": 128, "topk_group": 3}, "3 groups of 2 experts hold less than .*per_tok=8"),
        ("v3", {"n_group": 256, "topk_group": 9}, "n_group=256 leaves 1 expert to a group"),
        ("v3", {"scoring_func": "softmax"}, "scoring_func='softmax'.*'sigmoid'"),
        ("v3", {"topk_method": "greedy"}, "topk_method='greedy'"),
        ("v3", {"head_dim": 128}, "head_dim=128.*supported: 64"),
        ("v3", {"num_key_value_heads": 8}, "num_key_value_heads=8.*supported: 128"),
        ("v3", {"kv_lora_rank": None}, "lacks 'kv_lora_rank'"),
        ("v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
        ("v3", {"quantization_config": {"quant_method": "fp8"}}, "method 'fp8'.*bfloat16"),
        ("v3", {"index_topk": 2048}, "not understood here.*index_topk=2048"),
        ("v2-lite", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("v2-lite", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'.*group_limited_greedy"),
        ("v2-lite", {"qk_rope_head_dim": 63}, "head_dim=63.*even"),
    ],
)
def test_what_deepseek_is_not_served_with(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, UnsupportedModelError), match=message):
        translate_config({**SHAPES[f"deepseek-{name}"], **changes})


def test_which_layers_have_experts() -> None:
    def layers(**changes: Any) -> tuple[int, ...]:
        moe = translate_config({**QWEN3_30B_A3B, "num_hidden_layers": 7, **changes}).moe
        return () if moe is None else moe.layers

    assert layers() == (0, 1, 2, 3, 4, 5, 6)
    assert layers(decoder_sparse_step=3) == (2, 5)
    assert layers(decoder_sparse_step=2, mlp_only_layers=[3, 0]) == (1, 5)
    assert layers(mlp_only_layers=list(range(7))) == ()
    config = translate_config({**QWEN3_30B_A3B, "num_hidden_layers": 7, "decoder_sparse_step": 3})
    assert config.mlp_layers == (0, 1, 3, 4, 6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts_per_tok": 129}, "num_experts_per_tok=129 and 128 experts"),
        ({"num_experts": 0}, "num_experts=0.*at least 1"),
        ({"mlp_only_layers": [48]}, r"mlp_only_layers=\[48\].*0 to 47"),
        ({"mlp_only_layers": [True]}, "mlp_only_layers"),
        ({"mlp_only_layers": 3}, "mlp_only_layers=3"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ({"norm_topk_prob": "yes"}, "norm_topk_prob='yes'"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window=0"),
    ],
)
def test_experts_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translate_config({**QWEN3_30B_A3B, **changes})


def test_either_name_of_the_number_of_experts() -> None:
    values = {**QWEN3_30B_A3B, "num_local_experts": 16}
    del values["num_experts"]
    config = translate_config(values)
    assert config.moe is not None and config.moe.num_experts == 16


def test_windows_of_qwen2_moe() -> None:
    values = {**CASES["qwen2-moe"].config, "num_hidden_layers": 5, "use_sliding_window": True}
    values |= {"sliding_window": 6, "max_window_layers": 4}
    assert translate_config(values).layer_windows == (6, None, 6, None, None)
    # As transformers 5 writes it where windows are not used.
    unused = {**values, "use_sliding_window": False, "sliding_window": 0}
    assert translate_config(unused).layer_windows == (None,) * 5


@pytest.mark.parametrize("name", CASES)
def test_both_spellings_of_rope_are_one(name: str) -> None:
    """A config rewritten as transformers 5 saves it translates to the same."""
    old = dict(CASES[name].config)
    new = dict(old)
    if "rope_theta" in new:
        scaling = dict(new.pop("rope_scaling", None) or {"rope_type": "default"})
        if "type" in scaling:
            scaling["rope_type"] = scaling.pop("type")
        new["rope_parameters"] = {**scaling, "rope_theta": new.pop("rope_theta")}
    assert translate_config(new) == translate_config(old)


def test_rope_scalings() -> None:
    assert rope_of() == RopeConfig(theta=10000.0, rotary_dim=6)
    linear = rope_of(rope_scaling={"type": "linear", "factor": 2})
    assert (linear.scaling, linear.factor) == ("linear", 2.0)
    dynamic = rope_of(rope_scaling={"rope_type": "dynamic", "factor": 2.5})
    assert (dynamic.scaling, dynamic.original_max_position) == ("dynamic", 32)
    yarn = rope_of(rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert (yarn.original_max_position, yarn.beta_fast, yarn.beta_slow) == (32, 32.0, 1.0)
    assert math.isclose(yarn.attention_factor, 0.1 * math.log(4) + 1)
    implied = rope_of(rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 8})
    assert (implied.original_max_position, implied.factor) == (8, 4.0)
    given_factor = rope_of(rope_scaling={"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.5})
    assert given_factor.attention_factor == 0.5
    # The entry's theta comes before the outer one, and that one before the default.
    assert rope_of(rope_theta=5.0, rope_scaling={"rope_theta": 7.0, "rope_type": "default"}).theta == 7.0
    assert rope_of(rope_theta=5.0, rope_scaling=None).theta == 5.0
    per_type = {"full_attention": {"rope_type": "default", "rope_theta": 9.0}}
    assert rope_of(rope_parameters={**per_type, "sliding_attention": per_type["full_attention"]}).theta == 9.0


def test_overriding_the_scaling_keeps_theta() -> None:
    values = {**LLAMA, "rope_parameters": {"rope_type": "default", "rope_theta": 123.0}}
    config = translate_config(values, {"rope_scaling": {"rope_type": "linear", "factor": 3.0}})
    assert config.rope == RopeConfig(theta=123.0, rotary_dim=6, scaling="linear", factor=3.0)


@pytest.mark.parametrize(
    ("scaling", "positions"),
    [
        (None, 32),
        ({"rope_type": "linear", "factor": 4.0}, 128),
        ({"rope_type": "dynamic", "factor": 2.5}, 80),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        (
            {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8,
            },
            32,
        ),
    ],
)
def test_how_far_a_scaling_reaches(scaling: Any, positions: int) -> None:
    assert translate_config({**LLAMA, "rope_scaling": scaling}).max_position_embeddings == positions


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "longrope", "factor": 2}, "rope_type='longrope'; supported: default, linear"),
        ({"type": "mrope", "mrope_section": [1]}, "'mrope'"),
        ({"rope_type": "linear", "factor": 2, "warp": 3}, "warp=3"),
        ({"rope_type": "linear"}, "without 'factor'"),
        ({"rope_type": "linear", "factor": 0.5}, "factor.*at least 1"),
        ({"rope_type": "linear", "factor": "2"}, "factor.*number"),
        ({"rope_type": "linear", "factor": math.inf}, "factor.*number"),
        (
            {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4, "high_freq_factor": 1},
            "low_freq_factor=4",
        ),
        ({"rope_type": "yarn", "factor": 2, "truncate": False}, "truncate=False"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ("linear", "an object or null"),
    ],
)
def test_rope_entries_that_are_refused(scaling: Any, message: str) -> None:
    for name in ("rope_scaling", "rope_parameters"):
        with pytest.raises((UnsupportedModelError, ConfigError), match=message):
            translate_config({**LLAMA, name: scaling})


def test_rope_that_differs_by_layer_type_is_refused() -> None:
    entries = {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    with pytest.raises(UnsupportedModelError, match="differ by layer type"):
        translate_config({**LLAMA, "rope_parameters": entries})


@pytest.mark.parametrize("architectures", [["ElmanForCausalLM"], [], None, "LlamaForCausalLM"])
def test_unknown_architectures_list_the_supported(architectures: Any) -> None:
    with pytest.raises(UnsupportedModelError) as error:
        translate_config({**LLAMA, "architectures": architectures})
    for name in FAMILIES:
        assert name in str(error.value)
    assert translate_config({"architectures": ["X"]} | LLAMA).architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "field",
    [
        {"final_logit_softcapping": 30.0},
        {"use_parallel_residual": True},
        {"num_experts": 8},
        {"layer_types": ["full_attention", "full_attention"]},
        {"embedding_multiplier": 12.0},
        {"is_causal": False},
        {"add_cross_attention": True},
        {"partial_rotary_factor": 0.25},
        {"pretraining_tp": 2},
        {"hidden_act": "quick_gelu"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"dtype": "float8_e4m3fn"},
    ],
)
def test_fields_that_change_the_computation_are_refused_by_name(field: dict[str, Any]) -> None:
    [name] = field
    with pytest.raises(UnsupportedModelError, match=name):
        translate_config({**LLAMA, **field})
    if name in ("final_logit_softcapping", "num_experts"):
        # The way out that the message names, and a feature that is switched off.
        assert translate_config({**LLAMA, **field}, {name: None}) == translate_config(LLAMA)
        assert translate_config({**LLAMA, name: False}) == translate_config(LLAMA)


@pytest.mark.parametrize(
    "field",
    [
        {"attention_dropout": 0.1},
        {"unsloth_version": "2026.1"},
        {"_attn_implementation_autoset": True},
        {"transformers_version": "5.0"},
        {"id2label": {"0": "a"}},
        {"temperature": 0.7},
        {"some_new_feature": None},
    ],
)
def test_fields_that_change_nothing_are_accepted(field: dict[str, Any]) -> None:
    assert translate_config({**LLAMA, **field}) == translate_config(LLAMA)


@pytest.mark.parametrize("name", ["vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"])
@pytest.mark.parametrize("value", [0, -1, "7", 1.5, True, [3], None])
def test_sizes_must_be_positive_integers(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=name) as error:
        translate_config({**LLAMA, name: value})
    assert error.value.param == name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 5}, "does not divide by num_key_value_heads=2"),
        ({"head_dim": None, "hidden_size": 13}, "hidden_size=13"),
        ({"head_dim": 5}, "head_dim=5.*even"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"eos_token_id": [1, -2]}, "eos_token_id"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
    ],
)
def test_values_that_contradict_or_are_of_a_wrong_type(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        translate_config({**LLAMA, **changes})


def test_layer_types_of_qwen() -> None:
    values = {**LLAMA, "architectures": ["Qwen3ForCausalLM"], "sliding_window": 5}
    kinds = ["sliding_attention", "full_attention"]
    config = translate_config({**values, "use_sliding_window": True, "layer_types": kinds})
    assert config.layer_windows == (5, None)
    assert config.qk_norm
    with pytest.raises(ConfigError, match="use_sliding_window is false"):
        translate_config({**values, "layer_types": kinds})
    for wrong in (["full_attention"], ["full_attention", "chunked_attention"], "full_attention"):
        with pytest.raises(ConfigError, match="layer_types"):
            translate_config({**values, "layer_types": wrong})


def test_token_ids_and_dtypes() -> None:
    assert translate_config({**LLAMA, "eos_token_id": [3, 5]}).eos_token_ids == (3, 5)
    assert translate_config({**LLAMA, "eos_token_id": None}).eos_token_ids == ()
    assert translate_config(LLAMA).eos_token_ids == (2,)
    assert translate_config({**LLAMA, "torch_dtype": "torch.bfloat16"}).dtype == "bfloat16"
    assert translate_config({**LLAMA, "torch_dtype": "float32", "dtype": "float16"}).dtype == "float16"
    assert translate_config(LLAMA).dtype == "float32"


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=True) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


@given(
    name=st.sampled_from(sorted(CASES)),
    changes=st.dictionaries(
        st.sampled_from(sorted({key for case in CASES.values() for key in case.config} | {"dtype", "extra"})),
        _JSON,
        min_size=1,
        max_size=3,
    ),
)
@example(name="gpt2", changes={"architectures": [[]]})
def test_any_value_is_translated_or_refused_with_our_errors(name: str, changes: dict[str, Any]) -> None:
    try:
        config = translate_config(CASES[name].config, changes)
    except JaxLLMError as error:
        assert len(str(error)) > 20
    else:
        assert len(config.layer_windows) == config.num_layers
        assert config.num_heads % config.num_kv_heads == 0

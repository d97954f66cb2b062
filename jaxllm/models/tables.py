"""Where each parameter is found in a checkpoint: tables of names and axis patterns (`table_builder`)."""

from __future__ import annotations

from dataclasses import dataclass

from jaxllm.models.config import ModelConfig, MoEConfig
from jaxllm.models.table_builder import CheckpointTable, Index, Piece, TableBuilder


@dataclass(frozen=True, slots=True)
class _ExpertNames:
    """What a family calls the block of experts in a layer, its shared one, and the products of one."""

    block: str = "mlp"
    shared: str = "shared_expert"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


def mixtral_table(config: ModelConfig) -> CheckpointTable:
    """Mixtral, which differs from `llama_table` in what its experts are called."""
    return llama_table(config, _ExpertNames("block_sparse_moe", gate="w1", up="w3", down="w2"))


def llama_table(config: ModelConfig, names: _ExpertNames = _ExpertNames()) -> CheckpointTable:
    """Llama, Mistral, Qwen2, Qwen3; with experts Qwen2-MoE, Qwen3-MoE, OLMoE."""
    table, layer = TableBuilder(config), "layers.{layer}"
    _add_attention(table, layer, config)
    return _rotary_table(table, config, layer, names)


def deepseek_table(config: ModelConfig) -> CheckpointTable:
    """DeepSeek-V2 and V3, with latent attention."""
    table, layer = TableBuilder(config), "layers.{layer}"
    attention, ours = f"{layer}.self_attn", "layers.attention"
    bias = config.qkv_bias
    if config.mla is not None and config.mla.q_lora_rank:
        table.linear(f"{attention}.q_a_proj", f"{ours}.q_down", "j d", "j" if bias else None)
        table.add(f"{attention}.q_a_layernorm.weight", f"{ours}.q_norm.weight", "j")
        table.add(f"{attention}.q_b_proj.weight", f"{ours}.q_up.weight", "(z w) j -> z w j")
    else:
        table.add(f"{attention}.q_proj.weight", f"{ours}.query.weight", "(z w) d -> z w d")
    table.linear(f"{attention}.kv_a_proj_with_mqa", f"{ours}.kv_down", "m d", "m" if bias else None)
    table.add(f"{attention}.kv_a_layernorm.weight", f"{ours}.kv_norm.weight", "r")
    keys = config.mla.nope_head_dim if config.mla else 0
    for name, part in (("key_up", (0, keys)), ("value_up", (keys, table.size("b")))):
        pattern = "(z b) r -> z b r"
        table.add(f"{attention}.kv_b_proj.weight", f"{ours}.{name}.weight", pattern, part={"b": part})
    table.linear(f"{attention}.o_proj", f"{ours}.output", "d o", "d" if config.output_bias else None)
    if config.moe is not None and config.moe.selection_bias:
        table.add(
            f"{layer}.mlp.gate.e_score_correction_bias", "layers.mlp.router.bias", "x", (), config.moe.layers
        )
    extra = "|".join(str(config.num_layers + i) for i in range(config.extra_layers))
    ignored = (rf"layers\.({extra})\..*",) if extra else ()
    return _rotary_table(table, config, layer, _ExpertNames(shared="shared_experts"), ignored)


def _add_attention(table: TableBuilder, layer: str, config: ModelConfig) -> None:
    heads: tuple[tuple[str, Index, str], ...] = (
        ("q_proj", (slice(None), table.queries), "k g h"),
        ("k_proj", (slice(None), table.key), "k h"),
        ("v_proj", (slice(None), table.value), "k h"),
    )
    for name, at, axes in heads:
        bias = f"({axes}) -> {axes}" if config.qkv_bias else None
        table.linear(f"{layer}.self_attn.{name}", "layers.attention.qkv", f"({axes}) d -> {axes} d", bias, at)
    if config.qk_norm:
        per_head = config.qk_norm == "head"
        for name, axes in (("q_norm", "k g h"), ("k_norm", "k h")):
            pattern = "h" if per_head else f"({axes}) -> {axes}"
            table.add(f"{layer}.self_attn.{name}.weight", f"layers.attention.{name}.weight", pattern)
    table.linear(
        f"{layer}.self_attn.o_proj",
        "layers.attention.output",
        "d a",
        "d" if config.output_bias else None,
    )


def _rotary_table(
    table: TableBuilder,
    config: ModelConfig,
    layer: str,
    names: _ExpertNames,
    ignored: tuple[str, ...] = (),
) -> CheckpointTable:
    """What the Llama lineage has besides attention: norms, MLPs or experts, embeddings."""
    table.add("embed_tokens.weight", "embed.weight", "v e")
    table.add(f"{layer}.input_layernorm.weight", "layers.attention_norm.weight", "d")
    table.add(f"{layer}.post_attention_layernorm.weight", "layers.mlp_norm.weight", "d")
    if config.mlp_layers:
        _add_gated_mlp(table, f"{layer}.mlp", "layers.mlp", "f", config.mlp_layers, bias=config.mlp_bias)
    alternatives: tuple[tuple[Piece, ...], ...] = ()
    if config.moe is not None:
        if config.moe.shared_intermediate_size:
            shared = f"{layer}.mlp.{names.shared}"
            _add_gated_mlp(table, shared, "layers.mlp.shared", "s", config.moe.layers, bias=False)
            if config.moe.shared_gate:
                gate = "layers.mlp.shared_gate.weight"
                table.add(f"{shared}_gate.weight", gate, "1 d", (), config.moe.layers)
        alternatives = (_experts_apart(config, config.moe, names), _experts_fused(config, config.moe))
    table.add("norm.weight", "final_norm.weight", "d")
    return _finish(
        table,
        config,
        prefixes=("model.",),
        ignored=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", *ignored),
        embedding="embed_tokens.weight",
        alternatives=alternatives,
    )


def _add_gated_mlp(
    table: TableBuilder, tensors: str, parameters: str, width: str, layers: tuple[int, ...], *, bias: bool
) -> None:
    for part, name in enumerate(("gate_proj", "up_proj")):
        table.linear(
            f"{tensors}.{name}",
            f"{parameters}.gate_up",
            f"{width} d",
            width if bias else None,
            (part,),
            layers,
        )
    table.linear(
        f"{tensors}.down_proj", f"{parameters}.down", f"d {width}", "d" if bias else None, (), layers
    )


def _experts_apart(config: ModelConfig, moe: MoEConfig, names: _ExpertNames) -> tuple[Piece, ...]:
    """The router and the experts as published: every expert's products are tensors of their own."""
    table, block = TableBuilder(config), f"layers.{{layer}}.{names.block}"
    table.add(f"{block}.gate.weight", "layers.mlp.router.weight", "x d", (), moe.layers)
    for expert in range(moe.num_experts):
        one, ours = f"{block}.experts.{expert}", "layers.mlp.experts"
        for part, name in enumerate((names.gate, names.up)):
            table.add(
                f"{one}.{name}.weight", f"{ours}.gate_up.weight", "i d -> d i", (part, expert), moe.layers
            )
        table.add(f"{one}.{names.down}.weight", f"{ours}.down.weight", "d i -> i d", (expert,), moe.layers)
    return tuple(table.pieces)


def _experts_fused(config: ModelConfig, moe: MoEConfig) -> tuple[Piece, ...]:
    """The same as transformers 5 holds them in memory, and saves them with save_original_format=False."""
    table, block = TableBuilder(config), "layers.{layer}.mlp"
    table.add(f"{block}.gate.weight", "layers.mlp.router.weight", "x d", (), moe.layers)
    ours = "layers.mlp.experts"
    table.add(
        f"{block}.experts.gate_up_proj", f"{ours}.gate_up.weight", "x (2 i) d -> 2 x d i", (), moe.layers
    )
    table.add(f"{block}.experts.down_proj", f"{ours}.down.weight", "x d i -> x i d", (), moe.layers)
    return tuple(table.pieces)


def opt_table(config: ModelConfig) -> CheckpointTable:
    """OPT, where every KV head has one query: `k` counts all heads."""
    table, layer = TableBuilder(config), "layers.{layer}"
    table.add("embed_tokens.weight", "embed.weight", "v e")
    table.add("embed_positions.weight", "position_embed.weight", "n d")
    if config.embedding_dim != config.hidden_size:
        table.add("project_in.weight", "embed_in.weight", "d e")
        table.add("project_out.weight", "embed_out.weight", "e d")
    table.linear(f"{layer}.self_attn_layer_norm", "layers.attention_norm", "d", "d")
    heads: tuple[tuple[str, int], ...] = (("q_proj", 0), ("k_proj", table.key), ("v_proj", table.value))
    for name, part in heads:
        bias = "(k h) -> k h" if config.qkv_bias else None
        table.linear(
            f"{layer}.self_attn.{name}", "layers.attention.qkv", "(k h) d -> k h d", bias, (slice(None), part)
        )
    table.linear(
        f"{layer}.self_attn.out_proj",
        "layers.attention.output",
        "d a",
        "d" if config.output_bias else None,
    )
    table.linear(f"{layer}.final_layer_norm", "layers.mlp_norm", "d", "d")
    table.linear(f"{layer}.fc1", "layers.mlp.up", "f d", "f" if config.mlp_bias else None)
    table.linear(f"{layer}.fc2", "layers.mlp.down", "d f", "d" if config.mlp_bias else None)
    if config.final_norm:
        table.linear("final_layer_norm", "final_norm", "d", "d")
    return _finish(
        table,
        config,
        prefixes=("model.decoder.", "decoder."),
        embedding="embed_tokens.weight",
    )


def gpt2_table(config: ModelConfig) -> CheckpointTable:
    """GPT-2, whose products are stored `[in, out]`, the queries, keys and values as one."""
    table, layer = TableBuilder(config), "h.{layer}"
    table.add("wte.weight", "embed.weight", "v e")
    table.add("wpe.weight", "position_embed.weight", "n d")
    table.linear(f"{layer}.ln_1", "layers.attention_norm", "d", "d")
    table.linear(f"{layer}.attn.c_attn", "layers.attention.qkv", "d (3 k h) -> k 3 h d", "(3 k h) -> k 3 h")
    table.linear(f"{layer}.attn.c_proj", "layers.attention.output", "a d -> d a", "d")
    table.linear(f"{layer}.ln_2", "layers.mlp_norm", "d", "d")
    table.linear(f"{layer}.mlp.c_fc", "layers.mlp.up", "d f -> f d", "f")
    table.linear(f"{layer}.mlp.c_proj", "layers.mlp.down", "f d -> d f", "d")
    table.linear("ln_f", "final_norm", "d", "d")
    return _finish(
        table,
        config,
        prefixes=("transformer.",),
        # The causal mask, which old checkpoints carry as a buffer.
        ignored=(r"h\.\d+\.attn\.(bias|masked_bias)",),
        embedding="wte.weight",
    )


def bert_table(config: ModelConfig) -> CheckpointTable:
    """BERT, RoBERTa and XLM-RoBERTa, each KV head with one query: `k` counts all heads."""
    table, layer = TableBuilder(config), "encoder.layer.{layer}"
    for name, parameter, rows in (
        ("word_embeddings", "embed", "v"),
        ("position_embeddings", "position_embed", "n"),
        ("token_type_embeddings", "type_embed", "t"),
    ):
        table.add(f"embeddings.{name}.weight", f"{parameter}.weight", f"{rows} d")
    table.linear("embeddings.LayerNorm", "embed_norm", "d", "d")
    for name, part in (("query", 0), ("key", table.key), ("value", table.value)):
        table.linear(
            f"{layer}.attention.self.{name}",
            "layers.attention.qkv",
            "(k h) d -> k h d",
            "(k h) -> k h",
            (slice(None), part),
        )
    table.linear(f"{layer}.attention.output.dense", "layers.attention.output", "d a", "d")
    table.linear(f"{layer}.attention.output.LayerNorm", "layers.attention_norm", "d", "d")
    table.linear(f"{layer}.intermediate.dense", "layers.mlp.up", "f d", "f")
    table.linear(f"{layer}.output.dense", "layers.mlp.down", "d f", "d")
    table.linear(f"{layer}.output.LayerNorm", "layers.mlp_norm", "d", "d")
    # What a model was trained with besides: position numbers as a buffer, heads that nothing reads.
    ignored = [r"embeddings\.(position|token_type)_ids", r"(cls|lm_head)\..*"]
    pooler = config.pooler
    if pooler is not None and pooler.labels:
        roberta = "Roberta" in config.architecture
        dense, scores = (
            ("classifier.dense", "classifier.out_proj") if roberta else ("pooler.dense", "classifier")
        )
        table.linear(dense, "pooler.dense", "c d", "d")
        table.linear(scores, "pooler.classifier", "l d", "l")
    else:
        ignored.append(r"pooler\.dense\.(weight|bias)")
    if pooler is not None:
        table.projections(pooler)
    return CheckpointTable(tuple(table.pieces), ("bert.", "roberta."), tuple(ignored))


def _finish(
    table: TableBuilder,
    config: ModelConfig,
    *,
    prefixes: tuple[str, ...],
    embedding: str,
    ignored: tuple[str, ...] = (),
    alternatives: tuple[tuple[Piece, ...], ...] = (),
) -> CheckpointTable:
    if config.pooler is not None:
        table.projections(config.pooler)
        if config.pooler.labels:
            bias = "l" if config.pooler.classifier_bias else None
            table.linear("score", "pooler.classifier", "l d", bias)
        # A model that generates may be run as one that embeds; nothing reads its output head then.
        ignored = (*ignored, r"lm_head\.weight")
        return CheckpointTable(tuple(table.pieces), prefixes, ignored, alternatives=alternatives)
    if not config.tie_word_embeddings:
        table.add("lm_head.weight", "lm_head.weight", "v e")
    return CheckpointTable(
        pieces=tuple(table.pieces),
        prefixes=prefixes,
        ignored=ignored,
        tied=("lm_head.weight", embedding) if config.tie_word_embeddings else None,
        alternatives=alternatives,
    )

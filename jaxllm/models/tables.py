"""Where each parameter is found in a checkpoint: tables of names and axis patterns.

A pattern such as `(k g h) d -> k g h d` says how the axes of a tensor on disk lie in a parameter
of ours: `k` KV heads, `g` queries per KV head, `h` head_dim, `d` hidden size (`c` too, where both
sides have it), `e` embedding width, `f` MLP width, `v` vocabulary, `n` learned positions, `t` token
types, `l` labels; digits stand for themselves.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from jaxllm.models.config import ModelConfig

Index = tuple[int | slice, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of a checkpoint, and the part of a parameter that it fills.

    Attributes:
        tensor: its name on disk, without the family's prefix; `{layer}` is the layer's number.
        parameter: our name.
        factors: sizes of the named axes on disk, grouped by the dimensions they are packed into.
        order: for each axis of the filled part, its place among the flattened `factors`.
        at: which part of the parameter it fills: basic indices of the leading axes; () is all.
    """

    tensor: str
    parameter: str
    factors: tuple[tuple[int, ...], ...]
    order: tuple[int, ...]
    at: Index = ()

    @property
    def disk_shape(self) -> tuple[int, ...]:
        return tuple(math.prod(group) for group in self.factors)

    @property
    def per_layer(self) -> bool:
        return "{layer}" in self.tensor


@dataclass(frozen=True, slots=True)
class CheckpointTable:
    """All that a checkpoint of a family may hold.

    Attributes:
        pieces: together they fill every parameter once.
        prefixes: of tensor names, of which a checkpoint may carry any one or none.
        ignored: regular expressions, whole names without prefix, of tensors that carry nothing.
        tied: a tensor that may be stored although it is the same as another one, and that other.
    """

    pieces: tuple[Piece, ...]
    prefixes: tuple[str, ...]
    ignored: tuple[str, ...] = ()
    tied: tuple[str, str] | None = None


class _TableBuilder:
    def __init__(self, config: ModelConfig) -> None:
        groups = config.queries_per_kv_head
        self.queries = slice(0, groups)
        self.key, self.value = groups, groups + 1
        self._sizes = {
            "k": config.num_kv_heads,
            "g": groups,
            "h": config.head_dim,
            "d": config.hidden_size,
            "c": config.hidden_size,
            "e": config.embedding_dim,
            "f": config.intermediate_size,
            "v": config.vocab_size,
            "n": config.num_learned_positions,
            "t": config.num_token_types,
            "l": 0 if config.pooler is None else len(config.pooler.labels),
        }
        self.pieces: list[Piece] = []

    def add(self, tensor: str, parameter: str, pattern: str, at: Index = ()) -> None:
        on_disk, _, in_parameter = pattern.partition("->")
        groups = [match.strip("()").split() for match in re.findall(r"\([^)]*\)|\S+", on_disk)]
        names = [name for group in groups for name in group]
        order = tuple(names.index(name) for name in (in_parameter.split() or names))
        factors = tuple(
            tuple(int(name) if name.isdigit() else self._sizes[name] for name in group) for group in groups
        )
        self.pieces.append(Piece(tensor, parameter, factors, order, at))

    def linear(
        self, tensor: str, parameter: str, weight: str, bias: str | None = None, at: Index = ()
    ) -> None:
        self.add(f"{tensor}.weight", f"{parameter}.weight", weight, at)
        if bias is not None:
            self.add(f"{tensor}.bias", f"{parameter}.bias", bias, at)


def llama_table(config: ModelConfig) -> CheckpointTable:
    """Llama, Mistral, Qwen2, Qwen3."""
    table, layer = _TableBuilder(config), "layers.{layer}"
    heads: tuple[tuple[str, Index, str], ...] = (
        ("q_proj", (slice(None), table.queries), "k g h"),
        ("k_proj", (slice(None), table.key), "k h"),
        ("v_proj", (slice(None), table.value), "k h"),
    )
    table.add("embed_tokens.weight", "embed.weight", "v e")
    table.add(f"{layer}.input_layernorm.weight", "layers.attention_norm.weight", "d")
    for name, at, axes in heads:
        bias = f"({axes}) -> {axes}" if config.qkv_bias else None
        table.linear(f"{layer}.self_attn.{name}", "layers.attention.qkv", f"({axes}) d -> {axes} d", bias, at)
    if config.qk_norm:
        table.add(f"{layer}.self_attn.q_norm.weight", "layers.attention.q_norm.weight", "h")
        table.add(f"{layer}.self_attn.k_norm.weight", "layers.attention.k_norm.weight", "h")
    table.linear(
        f"{layer}.self_attn.o_proj",
        "layers.attention.output",
        "d (k g h) -> d k g h",
        "d" if config.output_bias else None,
    )
    table.add(f"{layer}.post_attention_layernorm.weight", "layers.mlp_norm.weight", "d")
    for part, name in enumerate(("gate_proj", "up_proj")):
        table.linear(
            f"{layer}.mlp.{name}", "layers.mlp.gate_up", "f d", "f" if config.mlp_bias else None, (part,)
        )
    table.linear(f"{layer}.mlp.down_proj", "layers.mlp.down", "d f", "d" if config.mlp_bias else None)
    table.add("norm.weight", "final_norm.weight", "d")
    return _finish(
        table,
        config,
        prefixes=("model.",),
        ignored=(r"(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
        embedding="embed_tokens.weight",
    )


def opt_table(config: ModelConfig) -> CheckpointTable:
    """OPT, where every KV head has one query: `k` counts all heads."""
    table, layer = _TableBuilder(config), "layers.{layer}"
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
        "d (k g h) -> d k g h",
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
    table, layer = _TableBuilder(config), "h.{layer}"
    table.add("wte.weight", "embed.weight", "v e")
    table.add("wpe.weight", "position_embed.weight", "n d")
    table.linear(f"{layer}.ln_1", "layers.attention_norm", "d", "d")
    table.linear(f"{layer}.attn.c_attn", "layers.attention.qkv", "d (3 k h) -> k 3 h d", "(3 k h) -> k 3 h")
    table.linear(f"{layer}.attn.c_proj", "layers.attention.output", "(k g h) d -> d k g h", "d")
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
    table, layer = _TableBuilder(config), "encoder.layer.{layer}"
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
    table.linear(f"{layer}.attention.output.dense", "layers.attention.output", "d (k g h) -> d k g h", "d")
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
    return CheckpointTable(tuple(table.pieces), ("bert.", "roberta."), tuple(ignored))


def _finish(
    table: _TableBuilder,
    config: ModelConfig,
    *,
    prefixes: tuple[str, ...],
    embedding: str,
    ignored: tuple[str, ...] = (),
) -> CheckpointTable:
    if config.pooler is not None:
        if config.pooler.labels:
            bias = "l" if config.pooler.classifier_bias else None
            table.linear("score", "pooler.classifier", "l d", bias)
        # A model that generates may be run as one that embeds; nothing reads its output head then.
        return CheckpointTable(tuple(table.pieces), prefixes, (*ignored, r"lm_head\.weight"))
    if not config.tie_word_embeddings:
        table.add("lm_head.weight", "lm_head.weight", "v e")
    return CheckpointTable(
        pieces=tuple(table.pieces),
        prefixes=prefixes,
        ignored=ignored,
        tied=("lm_head.weight", embedding) if config.tie_word_embeddings else None,
    )

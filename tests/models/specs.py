"""The parameters of a model as the design lists them, apart from the decoder that declares them."""

from __future__ import annotations

from jaxllm.models.config import ModelConfig
from jaxllm.models.parameters import ParameterSpec


def make_specs(config: ModelConfig) -> dict[str, ParameterSpec]:
    hidden, embedding, vocab = config.hidden_size, config.embedding_dim, config.vocab_size
    inner, head_dim = config.intermediate_size, config.head_dim
    kv_heads, groups = config.num_kv_heads, config.queries_per_kv_head
    specs: dict[str, ParameterSpec] = {}

    def add(
        name: str,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        num_layers: int = config.num_layers,
        exact: bool = False,
    ) -> None:
        specs[name] = ParameterSpec(shape, axes, num_layers if name.startswith("layers.") else None, exact)

    def add_norm(name: str) -> None:
        add(f"{name}.weight", (hidden,), (None,))
        if config.norm == "layer":
            add(f"{name}.bias", (hidden,), (None,))

    add("embed.weight", (vocab, embedding), ("vocab", "embed"))
    if config.num_learned_positions:
        add("position_embed.weight", (config.num_learned_positions, hidden), (None, "embed"))
    if embedding != hidden:
        add("embed_in.weight", (hidden, embedding), ("embed", None))
        add("embed_out.weight", (embedding, hidden), (None, "embed"))
    add_norm("layers.attention_norm")
    if config.mla is None:
        qkv = "layers.attention.qkv"
        add(f"{qkv}.weight", (kv_heads, groups + 2, head_dim, hidden), ("kv_heads", None, None, "embed"))
        if config.qkv_bias:
            add(f"{qkv}.bias", (kv_heads, groups + 2, head_dim), ("kv_heads", None, None))
        if config.qk_norm == "head":
            add("layers.attention.q_norm.weight", (head_dim,), (None,))
            add("layers.attention.k_norm.weight", (head_dim,), (None,))
        if config.qk_norm == "width":
            add("layers.attention.q_norm.weight", (kv_heads, groups, head_dim), ("kv_heads", None, None))
            add("layers.attention.k_norm.weight", (kv_heads, head_dim), ("kv_heads", None))
        output = "layers.attention.output"
        add(f"{output}.weight", (hidden, config.num_heads * head_dim), ("embed", "kv_heads"))
        if config.output_bias:
            add(f"{output}.bias", (hidden,), ("embed",))
    else:
        mla, heads = config.mla, config.num_heads
        query = heads, mla.nope_head_dim + mla.rope_head_dim
        if rank := mla.q_lora_rank:
            add("layers.attention.q_down.weight", (rank, hidden), (None, "embed"))
            add("layers.attention.q_norm.weight", (rank,), (None,))
            add("layers.attention.q_up.weight", (*query, rank), ("heads", None, None))
        else:
            add("layers.attention.query.weight", (*query, hidden), ("heads", None, "embed"))
        width = mla.kv_lora_rank + mla.rope_head_dim
        add("layers.attention.kv_down.weight", (width, hidden), (None, "embed"))
        add("layers.attention.kv_norm.weight", (mla.kv_lora_rank,), (None,))
        for name, size in (("key_up", mla.nope_head_dim), ("value_up", mla.value_head_dim)):
            shape = (heads, size, mla.kv_lora_rank)
            add(f"layers.attention.{name}.weight", shape, ("heads", None, None))
        add("layers.attention.output.weight", (hidden, heads * mla.value_head_dim), ("embed", "heads"))
        for name, size in (("q_down", mla.q_lora_rank), ("kv_down", width)):
            if config.qkv_bias and size:
                add(f"layers.attention.{name}.bias", (size,), (None,))
        if config.output_bias:
            add("layers.attention.output.bias", (hidden,), ("embed",))
    add_norm("layers.mlp_norm")
    num_mlps = config.num_layers - (len(config.moe.layers) if config.moe else 0)
    if num_mlps:
        if config.gated_mlp:
            add("layers.mlp.gate_up.weight", (2, inner, hidden), (None, "mlp", "embed"), num_mlps)
        else:
            add("layers.mlp.up.weight", (inner, hidden), ("mlp", "embed"), num_mlps)
        add("layers.mlp.down.weight", (hidden, inner), ("embed", "mlp"), num_mlps)
        if config.mlp_bias:
            if config.gated_mlp:
                add("layers.mlp.gate_up.bias", (2, inner), (None, "mlp"), num_mlps)
            else:
                add("layers.mlp.up.bias", (inner,), ("mlp",), num_mlps)
            add("layers.mlp.down.bias", (hidden,), ("embed",), num_mlps)
    if config.moe:
        experts, inner, count = config.moe.num_experts, config.moe.intermediate_size, len(config.moe.layers)
        add("layers.mlp.router.weight", (experts, hidden), (None, "embed"), count)
        if config.moe.selection_bias:
            add("layers.mlp.router.bias", (experts,), (None,), count, exact=True)
        gate_up = (2, experts, hidden, inner)
        add("layers.mlp.experts.gate_up.weight", gate_up, (None, None, "embed", "mlp"), count)
        add("layers.mlp.experts.down.weight", (experts, inner, hidden), (None, "mlp", "embed"), count)
        if shared := config.moe.shared_intermediate_size:
            add("layers.mlp.shared.gate_up.weight", (2, shared, hidden), (None, "mlp", "embed"), count)
            add("layers.mlp.shared.down.weight", (hidden, shared), ("embed", "mlp"), count)
            if config.moe.shared_gate:
                add("layers.mlp.shared_gate.weight", (1, hidden), (None, "embed"), count)
    if config.final_norm:
        add_norm("final_norm")
    if not config.tie_word_embeddings:
        add("lm_head.weight", (vocab, embedding), ("vocab", "embed"))
    return specs

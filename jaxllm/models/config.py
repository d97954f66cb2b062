"""A model as data: everything the one decoder needs to know about an architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding (RoFormer, Su et al. 2021, section 3.2) and its long-context scalings.

    Attributes:
        theta: base of the frequencies.
        rotary_dim: how many leading dimensions of a head are rotated.
        scaling: which scaling applies; the fields below belong to it.
        factor: context extension factor of every scaling.
        low_freq_factor, high_freq_factor: of `llama3`.
        original_max_position: training context, for `llama3`, `yarn` and `dynamic`.
        beta_fast, beta_slow: of `yarn` (Peng et al. 2023, section 3.2).
        attention_factor: multiplies cos and sin (`yarn`).
        interleaved: pairs are neighbours (GPT-J, DeepSeek), rather than the halves of what is rotated.
    """

    theta: float
    rotary_dim: int
    scaling: Literal["none", "linear", "dynamic", "llama3", "yarn"] = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True, slots=True)
class Projection:
    """A dense layer after the pooling, as sentence-transformers has it.

    Attributes:
        folder: of the model's directory, that holds its weights.
    """

    folder: str
    in_features: int
    out_features: int
    bias: bool
    activation: Literal["identity", "tanh", "gelu", "relu", "silu", "sigmoid"]


@dataclass(frozen=True, slots=True)
class Pooler:
    """What a pooling model makes of the hidden states after its last layer.

    Attributes:
        pooling: which of them stands for a sequence: that of its last token, that of its first, or
            the mean over all.
        dense: a square layer with tanh that follows (BERT's pooler, RoBERTa's classification head).
        labels: names of the classes that a linear layer scores; empty for a model that embeds.
        classifier_bias: whether that layer has a bias.
        activation: of scores, where a request does not say otherwise.
        normalize: whether embeddings have length 1, where a request does not say otherwise.
        matryoshka: whether an embedding may be cut to fewer dimensions (Kusupati et al. 2022), and to
            which; an empty tuple is any.
        projections: layers after the pooling, of a model that embeds.
        prompts: names and texts that may go before an input, as the model was trained.
        default_prompt: which of them does, where a request does not say otherwise.
    """

    pooling: Literal["last", "first", "mean"] = "last"
    dense: bool = False
    labels: tuple[str, ...] = ()
    classifier_bias: bool = False
    activation: Literal["softmax", "sigmoid", "identity"] = "softmax"
    normalize: bool = True
    matryoshka: tuple[int, ...] | None = None
    projections: tuple[Projection, ...] = ()
    prompts: tuple[tuple[str, str], ...] = ()
    default_prompt: str | None = None

    def width(self, hidden_size: int) -> int:
        """Of an embedding."""
        return self.projections[-1].out_features if self.projections else hidden_size


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Experts in place of the MLP, of which every token takes a few (Shazeer et al. 2017; Jiang et al. 2024).

    A router scores all experts; a token takes those of the highest scores, which are their weights.

    Attributes:
        num_experts: of each layer that has any.
        experts_per_token: how many a token takes.
        intermediate_size: inner width of an expert.
        layers: numbers of the layers that have experts, ascending; the others have an MLP.
        normalize_weights: the weights of a token's experts are divided by their sum, which with softmax is
            the same as one over the logits of those alone.
        shared_intermediate_size: inner width of one more expert, which every token takes; 0 where there is
            none.
        shared_gate: the shared expert has a sigmoid gate of its own (Qwen2-MoE).
        scoring: of an expert, from the router's logits.
        selection_bias: a number of each expert takes part in which are chosen, and not in their weights
            (DeepSeek-V3, DeepSeek-AI 2024, section 2.1.2).
        num_groups, groups_per_token: the experts stand in groups, one after the other, and a token takes
            experts of so many groups only (DeepSeek-V2, section 2.2.2).
        group_experts: the scores of so many of its best experts sum up to that of a group.
        weight_scale: multiplies the weights at last.
    """

    num_experts: int
    experts_per_token: int
    intermediate_size: int
    layers: tuple[int, ...]
    normalize_weights: bool
    shared_intermediate_size: int = 0
    shared_gate: bool = True
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    selection_bias: bool = False
    num_groups: int = 1
    groups_per_token: int = 1
    group_experts: int = 1
    weight_scale: float = 1.0

    def experts_read(self, num_tokens: int) -> float:
        """How many experts of a layer so many tokens take, if each of them is as likely as the others."""
        return self.num_experts * (1 - (1 - self.experts_per_token / self.num_experts) ** num_tokens)


@dataclass(frozen=True, slots=True)
class MLAConfig:
    """Multi-head latent attention (DeepSeek-V2, DeepSeek-AI 2024, section 2.1): what is cached of a token is
    one latent, which keys and values of all heads follow from, and one rotated key.

    Attributes:
        q_lora_rank: width that queries go through, too; 0 where they do not.
        kv_lora_rank: width of the latent.
        nope_head_dim, rope_head_dim: of a head's query and key, what is not rotated and what is.
        value_head_dim: of a head's value.
    """

    q_lora_rank: int
    kv_lora_rank: int
    nope_head_dim: int
    rope_head_dim: int
    value_head_dim: int

    @property
    def width(self) -> int:
        """Numbers of a token in a layer's cache."""
        return self.kv_lora_rank + self.rope_head_dim

    @property
    def pair_width(self) -> int:
        """Multiplications of a head's query and a position that it sees: with its row, then its latent."""
        return self.width + self.kv_lora_rank


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Architecture of a transformer: a decoder, or an encoder of the same data flow.

    Families differ in these values and nowhere else: `jaxllm.models.families` translates a
    Hugging Face `config.json` into one of these, and the decoder reads nothing else.

    Attributes:
        architecture: the Hugging Face class name, for messages.
        norm: "rms" (RMSNorm) or "layer" (LayerNorm, with bias).
        norm_placement: "pre" normalises before attention and MLP, "post" after the residual sum.
        gated_mlp: down(act(gate(x)) * up(x)) where true, down(act(up(x))) otherwise.
        qk_norm: RMSNorm on queries and keys, before rotation: over each "head", or over the whole
            "width" of all of them (OLMoE).
        qkv_clip: queries, keys and values are cut off at plus and minus this, after the norm (OLMoE).
        rope: None where positions are learned.
        num_learned_positions: rows of the learned position table, 0 where there is none.
        learned_position_offset: added to a position before the look-up (2 in OPT).
        embedding_dim: width of the token embedding where it differs from hidden_size (OPT-350m
            projects in and out); equal to hidden_size otherwise.
        layer_windows: sliding attention window of each layer in tokens (a query sees itself and
            the window - 1 positions before it); None is full attention.
        final_norm: whether a norm follows the last layer.
        bidirectional: whether every token sees the whole sequence (BERT), not only what precedes it.
        num_token_types: rows of the table of token types ("segments"), 0 where there is none.
        embedding_norm: whether a norm follows the embeddings.
        pooler: what becomes of the hidden states in a pooling model; None where the model generates.
        moe: None where every layer has an MLP.
        mla: latent attention, whose one row a token counts as one KV head, and head_dim as that of queries;
            None where keys and values are cached.
        extra_layers: layers behind the last one that a checkpoint carries and that are not run (to predict
            several tokens at once).
        dtype: what the checkpoint's config says its weights are.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    norm: Literal["rms", "layer"] = "rms"
    norm_placement: Literal["pre", "post"] = "pre"
    norm_eps: float = 1e-6
    activation: Activation = "silu"
    gated_mlp: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "width"] | None = None
    qkv_clip: float | None = None
    attention_scale: float = 1.0
    rope: RopeConfig | None = None
    num_learned_positions: int = 0
    learned_position_offset: int = 0
    embedding_dim: int = 0
    layer_windows: tuple[int | None, ...] = ()
    tie_word_embeddings: bool = False
    final_norm: bool = True
    bidirectional: bool = False
    num_token_types: int = 0
    embedding_norm: bool = False
    pooler: Pooler | None = None
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None
    extra_layers: int = 0
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def mlp_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that have an MLP."""
        sparse = () if self.moe is None else self.moe.layers
        return tuple(layer for layer in range(self.num_layers) if layer not in sparse)

    @property
    def layer_parameters(self) -> int:
        """Weights of all layers' linear products that are used once a token."""
        hidden = self.hidden_size
        attention = self._attention_parameters
        mlp = (3 if self.gated_mlp else 2) * hidden * self.intermediate_size
        total = self.num_layers * attention + len(self.mlp_layers) * mlp
        if self.moe is not None:
            shared = self.moe.shared_intermediate_size
            router = hidden * (self.moe.num_experts + (1 if shared and self.moe.shared_gate else 0))
            total += len(self.moe.layers) * (router + 3 * hidden * shared)
            total += self.moe.experts_per_token * self.expert_parameters
        return total

    @property
    def _attention_parameters(self) -> int:
        """Weights of one layer's attention."""
        hidden, heads, mla = self.hidden_size, self.num_heads, self.mla
        if mla is None:
            return hidden * self.head_dim * 2 * (heads + self.num_kv_heads)
        rank = mla.q_lora_rank
        queries = rank * (hidden + heads * self.head_dim) if rank else hidden * heads * self.head_dim
        expanded = mla.kv_lora_rank * heads * (mla.nope_head_dim + mla.value_head_dim)
        return queries + hidden * mla.width + expanded + heads * mla.value_head_dim * hidden

    @property
    def expert_parameters(self) -> int:
        """Weights of one expert of every layer that has any."""
        moe = self.moe
        return 0 if moe is None else len(moe.layers) * 3 * self.hidden_size * moe.intermediate_size

    @property
    def head_parameters(self) -> int:
        """Weights of the product that yields the logits, whether tied to the embeddings or not."""
        return self.vocab_size * (self.embedding_dim or self.hidden_size)

    @property
    def cache_rows(self) -> tuple[int, int]:
        """(rows, numbers in a row) of a token in a layer's cache."""
        if self.mla is None:
            return 2 * self.num_kv_heads, self.head_dim
        return self.num_kv_heads, self.mla.width

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    def without_windows(self) -> ModelConfig:
        """The same model with full attention in every layer."""
        return replace(self, layer_windows=(None,) * self.num_layers)

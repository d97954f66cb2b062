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
    """

    pooling: Literal["last", "first", "mean"] = "last"
    dense: bool = False
    labels: tuple[str, ...] = ()
    classifier_bias: bool = False
    activation: Literal["softmax", "sigmoid", "identity"] = "softmax"
    normalize: bool = True
    matryoshka: tuple[int, ...] | None = None


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
        qk_norm: RMSNorm over head_dim on queries and keys, before rotation.
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
    qk_norm: bool = False
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
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def layer_parameters(self) -> int:
        """Weights of all layers' linear products, each of which is used once a token."""
        attention = self.hidden_size * self.head_dim * (2 * self.num_heads + 2 * self.num_kv_heads)
        mlp = (3 if self.gated_mlp else 2) * self.hidden_size * self.intermediate_size
        return self.num_layers * (attention + mlp)

    @property
    def head_parameters(self) -> int:
        """Weights of the product that yields the logits, whether tied to the embeddings or not."""
        return self.vocab_size * (self.embedding_dim or self.hidden_size)

    @property
    def queries_per_kv_head(self) -> int:
        return self.num_heads // self.num_kv_heads

    def without_windows(self) -> ModelConfig:
        """The same model with full attention in every layer."""
        return replace(self, layer_windows=(None,) * self.num_layers)

"""Encoders of the BERT family (Devlin et al. 2019): the decoder's data flow, seen in both directions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxllm.errors import UnsupportedModelError
from jaxllm.models.config import Activation, ModelConfig, Pooler
from jaxllm.models.fields import ConfigFields

BERT_DEFAULTS: Mapping[str, Any] = {"pad_token_id": 0, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
ROBERTA_DEFAULTS: Mapping[str, Any] = {**BERT_DEFAULTS, "pad_token_id": 1}


def bert_config(
    fields: ConfigFields, common: Mapping[str, Any], activations: Mapping[str, Activation], *, roberta: bool
) -> ModelConfig:
    """What the config of a BERT or RoBERTa says.

    Args:
        common: what every family reads alike.
        activations: by their names in config.json.
        roberta: positions are counted from after the padding token's id.
    """
    fields.require("position_embedding_type", "absolute")
    fields.require("is_decoder", False)
    for training_only in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        fields.get(training_only)
    positions = fields.integer("max_position_embeddings")
    offset = fields.integer("pad_token_id", minimum=0) + 1 if roberta else 0
    if positions <= offset:
        raise UnsupportedModelError(
            f"config.json has max_position_embeddings={positions}, of which the first {offset} are never used"
        )
    layers = common["num_layers"]
    return ModelConfig(
        **{**common, "tie_word_embeddings": True},
        intermediate_size=fields.integer("intermediate_size"),
        max_position_embeddings=positions - offset,
        norm="layer",
        norm_placement="post",
        norm_eps=fields.number("layer_norm_eps", 1e-12),
        activation=fields.choice("hidden_act", activations, "gelu"),
        gated_mlp=False,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        num_learned_positions=positions,
        learned_position_offset=offset,
        embedding_dim=common["hidden_size"],
        layer_windows=(None,) * layers,
        final_norm=False,
        bidirectional=True,
        num_token_types=fields.integer("type_vocab_size"),
        embedding_norm=True,
        pooler=Pooler("first"),
    )

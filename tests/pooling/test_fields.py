"""What a checkpoint and its user say about pooling, and what is refused of it; without torch or weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from jaxllm import PoolingParams
from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError, InvalidRequestError, UnsupportedModelError
from jaxllm.execution.platform import Platform
from jaxllm.execution.resolve import resolve
from jaxllm.models.config import ModelConfig, Pooler
from jaxllm.models.decoder import parameter_specs
from jaxllm.models.families import checkpoint_table, translate_config
from jaxllm.models.pooler_fields import resolve_pooling
from tests.models.checkpoints import LLAMA
from tests.pooling.checkpoints import BERT, add_sentence_transformers


def bert(**fields: Any) -> ModelConfig:
    return translate_config({"architectures": ["BertModel"], **BERT, **fields})


def llama(kind: str, **fields: Any) -> ModelConfig:
    return translate_config({**LLAMA, "architectures": [f"Llama{kind}"], **fields})


def resolved(model: ModelConfig, path: Path, **said: Any) -> ModelConfig:
    arguments: dict[str, Any] = {"runner": "auto", "convert": "auto", "overrides": {}, **said}
    return resolve_pooling(model, path, **arguments)


@pytest.mark.parametrize(
    ("fields", "labels", "activation"),
    [
        ({}, ("LABEL_0", "LABEL_1"), "softmax"),
        ({"num_labels": 1}, ("LABEL_0",), "sigmoid"),
        ({"id2label": {"1": "b", "0": "a"}}, ("a", "b"), "softmax"),
        ({"problem_type": "regression", "num_labels": 1}, ("LABEL_0",), "identity"),
        ({"problem_type": "multi_label_classification"}, ("LABEL_0", "LABEL_1"), "sigmoid"),
        (
            {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity", "num_labels": 1},
            ("LABEL_0",),
            "identity",
        ),
        (
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Sigmoid"}},
            ("LABEL_0", "LABEL_1"),
            "sigmoid",
        ),
    ],
)
def test_labels_and_their_activation(
    fields: dict[str, Any], labels: tuple[str, ...], activation: str
) -> None:
    for model in (
        llama("ForSequenceClassification", **fields),
        translate_config({"architectures": ["BertForSequenceClassification"], **BERT, **fields}),
    ):
        assert model.pooler is not None
        assert (model.pooler.labels, model.pooler.activation) == (labels, activation)


def test_every_architecture_fills_what_it_declares() -> None:
    for model in (
        bert(),
        llama("Model"),
        llama("ForSequenceClassification", num_labels=3),
        translate_config(
            {"architectures": ["XLMRobertaForSequenceClassification"], **BERT, "pad_token_id": 1}
        ),
    ):
        filled = {piece.parameter for piece in checkpoint_table(model).pieces}
        assert filled == set(parameter_specs(model))


def test_which_models_pool(tmp_path: Path) -> None:
    assert resolved(llama("ForCausalLM"), tmp_path).pooler is None
    assert resolved(llama("ForCausalLM"), tmp_path, runner="pooling").pooler == Pooler("last")
    assert resolved(llama("ForCausalLM"), tmp_path, convert="embed").pooler == Pooler("last")
    assert resolved(bert(), tmp_path).pooler == Pooler("first")
    mean = {"pooling_type": "MEAN", "use_activation": False}
    assert resolved(bert(), tmp_path, overrides=mean).pooler == Pooler("mean", normalize=False)
    add_sentence_transformers(tmp_path, "lasttoken", normalize=False)
    assert resolved(llama("ForCausalLM"), tmp_path).pooler == Pooler("last", normalize=False)
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 20}))
    assert resolved(bert(), tmp_path).max_position_embeddings == 20
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 2000}))
    assert resolved(bert(), tmp_path).max_position_embeddings == 48


@pytest.mark.parametrize(
    ("kind", "said", "message"),
    [
        ("Model", {"runner": "generate"}, "no output head"),
        ("ForCausalLM", {"convert": "classify"}, "ForSequenceClassification"),
        ("ForCausalLM", {"runner": "pooling", "convert": "none"}, "generates"),
        ("ForCausalLM", {"overrides": {"pooling_type": "MEAN"}}, "runner='pooling'"),
        ("ForCausalLM", {"runner": "generate", "convert": "embed"}, "goes with"),
        ("Model", {"overrides": {"pooling_type": "MAX"}}, "LAST, CLS, MEAN"),
        ("Model", {"overrides": {"step_tag_id": 5}}, "step_tag_id=5"),
    ],
)
def test_what_contradicts_is_refused(kind: str, said: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(llama(kind), tmp_path, **said)


def test_what_sentence_transformers_adds_and_is_not_served(tmp_path: Path) -> None:
    add_sentence_transformers(tmp_path, "max_tokens", normalize=True)
    with pytest.raises(UnsupportedModelError, match="pooling_mode_max_tokens"):
        resolved(bert(), tmp_path)
    modules = json.loads((tmp_path / "modules.json").read_text())
    other = {"idx": 3, "name": "3", "path": "3_LSTM", "type": "sentence_transformers.models.LSTM"}
    (tmp_path / "modules.json").write_text(json.dumps([*modules, other]))
    with pytest.raises(UnsupportedModelError, match="has LSTM after the transformer"):
        resolved(bert(), tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([modules[0], modules[2], modules[1]]))
    with pytest.raises(UnsupportedModelError, match="Transformer, Normalize, Pooling, in this order"):
        resolved(bert(), tmp_path)
    with pytest.raises(UnsupportedModelError, match="position_embedding_type"):
        bert(position_embedding_type="relative_key")
    with pytest.raises(UnsupportedModelError, match="is_decoder"):
        bert(is_decoder=True)
    with pytest.raises(ConfigError, match="id2label"):
        llama("ForSequenceClassification", id2label={"0": "a", "2": "b"})


@pytest.mark.parametrize(
    ("layer", "error", "message"),
    [
        ({"out_features": 8}, ConfigError, "in_features and out_features"),
        (
            {"in_features": 23, "out_features": 8},
            ConfigError,
            "takes vectors of 23 numbers, and gets some of 24",
        ),
        (
            {"activation_function": "torch.nn.PReLU"},
            UnsupportedModelError,
            r"torch\.nn\.PReLU after its layer",
        ),
        ({"module_input_name": "token_embeddings"}, UnsupportedModelError, "module_input_name='token_emb"),
    ],
)
def test_dense_layers_that_are_not_served(
    layer: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    sizes = {} if "out_features" in layer else {"in_features": 24, "out_features": 8}
    add_sentence_transformers(tmp_path, "cls_token", normalize=True, dense=[{**sizes, **layer}])
    with pytest.raises(error, match=message):
        resolved(bert(), tmp_path)


def test_dense_layers_are_parameters_and_prompts_are_read(tmp_path: Path) -> None:
    dense = [{"in_features": 24, "out_features": 8}, {"in_features": 8, "out_features": 8, "bias": False}]
    add_sentence_transformers(tmp_path, "cls_token", normalize=True, dense=dense)
    file = tmp_path / "config_sentence_transformers.json"
    file.write_text(json.dumps({"prompts": {"query": "q: "}, "default_prompt_name": None}))
    model = resolved(bert(), tmp_path)
    assert model.pooler is not None and model.pooler.width(24) == 8
    assert [layer.activation for layer in model.pooler.projections] == ["tanh", "tanh"]
    filled = {piece.parameter for piece in checkpoint_table(model).pieces}
    assert filled == set(parameter_specs(model))
    assert (model.pooler.prompts, model.pooler.default_prompt) == ((("query", "q: "),), None)
    file.write_text(json.dumps({"prompts": {}, "default_prompt_name": "query"}))
    with pytest.raises(ConfigError, match="default_prompt_name='query', which is none"):
        resolved(bert(), tmp_path)
    file.write_text(json.dumps({"prompts": {"query": "q: "}}))
    pooling = tmp_path / "1_Pooling" / "config.json"
    pooling.write_text(json.dumps({**json.loads(pooling.read_text()), "include_prompt": False}))
    with pytest.raises(UnsupportedModelError, match="include_prompt=false"):
        resolved(bert(), tmp_path)


def test_an_encoder_computes_every_prompt_in_one_step() -> None:
    config = resolve(EngineConfig(), bert(), Platform("cpu"))
    assert (config.enable_chunked_prefill, config.enable_prefix_caching) == (False, False)
    assert config.max_num_batched_tokens is not None
    assert config.max_num_batched_tokens >= 48
    assert config.runner == "pooling"
    with pytest.raises(ConfigError, match="lower max_model_len"):
        resolve(EngineConfig(max_num_batched_tokens=40, max_num_seqs=2), bert(), Platform("cpu"))
    with pytest.raises(ConfigError, match="every prompt in one step"):
        resolve(EngineConfig(long_prefill_token_threshold=8), bert(), Platform("cpu"))


@pytest.mark.parametrize(
    "fields", [{"dimensions": 0}, {"dimensions": 2.0}, {"task": "score"}, {"use_activation": 1}]
)
def test_parameters_out_of_range_name_their_field(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        PoolingParams(**fields)
    assert caught.value.param == next(iter(fields))

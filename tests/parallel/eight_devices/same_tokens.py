"""Several devices say what one would, whatever the engine does to their requests; see also `families`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.errors import ConfigError
from jaxllm.execution import runner
from jaxllm.execution.batch import StepShape
from jaxllm.execution.buckets import step_shapes
from tests.parallel.models import Oracle, hf_config, write_model

LENGTHS, OUTPUT = (21, 18, 5, 23), 9
BIAS = {3: 4.0, 500: -5.0, 600: 4.0}


def make_llm(directory: Path, devices: int = 1, **settings: Any) -> LLM:
    defaults = {
        "skip_tokenizer_init": True,
        "tensor_parallel_size": devices,
        "max_model_len": 32,
        "max_num_seqs": 2,
        "max_num_batched_tokens": 16,
        "block_size": 4,
        "num_gpu_blocks_override": 10,  # too few for two long sequences, so that some are preempted
        "max_logprobs": 4,
        "disable_log_stats": True,
        "compilation_cache_dir": "",
    }
    return LLM(str(directory), **{**defaults, **settings})


def use_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that takes every plan: compiling is what these tests wait for."""
    monkeypatch.setattr(runner, "step_shapes", lambda *sizes: step_shapes(*sizes)[:1])


def use_two_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """That one, and a decode of two sequences: batches are packed anew where steps take others, too."""

    def chosen(*sizes: int) -> list[StepShape]:
        largest, *others = step_shapes(*sizes)
        return [largest, next(shape for shape in others if shape.decode_only and shape.num_seqs == 2)]

    monkeypatch.setattr(runner, "step_shapes", chosen)


def serve(llm: LLM, oracle: Oracle, lengths: tuple[int, ...] = LENGTHS) -> None:
    """Serves prompts that share a prefix, of these lengths, and checks every token and log-probability.

    What must come out is computed by the plain forward pass, without engine, cache or mesh.
    """
    rng = np.random.default_rng(0)
    shared = rng.integers(601, size=8).tolist()
    prompts = [(shared + rng.integers(601, size=length).tolist())[:length] for length in lengths]
    common: dict[str, Any] = {"temperature": 0, "max_tokens": OUTPUT, "ignore_eos": True, "detokenize": False}
    params = [SamplingParams(**common) for _ in prompts]
    # Random, with one token to choose from.
    params[0] = SamplingParams(**{**common, "temperature": 0.7}, top_k=1, seed=4, n=2)
    params[1] = SamplingParams(**common, logprobs=3, prompt_logprobs=2)
    params[2] = SamplingParams(**common, logit_bias=BIAS)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        for one in output.outputs:
            oracle.check_greedy(prompt, list(one.token_ids), OUTPUT, BIAS if index == 2 else None)

    want = oracle.logprobs(prompts[1] + list(outputs[1].outputs[0].token_ids))
    reported = [*(outputs[1].prompt_logprobs or [])[1:], *(outputs[1].outputs[0].logprobs or [])]
    assert len(reported) == lengths[1] - 1 + OUTPUT
    for position, entry in enumerate(reported):
        assert set(np.argsort(-want[position])[:2]) <= set(entry)
        for token, logprob in entry.items():
            assert 0 <= token < 601
            # float32 through a few layers; the engine on one device keeps to the same.
            assert logprob.logprob == pytest.approx(want[position, token], abs=1e-4)
            assert logprob.rank == 1 + (want[position] > want[position, token]).sum()


def test_draws_and_penalties_are_those_of_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_one_shape(monkeypatch)
    directory = write_model(tmp_path, "llama")
    rng = np.random.default_rng(1)
    prompts = [rng.integers(601, size=length).tolist() for length in LENGTHS]
    common: dict[str, Any] = {"max_tokens": OUTPUT, "ignore_eos": True, "detokenize": False}
    params = [
        SamplingParams(**common, seed=1, n=2),
        SamplingParams(**common, seed=2, top_p=0.8, min_p=0.01, temperature=1.3),
        SamplingParams(**common, temperature=0, repetition_penalty=1.7, presence_penalty=0.5),
        SamplingParams(**common, seed=3, top_k=20, frequency_penalty=1.0),
    ]
    tokens = {}
    for devices in (1, 4):
        llm = make_llm(directory, devices)
        outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
        tokens[devices] = [[list(one.token_ids) for one in output.outputs] for output in outputs]
        llm.shutdown()
    assert tokens[1] == tokens[4]


def test_each_device_holds_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, cache and the sampler's state; two KV heads on four devices are copied once each."""
    use_one_shape(monkeypatch)
    directory = write_model(tmp_path, "llama")
    llm = make_llm(directory, 4)
    try:
        on_devices = llm.llm_engine.runner
        held = {
            "cache": (on_devices._kv_pages, (3, 11, 4, 2, 6)),
            "counts": (on_devices._state.output_counts, (3, 256)),
            "embedding": (on_devices._params["embed.weight"], (256, 48)),
            "queries": (on_devices._params["layers.attention.qkv.weight"][0], (1, 4, 6, 48)),
            "mlp": (on_devices._params["layers.mlp.down.weight"][0], (48, 19)),
        }
        for name, (array, shape) in held.items():
            assert [shard.data.shape for shard in array.addressable_shards] == [shape] * 4, name
    finally:
        llm.shutdown()


def test_what_cannot_be_split_is_refused_before_anything_is_placed(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(hf_config("llama", intermediate_size=74)))
    before = len(jax.live_arrays())
    with pytest.raises(ConfigError, match=r"mlp.down.weight: the axis 'mlp' of size 74 .* 4 shards"):
        make_llm(tmp_path, 4)
    with pytest.raises(ConfigError, match=r"'kv_heads' of size 2 .* 3 shards"):
        make_llm(tmp_path, 3)
    with pytest.raises(ConfigError, match=r"tensor_parallel_size=9: a mesh of .* needs 9 devices"):
        make_llm(tmp_path, 9)
    assert len(jax.live_arrays()) == before


def test_pooled_vectors_are_those_of_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_one_shape(monkeypatch)
    directory = write_model(tmp_path, "qwen2-layer-types")
    prompts = [{"prompt_token_ids": np.random.default_rng(n).integers(601, size=n).tolist()} for n in LENGTHS]
    vectors = []
    for data, pipe, tensor in ((1, 1, 1), (1, 1, 4), (2, 2, 1)):
        llm = make_llm(
            directory, tensor, pipeline_parallel_size=pipe, data_parallel_size=data, runner="pooling"
        )
        outputs = llm.embed(prompts, use_tqdm=False)
        vectors.append(np.array([output.outputs.embedding for output in outputs]))
        llm.shutdown()
    # Sums of float32 in another order.
    np.testing.assert_allclose(vectors[1], vectors[0], atol=1e-5)
    np.testing.assert_allclose(vectors[2], vectors[0], atol=1e-5)

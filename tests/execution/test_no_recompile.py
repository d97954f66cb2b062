"""Nothing is compiled once an engine has started, whatever is asked of it; and everybody gets their own."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxllm import LLM, SamplingParams
from jaxllm.execution.buckets import num_covering
from tests.engine_shapes import every_shape
from tests.execution.tiny_model import write_config

VOCAB_SIZE, MAX_LEN = 131, 48
SETTINGS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "load_format": "dummy",
    "max_model_len": MAX_LEN,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 16,
    "block_size": 4,
    "num_gpu_blocks_override": 20,  # too few for four long sequences, so that some are preempted
    "max_logprobs": 5,
    "disable_log_stats": True,
}
_compiled: list[str] = []


def _note(event: str, duration: float, **details: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(str(details.get("fun_name", "")))


@pytest.fixture(scope="module")
def compiled() -> Iterator[list[str]]:
    """The names of what XLA has compiled (or fetched from its cache), eager operations included."""
    jax.monitoring.register_event_duration_secs_listener(_note)
    yield _compiled
    jax.monitoring.unregister_event_duration_listener(_note)


@pytest.fixture(scope="module")
def llm(compiled: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[LLM]:
    before = len(compiled)
    with every_shape():
        engine = LLM(write_config(tmp_path_factory.mktemp("tiny")), forbid_recompile=True, **SETTINGS)
    assert len(compiled) > before, "the listener hears nothing"
    yield engine
    engine.shutdown()


def random_request(rng: random.Random) -> tuple[dict[str, list[int]], SamplingParams]:
    shared = [7, 8, 9, 10, 11, 12, 13, 14]
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 2, 5, 16, 17, 30]))]
    if rng.random() < 0.3:
        prompt = (shared + prompt)[:30]
    params: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.7, 1.0]),
        "seed": rng.randrange(2**31),
        "max_tokens": rng.choice([1, 2, 9, 18]),
        "detokenize": False,
        "ignore_eos": rng.random() < 0.5,
    }
    random_fields: list[dict[str, Any]] = [
        {"top_k": rng.choice([1, 7])},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"repetition_penalty": 1.4},
        {"presence_penalty": 1.1, "frequency_penalty": -0.2},
        {"logit_bias": {3: 4.0, 9: -100.0}},
        {"allowed_token_ids": [2, 4, 5, 6, 90]},
        {"min_tokens": params["max_tokens"] // 2, "stop_token_ids": [6, 90]},
        {"logprobs": rng.choice([0, 1, 5])},
        {"prompt_logprobs": rng.choice([0, 3])},
    ]
    for fields in rng.sample(random_fields, rng.choice([0, 1, 3, 6])):
        params.update(fields)
    if params["temperature"]:
        params["n"] = rng.choice([1, 1, 2, 3])
    return {"prompt_token_ids": prompt}, SamplingParams(**params)


def tokens(outputs: list[Any]) -> list[list[list[int]]]:
    return [[list(one.token_ids) for one in output.outputs] for output in outputs]


def test_no_request_compiles_anything(llm: LLM, compiled: list[str]) -> None:
    rng = random.Random(0)
    requests = [random_request(rng) for _ in range(40)]
    before = len(compiled)
    together = llm.generate(
        [prompt for prompt, _ in requests], [params for _, params in requests], use_tqdm=False
    )
    assert compiled[before:] == []
    assert llm.llm_engine.stats().num_preemptions > 0

    alone = []
    for prompt, params in requests:
        llm.reset_prefix_cache()
        alone += llm.generate([prompt], params, use_tqdm=False)
    assert compiled[before:] == []

    # Batched, chunked, preempted or from the cache, a request gets what it gets alone.
    assert tokens(together) == tokens(alone)
    for (_, params), output, own in zip(requests, together, alone, strict=True):
        for one, other in zip(output.outputs, own.outputs, strict=True):
            assert (one.logprobs is None) == (params.logprobs is None)
            for position, token, expected in zip(
                one.logprobs or [], one.token_ids, other.logprobs or [], strict=False
            ):
                assert position[token].logprob == pytest.approx(expected[token].logprob, abs=1e-4)
        if params.prompt_logprobs is not None:
            assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
            for at, same, token in zip(
                output.prompt_logprobs[1:], own.prompt_logprobs[1:], output.prompt_token_ids[1:], strict=True
            ):
                assert at[token].logprob == pytest.approx(same[token].logprob, abs=1e-4)


def test_steps_that_are_ready_later_say_the_same(llm: LLM, tmp_path: Path) -> None:
    rng = random.Random(1)
    requests = [random_request(rng) for _ in range(12)]
    given = [prompt for prompt, _ in requests], [params for _, params in requests]
    expected = tokens(llm.generate(*given, use_tqdm=False))
    more = {**SETTINGS, "max_num_batched_tokens": 32}
    with every_shape(), LLM(write_config(tmp_path), **more) as engine:
        compiler = engine.llm_engine.runner.compiler
        assert tokens(engine.generate(*given, use_tqdm=False)) == expected
        compiler.wait_for_all()
        assert compiler.num_ready == len(compiler.shapes) > num_covering(compiler.shapes)
        assert tokens(engine.generate(*given, use_tqdm=False)) == expected


def test_a_compilation_would_be_heard(compiled: list[str]) -> None:
    before = len(compiled)
    jax.numpy.zeros((3, 1, 4, 1, 5)) + 1
    assert len(compiled) > before

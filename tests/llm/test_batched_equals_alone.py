"""What a request gets does not depend on what else runs: neither its greedy tokens nor its seeded samples."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest

from jaxllm import LLM, SamplingParams, StructuredOutputsParams
from jaxllm.outputs import RequestOutput
from jaxllm.sampling_params import RequestOutputKind
from jaxllm.stats import Counter
from tests.engine_shapes import every_shape

MAX_MODEL_LEN = 256
TEXTS = [
    "Q: What is the capital of France?\nA:",
    "Q: What is the capital of Japan?\nA:",
    "Once upon a time there was a small",
    "<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWhat is 12 + 7?<|im_end|>\n<|im_start|>assistant\n",
    "def add(a, b):\n",
]
PREFIX = "Q: What is 3 + 4?\nA: 7\n\nQ: What is the opposite of hot?\nA: cold\n\nQ: What is 9 - 2?\nA: 7\n\n"

# A small engine has few steps to compile.
SMALL: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "max_num_seqs": 8, "max_num_batched_tokens": 64}

# Ways to run; each is to give what one request at a time gives.
WAYS: dict[str, dict[str, Any]] = {
    "as it comes": {"forbid_recompile": True},
    "small chunks": {"max_num_batched_tokens": 16},
    "out of pages": {"num_gpu_blocks_override": 24},
    "out of pages, synchronous": {"num_gpu_blocks_override": 24, "async_scheduling": False},
    "no prefix cache": {"enable_prefix_caching": False},
    "whole prompts": {"enable_chunked_prefill": False, "max_num_batched_tokens": MAX_MODEL_LEN},
}


@dataclass(frozen=True)
class Asked:
    prompt: str | tuple[int, ...]
    params: SamplingParams
    arrival: int

    @property
    def given(self) -> Any:
        return self.prompt if isinstance(self.prompt, str) else list(self.prompt)


def random_params(rng: random.Random) -> SamplingParams:
    fields: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 5, 17, 40]), "ignore_eos": rng.random() < 0.5}
    if rng.random() < 0.4:
        fields["temperature"] = 0.0
    else:
        fields.update(
            seed=rng.randrange(2**40), temperature=rng.choice([0.5, 1.0, 1.5]), n=rng.choice([1, 1, 2, 3])
        )
        fields.update(
            rng.choice([{}, {"top_p": 0.8}, {"top_k": 5}, {"min_p": 0.1}, {"top_p": 0.9, "top_k": 20}])
        )
    extras: list[dict[str, Any]] = [
        {},
        {"repetition_penalty": 1.3},
        {"presence_penalty": 0.7, "frequency_penalty": 0.5},
        {"logit_bias": {5: 3.0, 70: -100.0}},
        {"bad_words": ["Paris", "a"]},
        {"allowed_token_ids": list(range(40, 400))},
        {"min_tokens": 1, "stop": ["\n", "."]},
        {"logprobs": 3},
        {"prompt_logprobs": 2},
    ]
    fields.update(rng.choice(extras))
    return SamplingParams(**fields, output_kind=RequestOutputKind.FINAL_ONLY)


CONSTRAINTS = [
    StructuredOutputsParams(regex="[A-Za-z ,]*[.!?]"),
    StructuredOutputsParams(json={"type": "array", "items": {"type": "integer"}}),
    StructuredOutputsParams(choice=["yes", "no", "perhaps"]),
]


@lru_cache(maxsize=1)
def workload() -> list[Asked]:
    rng = random.Random(2)
    asked = []
    for _ in range(32):
        prompt: str | tuple[int, ...]
        if rng.random() < 0.3:
            prompt = tuple(rng.randrange(3, 1500) for _ in range(rng.choice([1, 15, 16, 17, 33, 150])))
        else:
            prompt = PREFIX * rng.choice([0, 0, 1, 1, 2]) + rng.choice(TEXTS)
        params = random_params(rng)
        if len(asked) % 4 == 1 and not params.allowed_token_ids:
            params.structured_outputs = CONSTRAINTS[len(asked) // 4 % len(CONSTRAINTS)]
        asked.append(Asked(prompt, params, rng.choice([0, 0, rng.randrange(60)])))
    return sorted(asked, key=lambda a: a.arrival)


def run_together(llm: LLM, asked: list[Asked]) -> dict[int, RequestOutput]:
    """Requests arrive while others run."""
    engine = llm.llm_engine
    outputs: dict[int, RequestOutput] = {}
    left = list(enumerate(asked))
    step = 0
    while left or engine.has_unfinished_requests():
        while left and left[0][1].arrival <= step:
            i, one = left.pop(0)
            engine.add_request(f"r{i}", one.given, one.params)
        for output in engine.step():
            if output.finished:
                outputs[int(output.request_id[1:])] = output
        step += 1
    return outputs


def summary(output: RequestOutput) -> list[Any]:
    return [(c.index, c.token_ids, c.text, c.finish_reason, c.stop_reason) for c in output.outputs]


def check_logprobs(got: RequestOutput, expected: RequestOutput) -> None:
    for ours, theirs in zip(got.outputs, expected.outputs, strict=True):
        assert (ours.logprobs is None) == (theirs.logprobs is None)
        for a, b in zip(ours.logprobs or [], theirs.logprobs or [], strict=True):
            assert {i: e.logprob for i, e in a.items()} == pytest.approx(
                {i: e.logprob for i, e in b.items()}, abs=1e-3
            )
    assert (got.prompt_logprobs is None) == (expected.prompt_logprobs is None)
    for a, b in zip(got.prompt_logprobs or [], expected.prompt_logprobs or [], strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert a.keys() == b.keys()
            for i in a:
                assert a[i].logprob == pytest.approx(b[i].logprob, abs=1e-3)
                assert a[i].decoded_token == b[i].decoded_token


@pytest.fixture(scope="module")
def alone() -> Iterator[list[RequestOutput]]:
    """Each request by itself, with nothing cached from the others."""
    with LLM(**SMALL, enable_prefix_caching=False) as llm:
        yield [llm.generate([one.given], one.params, use_tqdm=False)[0] for one in workload()]


@pytest.mark.parametrize("way", WAYS)
def test_batched_equals_alone(way: str, alone: list[RequestOutput]) -> None:
    asked = workload()
    # Once in the cheapest of all shapes, as they come to be ready for users; else in those that take any.
    shapes = every_shape() if way == "as it comes" else nullcontext()
    with shapes, LLM(**{**SMALL, **WAYS[way]}) as llm:
        outputs = run_together(llm, asked)
        counted = {m.name: m.value for m in llm.get_metrics() if isinstance(m, Counter)}
    assert outputs.keys() == set(range(len(asked)))
    for i, expected in enumerate(alone):
        assert summary(outputs[i]) == summary(expected), asked[i]
        check_logprobs(outputs[i], expected)
    # The way was really gone.
    assert (counted["jaxllm:num_preemptions"] > 0) == ("out of pages" in way)
    assert (counted["jaxllm:prefix_cache_hits"] > 0) or way == "no prefix cache"


def test_the_workload_holds_what_it_is_about() -> None:
    asked = workload()
    assert sum(a.params.is_greedy for a in asked) >= 8
    assert sum(a.params.n > 1 for a in asked) >= 5
    assert len({a.arrival for a in asked}) >= 10
    assert sum(a.params.structured_outputs is not None for a in asked) >= 6
    for name in ("logprobs", "prompt_logprobs", "bad_words", "logit_bias", "stop", "allowed_token_ids"):
        assert any(getattr(a.params, name) for a in asked), name

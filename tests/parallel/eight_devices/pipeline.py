"""Stages of a pipeline hold their own layers, with enough requests none rests, and all say what one would."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxllm import LLM, SamplingParams, StructuredOutputsParams
from jaxllm.errors import ConfigError
from jaxllm.execution.layout import lay_out
from jaxllm.execution.runner import Runner
from jaxllm.models.families import translate_config
from tests.parallel.eight_devices.same_tokens import BIAS, make_llm, use_one_shape, use_two_shapes
from tests.parallel.models import Oracle, hf_config, write_model


class Watched:
    """An engine in stages, and the ids of the plans that were in each of them, step by step."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.llm = llm
        self.steps: list[list[int | None]] = []
        launch_step = Runner._launch_step

        def noted(runner: Runner, entering: Any) -> None:
            launch_step(runner, entering)
            self.steps.append([None if one is None else one.plan.step_id for one in runner._stages])

        monkeypatch.setattr(Runner, "_launch_step", noted)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("llama"), "llama", num_hidden_layers=5)


@pytest.fixture(scope="module")
def oracle(directory: Path) -> Oracle:
    return Oracle(directory, translate_config(hf_config("llama", num_hidden_layers=5)))


@pytest.fixture(scope="module")
def llm(directory: Path) -> Iterator[LLM]:
    """Four stages, of five layers."""
    with pytest.MonkeyPatch.context() as patch:
        use_one_shape(patch)
        with make_llm(
            directory,
            1,
            pipeline_parallel_size=4,
            max_num_seqs=8,
            num_gpu_blocks_override=26,
            swap_space=0.001,
        ) as llm:
            yield llm


def test_with_a_request_for_each_stage_all_of_them_work_in_every_step(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(llm, monkeypatch)
    prompts = [{"prompt_token_ids": [i + 1, i + 2, i + 3]} for i in range(6)]
    llm.generate(prompts, SamplingParams(max_tokens=12, ignore_eos=True, detokenize=False), use_tqdm=False)
    steps = watched.steps
    last = max(step for stages in steps for step in stages if step is not None)
    # Plans enter one after the other, move on by a stage a step, and only at both ends is a stage empty.
    entered = [i for i, stages in enumerate(steps) if stages[0] is not None]
    assert entered == list(range(len(entered)))
    for before, after in itertools.pairwise(steps):
        assert after[1:] == before[:-1]
    full = [stages for stages in steps if None not in stages]
    first = full[0][0]
    assert first is not None
    assert [stages[0] for stages in full] == list(range(first, last + 1))
    assert len(full) == len(entered) - 3 >= 12 * 4 - 3


def test_each_stage_holds_its_layers_alone(llm: LLM, oracle: Oracle) -> None:
    """Of five layers the first stage has two; the others have an empty place, which is zeros."""
    runner = llm.llm_engine.runner
    down = runner._params["layers.mlp.down.weight"]
    assert [shard.data.shape[0] for shard in down.addressable_shards] == [2] * 4
    stored = oracle._parameters["layers.mlp.down.weight"]
    for shard, layers in zip(down.addressable_shards, ([0, 1], [2], [3], [4]), strict=True):
        np.testing.assert_array_equal(
            np.asarray(shard.data)[: len(layers)], stored[layers].astype(np.float32)
        )
        assert not np.asarray(shard.data)[len(layers) :].any()
    assert {shard.data.shape for shard in runner._kv_pages.addressable_shards} == {(2, 27, 4, 4, 6)}
    assert {shard.data.shape[0] for shard in runner._params["embed.weight"].addressable_shards} == {256}
    assert {shard.data.shape for shard in runner._hidden.addressable_shards} == {(1, 48, 16)}
    # What `jaxllm.plan` says before any of it exists.
    layout = lay_out(llm.llm_engine.config, oracle.model, tensor=1, pipe=4, device_memory=1e9)
    held = [0] * 4
    for array in runner._params.values():
        for shard in array.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
    assert held == [layout.device_bytes] * 4
    assert {shard.data.nbytes for shard in runner._kv_pages.addressable_shards} == {27 * layout.page_bytes}


def test_draws_penalties_and_swapped_pages_are_those_of_one_device(
    llm: LLM, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slots are handed on while their batches are still on their way: requests outnumber slots."""
    rng = np.random.default_rng(1)
    prompts = [{"prompt_token_ids": rng.integers(601, size=n).tolist()} for n in (21, 18, 5, 23) * 4]
    common: dict[str, Any] = {"ignore_eos": True, "detokenize": False}
    kinds: list[dict[str, Any]] = [
        {"seed": 1, "n": 2, "max_tokens": 9},
        {"seed": 2, "top_p": 0.8, "min_p": 0.01, "temperature": 1.3, "max_tokens": 3},
        {"temperature": 0, "repetition_penalty": 1.7, "presence_penalty": 0.5, "max_tokens": 9},
        {"seed": 3, "top_k": 20, "frequency_penalty": 1.0, "max_tokens": 5, "min_tokens": 4},
    ]
    params = [SamplingParams(**common, **kind) for kind in kinds] * 4
    use_one_shape(monkeypatch)
    tokens = []
    with make_llm(directory, 1, max_num_seqs=8, num_gpu_blocks_override=400) as alone:
        for one in (llm, alone):
            outputs = one.generate(prompts, params, use_tqdm=False)
            tokens.append([[list(one.token_ids) for one in output.outputs] for output in outputs])
    assert tokens[0] == tokens[1]
    assert llm.llm_engine.scheduler.num_swaps > 0


def test_requests_come_and_go_at_any_time(llm: LLM, oracle: Oracle) -> None:
    """Aborted while their batches are on their way; what takes their slots and pages is not disturbed."""
    engine, rng = llm.llm_engine, np.random.default_rng(2)
    prompts = [rng.integers(601, size=rng.integers(3, 22)).tolist() for _ in range(20)]
    done: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        params = SamplingParams(
            temperature=0,
            max_tokens=6,
            ignore_eos=True,
            detokenize=False,
            logit_bias=BIAS if number % 3 else None,
        )
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
        for _ in range(rng.integers(3)):
            for output in engine.step():
                done[output.request_id] = list(output.outputs[0].token_ids)
        if number % 4 == 3:
            engine.abort([str(number - 1)])
    while engine.has_unfinished_requests():
        for output in engine.step():
            done[output.request_id] = list(output.outputs[0].token_ids)
    for number, prompt in enumerate(prompts):
        want = oracle.greedy(prompt, 6, BIAS if number % 3 else None)
        got = done.get(str(number), [])
        assert got == (want if number % 4 != 2 else want[: len(got)])
    engine.scheduler.check_integrity()


def test_sleep_and_wake(llm: LLM) -> None:
    prompt = {"prompt_token_ids": [5, 6, 7]}
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, detokenize=False)

    def answer() -> list[int]:
        [output] = llm.generate([prompt], params, use_tqdm=False)
        return list(output.outputs[0].token_ids)

    before = answer()
    for level in (1, 2):
        llm.sleep(level)
        llm.wake_up()
        assert answer() == before


@pytest.mark.parametrize("stages", [1, 2])
def test_grammars_and_bad_words_in_two_replicas(stages: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host must know before a request goes on; requests without such go on beside them."""
    use_one_shape(monkeypatch)
    if stages == 2:
        use_two_shapes(monkeypatch)
    settings: dict[str, Any] = {"max_model_len": 128, "max_num_seqs": 4, "max_num_batched_tokens": 16}
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer", "maximum": 99}},
        "required": ["a"],
        "additionalProperties": False,
    }
    constraint = StructuredOutputsParams(json=schema, disable_any_whitespace=True)
    letters = StructuredOutputsParams(regex="[ab]{20}")
    params = [
        SamplingParams(max_tokens=20, temperature=1.0, seed=1, structured_outputs=constraint),
        SamplingParams(max_tokens=20, temperature=0),
        SamplingParams(max_tokens=20, temperature=0, bad_words=["a"]),
        SamplingParams(max_tokens=12, temperature=1.0, seed=2, structured_outputs=letters, n=2),
    ]
    prompts = ["Who are you?", "Once upon a time", "Once upon a time", "Q: What"]
    settings |= {
        "data_parallel_size": 2,
        "pipeline_parallel_size": stages,
        "tensor_parallel_size": 3 - stages,
    }
    with LLM(**settings) as llm:
        outputs = llm.generate(prompts, params, use_tqdm=False)
    texts = [[completion.text for completion in output.outputs] for output in outputs]
    assert json.loads(texts[0][0]).keys() == {"a"}
    assert texts[1] != texts[2] and "a" not in texts[2][0].split()
    for text in texts[3]:
        assert text and set(text) <= {"a", "b"}


def test_too_few_devices_are_said_so(directory: Path) -> None:
    message = (
        "pipeline_parallel_size=5, tensor_parallel_size=2: a mesh of data=1 x pipe=5 x tensor=2 needs 10"
    )
    with pytest.raises(ConfigError, match=message):
        make_llm(directory, 2, pipeline_parallel_size=5)

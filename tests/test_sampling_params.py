from __future__ import annotations

import copy
import dataclasses
import logging
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.errors import InvalidRequestError, JaxLLMError
from jaxllm.sampling_params import (
    BeamSearchParams,
    GuidedDecodingParams,
    RepetitionDetectionParams,
    RequestOutputKind,
    SamplingParams,
    SamplingType,
    StructuredOutputsParams,
    eos_token_ids_of,
)

NUMBERS = ("presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p")
INTEGERS = ("n", "top_k", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs", "seed")
BOOLEANS = (
    "ignore_eos",
    "detokenize",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "include_stop_str_in_output",
    "skip_clone",
    "skip_reading_prefix_cache",
)


def refused(match: str, param: str, **fields: Any) -> None:
    with pytest.raises(InvalidRequestError, match=match) as caught:
        SamplingParams(**fields)
    assert caught.value.param == param
    assert isinstance(caught.value, ValueError)
    assert isinstance(caught.value, JaxLLMError)


def test_defaults_are_those_of_the_openai_completions_api() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k, params.max_tokens) == (
        1,
        1.0,
        1.0,
        0,
        16,
    )
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.0, 0.0, 1.0)
    assert (params.stop, params.stop_token_ids, params.bad_words) == ([], [], [])
    assert params.output_kind is RequestOutputKind.CUMULATIVE
    assert params.sampling_type is SamplingType.RANDOM


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", [0, -1, 16385]),
        ("presence_penalty", [-2.1, 2.1]),
        ("frequency_penalty", [-2.1, 2.1]),
        ("repetition_penalty", [0.0, -1.0]),
        ("temperature", [-0.1, 2.01]),
        ("top_p", [0.0, -0.5, 1.1]),
        ("top_k", [-2]),
        ("min_p", [-0.1, 1.1]),
        ("seed", [-(2**63) - 1, 2**64]),
        ("max_tokens", [0, -5]),
        ("min_tokens", [-1]),
        ("logprobs", [-2]),
        ("prompt_logprobs", [-2]),
    ],
)
def test_out_of_range_is_refused_by_name_and_value(field: str, values: list[float]) -> None:
    for value in values:
        refused(rf"^{field} must be .*; got {str(value).replace('.', '[.]')}", field, **{field: value})


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("n", [1, 16384]),
        ("presence_penalty", [-2.0, 0, 2.0]),
        ("frequency_penalty", [-2, 2]),
        ("repetition_penalty", [1e-3, 50.0]),
        ("temperature", [0, 2]),
        ("top_p", [1e-9, 1]),
        ("top_k", [0, -1, 1, 10**9]),
        ("min_p", [0, 1]),
        ("seed", [-(2**63), 2**64 - 1, -1]),
        ("max_tokens", [1, None, 10**30]),
        ("min_tokens", [0, 16]),
        ("logprobs", [-1, 0, 5, None]),
        ("prompt_logprobs", [-1, 0, 5, None]),
    ],
)
def test_the_edges_of_a_range_are_inside(field: str, values: list[Any]) -> None:
    for value in values:
        SamplingParams(**{field: value})


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        math.inf,
        -math.inf,
        "0.5",
        True,
        None,
        [0.5],
        pytest.param(10**400, id="10**400"),
        1j,
        np.array([0.5]),
    ],
)
def test_what_is_no_finite_number_is_refused(field: str, value: Any) -> None:
    refused(f"^{field} must be", field, **{field: value})


@pytest.mark.parametrize("field", INTEGERS)
@pytest.mark.parametrize("value", [1.0, "1", False, [1], math.nan, 1j])
def test_what_is_no_integer_is_refused(field: str, value: Any) -> None:
    refused(f"^{field} must be", field, **{field: value})


@pytest.mark.parametrize("field", BOOLEANS)
@pytest.mark.parametrize("value", [1, 0, "true", 1.0, []])
def test_what_is_no_boolean_is_refused(field: str, value: Any) -> None:
    refused(f"^{field} must be True or False", field, **{field: value})


def test_numpy_scalars_are_numbers() -> None:
    params = SamplingParams(
        n=np.int64(2),  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        seed=np.uint32(7),  # type: ignore[arg-type]
        stop_token_ids=np.array([3, 4]),  # type: ignore[arg-type]
        logit_bias={np.int32(5): np.float32(1.5)},  # type: ignore[dict-item]
    )
    assert (params.n, params.temperature, params.seed) == (2, 0.5, 7)
    assert (type(params.n), type(params.temperature), type(params.seed)) == (int, float, int)
    assert params.stop_token_ids == [3, 4]
    assert params.logit_bias == {5: 1.5}


def test_greedy_turns_the_other_choices_off_and_returns_one() -> None:
    params = SamplingParams(temperature=0.0, top_p=0.5, top_k=7, min_p=0.1)
    assert params.is_greedy
    assert params.sampling_type is SamplingType.GREEDY
    assert (params.top_p, params.top_k, params.min_p) == (1.0, 0, 0.0)
    refused("^n must be 1 where temperature is 0", "n", n=2, temperature=0)
    assert SamplingParams(temperature=9e-6).is_greedy


def test_a_temperature_that_would_overflow_is_raised(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "jaxllm"):
        assert SamplingParams(temperature=1e-5).temperature == 0.01
    assert "raised to 0.01" in caplog.text


def test_seeds() -> None:
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(seed=5).sampling_type is SamplingType.RANDOM_SEED
    assert SamplingParams(seed=5, temperature=0).sampling_type is SamplingType.GREEDY


def test_stop_is_a_list_of_strings() -> None:
    assert SamplingParams(stop="a").stop == ["a"]
    assert SamplingParams(stop=("a", "b", "a")).stop == ["a", "b"]  # type: ignore[arg-type]
    for value in ("", [""], ["a", 1], [None], 5, b"a", {"a": 1}):
        refused("^stop must be", "stop", stop=value)
    refused("^stop must be empty where detokenize is False", "stop", stop="a", detokenize=False)


@pytest.mark.parametrize("field", ["stop_token_ids", "allowed_token_ids"])
def test_token_ids_are_a_list_of_ids(field: str) -> None:
    assert getattr(SamplingParams(**{field: [3, 1, 3]}), field) == [3, 1]  # type: ignore[arg-type]
    assert getattr(SamplingParams(**{field: (3,)}), field) == [3]  # type: ignore[arg-type]
    for value in ([-1], ["3"], [True], [1.0], "3", 3, {3: 1}, [None]):
        refused(f"^{field}", field, **{field: value})


def test_allowed_token_ids_may_not_be_empty() -> None:
    assert SamplingParams(stop_token_ids=[]).stop_token_ids == []
    refused("at least one token id, or None", "allowed_token_ids", allowed_token_ids=[])


def test_bad_words_are_non_empty_strings() -> None:
    assert SamplingParams(bad_words=["a", "b", "a"]).bad_words == ["a", "b"]
    for value in ("word", [""], [1], {"a": 1}):
        refused("^bad_words must be", "bad_words", bad_words=value)


def test_logit_bias() -> None:
    assert SamplingParams(logit_bias={3: 100, 4: -100.0}).logit_bias == {3: 100.0, 4: -100.0}
    for value in (
        {3: 101},
        {3: -100.5},
        {3: math.nan},
        {3: "1"},
        {-1: 0.0},
        {"3": 1.0},
        {1.5: 1.0},
        [(3, 1)],
        "x",
    ):
        refused("^logit_bias", "logit_bias", logit_bias=value)


def test_min_tokens_stays_within_max_tokens() -> None:
    refused("^min_tokens must be at most max_tokens=3; got 4", "min_tokens", min_tokens=4, max_tokens=3)
    assert SamplingParams(min_tokens=400, max_tokens=None).min_tokens == 400


def test_logprobs_true_asks_for_one() -> None:
    params = SamplingParams(logprobs=True, prompt_logprobs=True)
    assert (params.logprobs, params.prompt_logprobs) == (1, 1)
    assert type(params.logprobs) is int


def test_output_kind() -> None:
    refused("^output_kind must be one of", "output_kind", output_kind="DELTA")
    assert SamplingParams(output_kind=RequestOutputKind.DELTA).output_kind is RequestOutputKind.DELTA


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logprob_token_ids", [1]),
        ("extra_args", {"a": 1}),
        ("watermarking", True),
        ("flat_logprobs", True),
        ("stream_interval", 4),
        ("prompt_logprob_token_ids", [[1]]),
        ("prompt_logprob_start", 0),
        ("trace_decode_token_ids", [1]),
    ],
)
def test_what_is_not_supported_is_refused_by_name(field: str, value: Any) -> None:
    refused(f"^{field} is not supported yet", field, **{field: value})


def test_what_asks_for_nothing_unsupported_is_accepted() -> None:
    SamplingParams(logprob_token_ids=None, extra_args={}, flat_logprobs=False, watermarking=False)


def test_thinking_token_budget() -> None:
    assert SamplingParams(thinking_token_budget=-1).thinking_token_budget is None
    assert SamplingParams(thinking_token_budget=0).thinking_token_budget == 0
    for wrong in (-2, 1.0, True, "3"):
        refused("^thinking_token_budget must be", "thinking_token_budget", thinking_token_budget=wrong)


def test_structured_outputs_under_both_names() -> None:
    assert GuidedDecodingParams is StructuredOutputsParams
    constraint = StructuredOutputsParams(regex="a+")
    assert SamplingParams(structured_outputs=constraint).structured_outputs is constraint
    params = SamplingParams(guided_decoding=constraint)
    assert (params.structured_outputs, params.guided_decoding) == (constraint, None)
    refused(
        "beside structured_outputs",
        "guided_decoding",
        guided_decoding=constraint,
        structured_outputs=StructuredOutputsParams(regex="b"),
    )
    refused("must be a StructuredOutputsParams", "structured_outputs", structured_outputs={"regex": "a"})
    constraint.regex = None
    refused("exactly one", "structured_outputs", structured_outputs=constraint)


def test_repetition_detection() -> None:
    detection = RepetitionDetectionParams(max_pattern_size=4, min_pattern_size=2, min_count=3)
    assert SamplingParams(repetition_detection=detection).repetition_detection == detection
    RepetitionDetectionParams()
    for fields in (
        {"max_pattern_size": 4, "min_count": 1},
        {"min_pattern_size": 2},
        {"max_pattern_size": -1},
    ):
        with pytest.raises(InvalidRequestError, match=r"^repetition_detection\.") as caught:
            RepetitionDetectionParams(**fields)
        assert caught.value.param == "repetition_detection"
    refused(
        "must be a RepetitionDetectionParams", "repetition_detection", repetition_detection={"min_count": 2}
    )


def test_changes_after_construction_are_checked_by_verify() -> None:
    params = SamplingParams()
    params.stop = "end"
    params.top_k = -1
    params.verify()
    assert (params.stop, params.top_k) == (["end"], 0)
    params.temperature = 3.0
    with pytest.raises(InvalidRequestError, match=r"^temperature"):
        params.verify()


def test_clone_shares_nothing_that_can_change() -> None:
    params = SamplingParams(
        stop=["a"], stop_token_ids=[1], logit_bias={1: 1.0}, allowed_token_ids=[1, 2], bad_words=["w"]
    )
    params.bad_words_token_ids = [[1]]
    before = copy.deepcopy(params)
    clone = params.clone()
    assert clone == params
    for name in ("stop", "stop_token_ids", "allowed_token_ids", "bad_words", "bad_words_token_ids"):
        getattr(clone, name).append("changed")
    assert clone.logit_bias is not None
    clone.logit_bias[9] = 9.0
    clone.n = 5
    for f in dataclasses.fields(SamplingParams):
        assert getattr(params, f.name) == getattr(before, f.name), f.name
    params.stop, params.stop_token_ids = "b", np.array([1, 2])  # type: ignore[assignment]
    clone = params.clone()
    clone.verify()
    assert (clone.stop, clone.stop_token_ids) == (["b"], [1, 2])
    shared = SamplingParams(stop=["a"], skip_clone=True)
    assert shared.clone().stop is shared.stop
    assert shared.clone() is not shared


def test_from_optional_takes_json() -> None:
    params = SamplingParams.from_optional(
        temperature=None, top_p=None, n=None, logit_bias={"12": 5}, stop=None, max_tokens=None
    )
    assert (params.temperature, params.top_p, params.n, params.max_tokens) == (1.0, 1.0, 1, None)
    assert params.logit_bias == {12: 5.0}
    assert SamplingParams.from_optional() == SamplingParams()
    with pytest.raises(InvalidRequestError, match="no field 'temprature'") as caught:
        SamplingParams.from_optional(temprature=1.0)
    assert caught.value.param == "temprature"
    with pytest.raises(InvalidRequestError, match=r"^logit_bias"):
        SamplingParams.from_optional(logit_bias={"twelve": 5})
    # Not a field to be set, although the dataclass has it.
    with pytest.raises(InvalidRequestError, match="no field"):
        SamplingParams.from_optional(bad_words_token_ids=[[1]])


def test_generation_config_adds_stop_ids_beside_the_tokenizers_own() -> None:
    params = SamplingParams(stop_token_ids=[7])
    params.update_from_generation_config({"eos_token_id": [2, 5, 7]}, eos_token_id=2)
    assert params.stop_token_ids == [7, 5]
    params = SamplingParams(ignore_eos=True)
    params.update_from_generation_config({"eos_token_id": [2, 5]}, eos_token_id=2)
    assert params.stop_token_ids == []
    assert eos_token_ids_of({}) == []
    assert eos_token_ids_of({"eos_token_id": None}) == []
    assert eos_token_ids_of({"eos_token_id": 3}) == [3]


def test_a_huge_value_does_not_flood_the_message() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(stop=[""] * 100_000)
    assert len(str(caught.value)) < 500


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.one_of(st.integers(), st.text(max_size=2), st.none()), max_size=3),
    st.dictionaries(st.one_of(st.integers(), st.text(max_size=2)), st.floats(), max_size=2),
)


@given(
    st.dictionaries(st.sampled_from([f.name for f in dataclasses.fields(SamplingParams) if f.init]), ANYTHING)
)
def test_anything_is_either_accepted_in_normal_form_or_refused_by_name(fields: dict[str, Any]) -> None:
    try:
        params = SamplingParams(**fields)
    except InvalidRequestError as error:
        assert error.param is not None
        assert error.param in {*fields, "n", "min_tokens"}
        assert error.param in str(error)
        return
    once = copy.deepcopy(params)
    params.verify()
    assert params == once
    assert 0.0 <= params.temperature <= 2.0
    assert 0.0 < params.top_p <= 1.0
    assert params.top_k >= 0
    assert isinstance(params.stop, list)
    assert all(params.stop)


def test_beam_search_params() -> None:
    params = BeamSearchParams(beam_width=4, max_tokens=8)
    assert (params.temperature, params.length_penalty, params.ignore_eos) == (0.0, 1.0, False)
    for fields in (
        {"beam_width": 0},
        {"beam_width": True},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"temperature": 2.5},
        {"length_penalty": math.nan},
        {"length_penalty": 1000},
        {"ignore_eos": 1},
        {"structured_outputs": StructuredOutputsParams(regex="a")},
    ):
        with pytest.raises(InvalidRequestError) as caught:
            BeamSearchParams(**{"beam_width": 2, "max_tokens": 4, **fields})  # type: ignore[arg-type]
        assert caught.value.param == next(iter(fields))

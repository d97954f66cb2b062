from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxllm.config import EngineConfig
from jaxllm.errors import ConfigError, InvalidRequestError
from jaxllm.input_processor import MAX_BAD_WORDS, InputProcessor
from jaxllm.inputs import as_prompt_list, split_prompt
from jaxllm.models.config import ModelConfig
from jaxllm.request import SchedulingTerms
from jaxllm.sampling_params import RequestOutputKind, SamplingParams

MAX_MODEL_LEN = 64
TEXT = "the cat sat on the mat and the dog sat on the log " * 4


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that starts every prompt with <s>."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def model_config(vocab_size: int = 300, eos_token_ids: tuple[int, ...] = ()) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=16,
        num_layers=1,
        num_heads=1,
        num_kv_heads=1,
        head_dim=8,
        max_position_embeddings=MAX_MODEL_LEN,
        eos_token_ids=eos_token_ids,
    )


def make(
    tokenizer: Any,
    *,
    vocab_size: int = 300,
    eos_token_ids: tuple[int, ...] = (),
    generation_config: dict[str, Any] | None = None,
    **config: Any,
) -> InputProcessor:
    config.setdefault("max_model_len", MAX_MODEL_LEN)
    return InputProcessor(
        tokenizer, model_config(vocab_size, eos_token_ids), EngineConfig(**config), generation_config
    )


def refused(
    processor: InputProcessor,
    prompt: Any,
    match: str,
    param: str | None,
    params: Any = None,
    **arguments: Any,
) -> None:
    with pytest.raises(InvalidRequestError, match=match) as caught:
        processor.process("0", prompt, params or SamplingParams(), **arguments)
    assert caught.value.param == param
    # Nothing of a refused request stays behind.
    assert processor.process("1", [1, 2, 3], SamplingParams()).requests[0].prompt_token_ids == [1, 2, 3]


def test_a_text_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    processed = make(tokenizer).process("r", "the cat", SamplingParams(), arrival_time=1.5)
    (request,) = processed.requests
    assert processed.prompt == "the cat"
    assert request.request_id == "r"
    assert request.prompt_token_ids == [0, *tokenizer.encode("the cat", add_special_tokens=False)]
    assert request.token_ids == request.prompt_token_ids
    assert request.token_ids is not request.prompt_token_ids
    assert request.arrival_time == 1.5
    assert request.max_tokens == 16
    assert request.group_id is None
    assert request.eos_token_ids == {1}
    assert not request.needs_host_tokens


@pytest.mark.parametrize(
    "prompt",
    [
        [5, 6, 7],
        (5, 6, 7),
        np.array([5, 6, 7], np.int32),
        {"prompt_token_ids": [5, 6, 7]},
        [np.int64(5), np.int64(6), np.int64(7)],
    ],
)
def test_token_ids_are_taken_as_they_are(tokenizer: PreTrainedTokenizerFast, prompt: Any) -> None:
    processed = make(tokenizer).process("r", prompt, SamplingParams())
    ids = processed.requests[0].prompt_token_ids
    assert ids == [5, 6, 7]
    assert {type(i) for i in ids} == {int}
    assert processed.prompt is None


def test_the_users_list_is_copied(tokenizer: PreTrainedTokenizerFast) -> None:
    given_ids = [5, 6, 7]
    request = make(tokenizer).process("r", given_ids, SamplingParams()).requests[0]
    given_ids.append(8)
    assert request.prompt_token_ids == [5, 6, 7]


def test_text_beside_token_ids_is_kept_and_not_tokenized(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = {"prompt": "the dog", "prompt_token_ids": [9], "cache_salt": "s"}
    processed = make(tokenizer).process("r", prompt, SamplingParams(), cache_salt="other")  # type: ignore[arg-type]
    assert processed.prompt == "the dog"
    assert processed.requests[0].prompt_token_ids == [9]
    assert processed.requests[0].cache_salt == "s"
    assert make(tokenizer).process("r", [9], SamplingParams(), cache_salt="x").requests[0].cache_salt == "x"


@pytest.mark.parametrize("prompt", [[], {"prompt_token_ids": []}, np.array([], np.int32)])
def test_no_tokens_are_refused(tokenizer: PreTrainedTokenizerFast, prompt: Any) -> None:
    refused(make(tokenizer), prompt, "the prompt is empty", "prompt_token_ids")


def test_empty_text_is_refused_unless_the_tokenizer_makes_something_of_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert make(tokenizer).process("r", "", SamplingParams()).requests[0].prompt_token_ids == [0]
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    bare.backend_tokenizer.post_processor = processors.ByteLevel()
    refused(make(bare), "", "the prompt is empty", "prompt")


@pytest.mark.parametrize("wrong", [-1, 300, 10**12])
def test_ids_outside_the_vocabulary_are_refused(tokenizer: PreTrainedTokenizerFast, wrong: int) -> None:
    refused(make(tokenizer), [1, wrong, 2], rf"token id {wrong} .*\[0, 299\]", "prompt_token_ids")


def test_a_tokenizer_of_another_model_is_noticed(tokenizer: PreTrainedTokenizerFast) -> None:
    refused(make(tokenizer, vocab_size=50), "the cat", "The tokenizer is not the one", "prompt")


@pytest.mark.parametrize(
    "ids", [[1, 2.0], ["a", 1], [1, "a"], [True, 1], [1, None], [1, [2]], np.array([1.5]), np.array([True])]
)
def test_ids_that_are_no_integers_are_refused(tokenizer: PreTrainedTokenizerFast, ids: Any) -> None:
    refused(make(tokenizer), {"prompt_token_ids": ids}, "must be integers", "prompt_token_ids")


@pytest.mark.parametrize("ids", ["abc", 5, {1: 2}, np.array([[1, 2]]), np.array(3)])
def test_ids_that_are_no_list_are_refused(tokenizer: PreTrainedTokenizerFast, ids: Any) -> None:
    refused(make(tokenizer), {"prompt_token_ids": ids}, "prompt_token_ids must be", "prompt_token_ids")


@pytest.mark.parametrize("prompt", [5, None, 1.5, b"abc", object()])
def test_what_is_no_prompt_is_refused(tokenizer: PreTrainedTokenizerFast, prompt: Any) -> None:
    refused(make(tokenizer), prompt, "a prompt must be a string, a list of token ids", "prompt")


@pytest.mark.parametrize(
    ("prompt", "match", "param"),
    [
        ({}, "needs 'prompt' or 'prompt_token_ids'", "prompt"),
        ({"cache_salt": "s"}, "needs 'prompt'", "prompt"),
        ({"prompt": 5}, "prompt must be a string; got int", "prompt"),
        ({"prompt": "a", "cache_salt": ""}, "cache_salt must be a non-empty string", "cache_salt"),
        ({"prompt": "a", "cache_salt": 5}, "cache_salt must be a non-empty string", "cache_salt"),
        ({"prompt": "a", "promt": 5}, "no field 'promt'", "promt"),
        ({"prompt_embeds": np.zeros((2, 8))}, "prompt_embeds is not supported", "prompt_embeds"),
        ({"prompt": "a", "multi_modal_data": {"image": 1}}, "multi_modal_data is not", "multi_modal_data"),
        (
            {"encoder_prompt": "a", "decoder_prompt": None},
            "encoder_prompt is not supported",
            "encoder_prompt",
        ),
    ],
)
def test_dict_prompts_are_looked_at_field_by_field(
    tokenizer: PreTrainedTokenizerFast, prompt: Any, match: str, param: str
) -> None:
    refused(make(tokenizer), prompt, match, param)


def test_options_that_are_none_ask_for_nothing(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt: Any = {"prompt": "the cat", "multi_modal_data": None, "cache_salt": None}
    assert make(tokenizer).process("r", prompt, SamplingParams()).prompt == "the cat"


def test_the_longest_prompt_leaves_room_for_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    request = make(tokenizer).process("r", [3] * (MAX_MODEL_LEN - 1), SamplingParams()).requests[0]
    assert request.max_tokens == 1
    refused(
        make(tokenizer),
        [3] * MAX_MODEL_LEN,
        "has 64 tokens; at most 63 fit .* max_model_len=64",
        "prompt_token_ids",
    )


def test_max_tokens_is_capped_by_the_room(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = make(tokenizer)
    for asked, expected in ((None, 60), (5, 5), (60, 60), (61, 60), (10**9, 60)):
        params = SamplingParams(max_tokens=asked)
        assert processor.process("r", [1, 2, 3, 4], params).requests[0].max_tokens == expected
        assert params.max_tokens == asked


def test_n_completions_are_n_requests_of_one_group(tokenizer: PreTrainedTokenizerFast) -> None:
    requests = make(tokenizer).process("r", [1, 2], SamplingParams(n=3, seed=40)).requests
    assert [r.request_id for r in requests] == ["0_r", "1_r", "2_r"]
    assert {r.group_id for r in requests} == {"r"}
    assert [r.seed for r in requests] == [40, 41, 42]
    assert len({id(r.token_ids) for r in requests}) == 3


@given(seed=st.integers(-(2**63), 2**64 - 1), n=st.integers(1, 5))
def test_seeds_fit_the_device_and_do_not_depend_on_the_rest(seed: int, n: int) -> None:
    params = SamplingParams(n=n, seed=seed)
    first = [r.seed for r in make(None).process("a", [1], params).requests]
    processor = make(None, seed=99)
    processor.process("x", [1], SamplingParams())
    second = [r.seed for r in processor.process("b", [1, 2], params).requests]
    assert all(0 <= s < 2**32 for s in first)
    if params.seed is not None:
        assert first == second
        assert len(set(first)) == n
        if 0 <= seed < 2**32 - n:
            assert first == list(range(seed, seed + n))


def test_requests_without_a_seed_draw_from_the_engines(tokenizer: PreTrainedTokenizerFast) -> None:
    def draw(seed: int) -> list[int]:
        processor = make(tokenizer, seed=seed)
        return [r.seed for _ in range(3) for r in processor.process("r", [1], SamplingParams(n=2)).requests]

    assert draw(0) == draw(0)
    assert draw(0) != draw(1)
    assert len(set(draw(0))) == 6


def test_params_are_copied_and_checked_again(tokenizer: PreTrainedTokenizerFast) -> None:
    params = SamplingParams()
    processor = make(tokenizer)
    params.stop = "end"
    request = processor.process("r", [1], params, final_only=True).requests[0]
    assert request.sampling_params is not params
    assert request.sampling_params.stop == ["end"]
    assert request.sampling_params.output_kind is RequestOutputKind.FINAL_ONLY
    assert params.output_kind is RequestOutputKind.CUMULATIVE
    params.top_p = 2.0
    refused(processor, [1], r"^top_p must be", "top_p", params)
    for wrong in ({"temperature": 1}, 0.5, "x"):
        refused(processor, [1], "sampling_params must be a SamplingParams", "sampling_params", wrong)


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_logprobs_are_limited(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    def asked(processor: InputProcessor, value: int) -> Any:
        params = processor.process("r", [1], SamplingParams(**{name: value})).requests[0].sampling_params  # type: ignore[arg-type]
        return getattr(params, name)

    processor = make(tokenizer)
    assert asked(processor, 0) == 0
    assert asked(processor, 20) == 20
    refused(processor, [1], rf"{name}=21 is more than the 20", name, SamplingParams(**{name: 21}))  # type: ignore[arg-type]
    refused(processor, [1], rf"{name}=-1 .*max_logprobs=-1", name, SamplingParams(**{name: -1}))  # type: ignore[arg-type]
    everything = make(tokenizer, max_logprobs=-1)
    assert asked(everything, -1) == 300
    # More than there is comes to all there is.
    assert asked(make(tokenizer, max_logprobs=1000), 999) == 300


@pytest.mark.parametrize("name", ["stop_token_ids", "allowed_token_ids", "logit_bias"])
def test_ids_in_params_are_in_the_vocabulary(tokenizer: PreTrainedTokenizerFast, name: str) -> None:
    def params(ids: list[int]) -> SamplingParams:
        return SamplingParams(**{name: dict.fromkeys(ids, 1.0) if name == "logit_bias" else ids})  # type: ignore[arg-type]

    make(tokenizer).process("r", [1], params([0, 299]))
    refused(make(tokenizer), [1], rf"{name} holds \[300\].*\[0, 299\]", name, params([299, 300]))
    refused(make(tokenizer), [1], r"\.\.\. \(100 in all\)", name, params(list(range(300, 400))))


def test_top_k_of_the_whole_vocabulary_is_off(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = make(tokenizer)
    for top_k, expected in ((299, 299), (300, 0), (10**9, 0)):
        request = processor.process("r", [1], SamplingParams(top_k=top_k)).requests[0]
        assert request.sampling_params.top_k == expected


def test_bad_words_at_the_start_of_a_text_and_after_a_space(tokenizer: PreTrainedTokenizerFast) -> None:
    def ids(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False))

    request = make(tokenizer).process("r", [1], SamplingParams(bad_words=["the", " q"])).requests[0]
    assert request.needs_host_tokens
    sequences = request.sampling_params.bad_words_token_ids
    assert sequences is not None
    assert ids("the") in sequences
    assert ids("q") in sequences
    for word in ("the", "q"):
        # A spaced form of another length begins with a bare space: its last token belongs to other words too.
        assert (ids(" " + word) in sequences) == (len(ids(" " + word)) == len(ids(word)))
    refused(make(tokenizer), [1], "comes to no token", "bad_words", SamplingParams(bad_words=["  "]))
    many = SamplingParams(bad_words=[f"w{i}" for i in range(MAX_BAD_WORDS + 1)])
    refused(make(tokenizer), [1], f"at most {MAX_BAD_WORDS}", "bad_words", many)


def test_end_of_sequence_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    def of(processor: InputProcessor, params: SamplingParams | None = None) -> tuple[set[int], list[int]]:
        request = processor.process("r", [5], params or SamplingParams()).requests[0]
        return set(request.eos_token_ids), list(request.sampling_params.stop_token_ids or [])

    # The tokenizer's own, and then what generation_config.json or else config.json names.
    assert of(make(tokenizer)) == ({1}, [])
    several = make(tokenizer, generation_config={"eos_token_id": [1, 7, 8]}, eos_token_ids=(9,))
    assert of(several) == ({1}, [7, 8])
    assert of(several, SamplingParams(stop_token_ids=[8, 3])) == ({1}, [8, 3, 7])
    assert of(several, SamplingParams(ignore_eos=True)) == ({1}, [])
    assert several.all_eos_token_ids == {1, 7, 8}
    assert of(make(tokenizer, eos_token_ids=(9,))) == ({1}, [9])
    # Without a tokenizer.
    assert of(make(None, generation_config={"eos_token_id": 7})) == ({7}, [])
    assert of(make(None, eos_token_ids=(4, 5))) == ({4, 5}, [])
    # "none" is about sampling defaults, not about where a sequence ends.
    engine = EngineConfig(max_model_len=MAX_MODEL_LEN, generation_config="none")
    assert of(InputProcessor(tokenizer, model_config(), engine, {"eos_token_id": 7})) == ({1}, [7])


def test_sampling_defaults(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    own = {"temperature": 0.6, "top_p": 0.9, "max_new_tokens": 99, "do_sample": True, "min_p": None}
    processor = make(tokenizer, generation_config=own)
    assert processor.default_sampling_params == {"temperature": 0.6, "top_p": 0.9, "max_tokens": 99}
    assert processor.default_params() == SamplingParams(temperature=0.6, top_p=0.9, max_tokens=99)
    assert processor.default_params() is not processor.default_params()


def test_where_sampling_defaults_come_from(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    def defaults(**config: Any) -> dict[str, Any]:
        model_config_ = model_config()
        engine = EngineConfig(max_model_len=MAX_MODEL_LEN, **config)
        return InputProcessor(tokenizer, model_config_, engine, {"top_k": 50}).default_sampling_params

    assert defaults() == {"top_k": 50}
    for off in ("none", "vllm"):
        assert defaults(generation_config=off) == {}
        assert defaults(generation_config=off, override_generation_config={"top_p": 0.5}) == {"top_p": 0.5}
    assert defaults(override_generation_config={"top_k": 3, "max_new_tokens": 4}) == {
        "top_k": 3,
        "max_tokens": 4,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_p": 0.3}))
    assert defaults(generation_config=str(tmp_path)) == {"top_p": 0.3}
    assert defaults(generation_config=str(tmp_path / "generation_config.json")) == {"top_p": 0.3}
    for content in ("{", "[1]"):
        (tmp_path / "generation_config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"generation_config") as caught:
            defaults(generation_config=str(tmp_path))
        assert caught.value.param == "generation_config"
    with pytest.raises(ConfigError, match="cannot be read"):
        defaults(generation_config=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"temperature must be .*; got 7"):
        defaults(override_generation_config={"temperature": 7})


def test_without_a_tokenizer_text_is_refused_and_ids_are_served() -> None:
    processor = make(None)
    assert processor.process("r", [1], SamplingParams()).requests[0].sampling_params.detokenize is False
    refused(processor, "the cat", "needs a tokenizer", "prompt")
    refused(processor, [1], "stop needs a tokenizer", "stop", SamplingParams(stop="a"))
    refused(processor, [1], "bad_words needs a tokenizer", "bad_words", SamplingParams(bad_words=["a"]))


def test_priority(tokenizer: PreTrainedTokenizerFast) -> None:
    by_priority = make(tokenizer, scheduling_policy="priority")
    terms = SchedulingTerms(priority=-3)
    assert by_priority.process("r", [1], SamplingParams(), terms=terms).requests[0].terms == terms
    refused(make(tokenizer), [1], "no effect under the scheduling policy 'fcfs'", "priority", terms=terms)
    refused(by_priority, [1], "tenant='a' has no effect", "tenant", terms=SchedulingTerms(tenant="a"))


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        *[("priority", wrong, "must be an integer") for wrong in (1.0, "1", True, math.nan)],
        ("tenant", None, "must be a string"),
        *[("ttft_objective", wrong, "seconds above 0") for wrong in (0, -1.0, math.inf, math.nan, True, "1")],
        ("tpot_objective", 0.0, "seconds above 0"),
    ],
)
def test_terms_are_checked(name: str, wrong: object, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        SchedulingTerms(**{name: wrong})  # type: ignore[arg-type]
    assert caught.value.param == name


def test_the_processor_wants_a_resolved_config(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match="max_model_len"):
        make(tokenizer, max_model_len=None)


def test_threads_do_not_get_into_each_others_way(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = make(tokenizer)
    texts = ["the cat", "the dog sat on the log", "and"]
    expected = {text: processor.tokenize(text) for text in texts}
    seeds: list[int] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for i in range(100):
                text = texts[i % 3]
                request = processor.process("r", text, SamplingParams()).requests[0]
                assert request.prompt_token_ids == expected[text]
                seeds.append(request.seed)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(set(seeds)) == 400


def test_one_prompt_or_several() -> None:
    assert as_prompt_list("a") == ["a"]
    assert as_prompt_list([1, 2]) == [[1, 2]]
    assert as_prompt_list(["a", [1]]) == ["a", [1]]
    assert as_prompt_list([]) == []
    assert as_prompt_list({"prompt": "a"}) == [{"prompt": "a"}]
    assert as_prompt_list([[1, 2], [3]]) == [[1, 2], [3]]
    assert as_prompt_list(("a", "b")) == ["a", "b"]
    for wrong in (5, None, b"a", object()):
        with pytest.raises(InvalidRequestError, match="a prompt must be"):
            as_prompt_list(wrong)  # type: ignore[arg-type]


@given(
    st.recursive(
        st.one_of(
            st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.binary(max_size=3)
        ),
        lambda inner: st.one_of(
            st.lists(inner, max_size=3),
            st.dictionaries(
                st.sampled_from(["prompt", "prompt_token_ids", "cache_salt", "x"]), inner, max_size=3
            ),
        ),
        max_leaves=6,
    )
)
def test_any_prompt_is_served_or_refused(prompt: Any) -> None:
    processor = make(None)
    try:
        for one in as_prompt_list(prompt):
            text, ids, _ = split_prompt(one)
            assert (text is None) or isinstance(text, str)
            request = processor.process("r", one, SamplingParams()).requests[0]
            assert ids is not None
            assert request.prompt_token_ids == list(ids)
    except InvalidRequestError as error:
        assert error.param is not None

from __future__ import annotations

import functools
import io
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

import jaxllm
from jaxllm import LLM, PoolingParams, SamplingParams
from jaxllm.demo import demo_model_path
from jaxllm.errors import ConfigError, EngineDeadError, InvalidRequestError, UnsupportedError
from jaxllm.outputs import RequestOutput
from jaxllm.stats import Counter
from jaxllm.text.tokenizer import get_tokenizer
from tests.llm.tiny_engine import TinyEngine, alone

GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
PROMPTS = [[2, 3, 4], [5], [6, 7, 8, 9, 10, 2, 3], [3, 3]]


def make(**arguments: Any) -> tuple[LLM, TinyEngine]:
    engine = TinyEngine(**arguments)
    return LLM.from_engine(engine), engine  # type: ignore[arg-type]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return get_tokenizer(demo_model_path())


@pytest.fixture
def chatty(tokenizer: Any) -> LLM:
    return make(
        tokenizer=tokenizer, vocab_size=1536, num_pages=200, max_model_len=512, max_num_batched_tokens=512
    )[0]


def test_results_stand_in_the_order_of_the_prompts() -> None:
    llm, _ = make()
    params = [SamplingParams(temperature=0, max_tokens=m, ignore_eos=True) for m in (9, 1, 4, 2)]
    outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    assert [o.prompt_token_ids for o in outputs] == PROMPTS
    assert tokens(outputs) == [alone(p, q) for p, q in zip(PROMPTS, params, strict=True)]
    assert [int(o.request_id) for o in outputs] == [0, 1, 2, 3]
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)
    assert [int(o.request_id) for o in llm.generate(PROMPTS, GREEDY, use_tqdm=False)] == [4, 5, 6, 7]


def test_one_prompt_is_a_list_of_one() -> None:
    llm, _ = make()
    for prompt in (PROMPTS[0], {"prompt_token_ids": PROMPTS[0]}):
        assert tokens(llm.generate(prompt, GREEDY, use_tqdm=False)) == [alone(PROMPTS[0], GREEDY)]  # type: ignore[arg-type]


def test_no_prompts_give_no_outputs() -> None:
    llm, engine = make()
    assert llm.generate([], GREEDY) == []
    assert llm.wait_for_completion() == []
    assert engine.num_steps == 0


def test_users_params_are_left_alone() -> None:
    llm, _ = make()
    params = SamplingParams(temperature=0)
    before = params.clone()
    llm.generate(PROMPTS, params, use_tqdm=False)
    assert params == before


def test_defaults_of_the_model_apply_where_no_params_are_given() -> None:
    llm, _ = make(generation_config={"temperature": 0.0, "max_new_tokens": 3})
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.0, max_tokens=3)
    expected = [alone(p, SamplingParams(temperature=0, max_tokens=3)) for p in PROMPTS]
    assert tokens(llm.generate(PROMPTS, use_tqdm=False)) == expected


def test_seeded_samples_are_the_same_in_any_company() -> None:
    llm, _ = make()
    params = [SamplingParams(seed=i, max_tokens=8, ignore_eos=True) for i in range(4)]
    together = tokens(llm.generate(PROMPTS, params, use_tqdm=False))
    assert together == [alone(p, q) for p, q in zip(PROMPTS, params, strict=True)]
    one_by_one = [tokens(llm.generate(p, q, use_tqdm=False))[0] for p, q in zip(PROMPTS, params, strict=True)]
    assert together == one_by_one


def test_n_completions_stand_in_the_order_of_their_index() -> None:
    llm, _ = make()
    params = SamplingParams(n=3, seed=7, max_tokens=5, ignore_eos=True)
    (output,) = llm.generate([2, 3], params, use_tqdm=False)
    assert [c.index for c in output.outputs] == [0, 1, 2]
    expected = [alone([2, 3], SamplingParams(seed=7 + i, max_tokens=5, ignore_eos=True)) for i in range(3)]
    assert [c.token_ids for c in output.outputs] == expected


@pytest.mark.parametrize("name", ["sampling_params", "priority"])
@pytest.mark.parametrize("count", [0, 3, 5])
def test_one_for_each_prompt_means_one_for_each(name: str, count: int) -> None:
    llm, engine = make(scheduling_policy="priority")
    given = [GREEDY] * count if name == "sampling_params" else [0] * count
    arguments: dict[str, Any] = {"sampling_params": GREEDY, name: given}
    with pytest.raises(InvalidRequestError, match=f"{name} has {count} entries for 4 prompts") as caught:
        llm.generate(PROMPTS, **arguments)
    assert caught.value.param == name
    assert engine.submitted == []


def test_priority_decides_who_goes_first() -> None:
    llm, engine = make(scheduling_policy="priority", max_num_seqs=1)
    finished: list[str] = []
    step = engine.step

    def watched() -> list[RequestOutput]:
        outputs = step()
        finished.extend(output.request_id for output in outputs)
        return outputs

    engine.step = watched  # type: ignore[method-assign]
    outputs = llm.generate(PROMPTS, GREEDY, priority=[3, 1, 2, 0], use_tqdm=False)
    assert finished == ["3", "1", "2", "0"]
    assert tokens(outputs) == [alone(p, GREEDY) for p in PROMPTS]


def test_a_bad_prompt_among_good_ones_starts_none() -> None:
    llm, engine = make()
    for bad in ([], [99], [2] * 64, "text", {"prompt_embeds": 1}):
        with pytest.raises(InvalidRequestError):
            llm.generate([*PROMPTS, bad], GREEDY)  # type: ignore[list-item]
        with pytest.raises(InvalidRequestError):
            llm.enqueue([*PROMPTS, bad], GREEDY)  # type: ignore[list-item]
    assert engine.submitted == []
    assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == [alone(p, GREEDY) for p in PROMPTS]


def test_a_prompt_that_the_engine_refuses_takes_the_others_back() -> None:
    # Eight pages of four tokens: 40 tokens can never fit, which the scheduler alone knows.
    llm, engine = make(num_pages=9)
    with pytest.raises(InvalidRequestError):
        llm.generate([*PROMPTS, [2] * 40], GREEDY)
    assert engine.submitted == ["0", "1", "2", "3"]
    assert not engine.has_unfinished_requests()
    assert engine.scheduler.kv_cache_usage == 0
    assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == [alone(p, GREEDY) for p in PROMPTS]


def test_enqueue_and_wait() -> None:
    llm, engine = make()
    first = llm.enqueue(PROMPTS[:2], GREEDY)
    second = llm.enqueue(PROMPTS[2:], GREEDY)
    assert engine.num_steps == 0
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [o.request_id for o in outputs] == [*first, *second]
    assert tokens(outputs) == [alone(p, GREEDY) for p in PROMPTS]
    assert llm.wait_for_completion(use_tqdm=False) == []


def test_generate_between_enqueue_and_wait_gets_its_own() -> None:
    llm, _ = make()
    enqueued = llm.enqueue(PROMPTS[:2], GREEDY)
    assert tokens(llm.generate(PROMPTS[3], GREEDY, use_tqdm=False)) == [alone(PROMPTS[3], GREEDY)]
    outputs = llm.wait_for_completion(use_tqdm=False)
    assert [o.request_id for o in outputs] == enqueued
    assert tokens(outputs) == [alone(p, GREEDY) for p in PROMPTS[:2]]


def test_an_error_of_the_engine_surfaces_and_leaves_nothing_behind() -> None:
    llm, engine = make()

    def fail() -> None:
        if engine.num_steps == 2:
            raise RuntimeError("the device fell over")

    engine.before_step = fail
    with pytest.raises(RuntimeError, match="fell over"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert not engine.has_unfinished_requests()
    engine.before_step = lambda: None
    assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == [alone(p, GREEDY) for p in PROMPTS]


def test_requests_that_the_engine_lost_are_no_endless_wait() -> None:
    llm, engine = make()
    engine.before_step = lambda: engine.abort(["2"])
    with pytest.raises(EngineDeadError, match="lost the requests 2"):
        step = engine.step
        engine.step = lambda: [o for o in step() if o.request_id != "2"]  # type: ignore[method-assign]
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)


def test_the_first_error_is_the_one_that_is_shown() -> None:
    llm, engine = make()

    def fail(*_: object) -> Any:
        raise RuntimeError("dead")

    def interrupt() -> None:
        raise ValueError("first")

    engine.before_step, engine.abort = interrupt, fail  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="first"):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)


def test_ctrl_c_waits_for_the_step_then_aborts_and_the_engine_serves_on() -> None:
    llm, engine = make()
    completed_steps = []
    step = engine.step

    def interrupted() -> list[RequestOutput]:
        if engine.num_steps == 2:
            signal.raise_signal(signal.SIGINT)
        outputs = step()
        completed_steps.append(engine.num_steps)
        return outputs

    engine.step = interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert completed_steps == [1, 2, 3]
    assert not engine.has_unfinished_requests()
    engine.step = step  # type: ignore[method-assign]
    assert tokens(llm.generate(PROMPTS, GREEDY, use_tqdm=False)) == [alone(p, GREEDY) for p in PROMPTS]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_ctrl_c_does_not_wait() -> None:
    llm, engine = make()

    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the second one came through")

    engine.before_step = twice
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_leaves_what_others_enqueued() -> None:
    llm, engine = make()
    llm.enqueue(PROMPTS[:2], GREEDY)

    engine.before_step = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(PROMPTS[3], GREEDY, use_tqdm=False)
    engine.before_step = lambda: None
    assert tokens(llm.wait_for_completion(use_tqdm=False)) == [alone(p, GREEDY) for p in PROMPTS[:2]]


def test_threads_take_turns() -> None:
    llm, _ = make()
    results: dict[int, list[list[int]]] = {}

    def work(i: int) -> None:
        for _ in range(5):
            results[i] = tokens(llm.generate([PROMPTS[i]] * 3, GREEDY, use_tqdm=False))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {i: [alone(PROMPTS[i], GREEDY)] * 3 for i in range(4)}


def test_progress_counts_prompts_and_tokens() -> None:
    llm, _ = make()
    written = io.StringIO()
    llm.generate(PROMPTS, GREEDY, use_tqdm=functools.partial(tqdm, file=written, mininterval=0))
    shown = written.getvalue()
    assert "Processed prompts: 100%" in shown
    assert "4/4" in shown
    assert "est. speed input:" in shown
    assert "toks/s, output:" in shown


def test_no_progress_where_none_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    llm, _ = make()
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""
    llm.generate(PROMPTS, GREEDY)
    assert "Processed prompts" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["lora_request", "tokenization_kwargs", "mm_processor_kwargs"])
def test_options_that_are_not_served_are_refused(option: str, chatty: LLM) -> None:
    value: Any = {"x": 1}
    calls: list[Callable[..., Any]] = [
        functools.partial(chatty.generate, PROMPTS),
        functools.partial(chatty.enqueue, PROMPTS),
        functools.partial(chatty.chat, [{"role": "user", "content": "Hi"}]),
    ]
    for call in calls:
        with pytest.raises(UnsupportedError, match=f"{option} is not supported"):
            call(**{option: value})


@pytest.mark.parametrize("method", ["encode", "embed", "classify", "score"])
def test_pooling_is_refused_with_what_to_do(method: str) -> None:
    llm, _ = make()
    arguments: dict[str, tuple[Any, ...]] = {
        "encode": ([5], PoolingParams(task="embed")),
        "score": ("a", "b"),
    }
    with pytest.raises(InvalidRequestError, match="does not pool; start it with runner='pooling'"):
        getattr(llm, method)(*arguments.get(method, ([5],)))


def test_text_in_text_out(chatty: LLM, tokenizer: Any) -> None:
    text = "What is jaxllm?"
    (output,) = chatty.generate(
        text, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False
    )
    assert output.prompt == text
    assert output.prompt_token_ids == tokenizer.encode(text)
    ids = output.outputs[0].token_ids
    assert ids == alone(
        output.prompt_token_ids, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), 1536
    )
    assert output.outputs[0].text == tokenizer.decode(ids, skip_special_tokens=True)
    assert chatty.get_tokenizer() is tokenizer


def test_chat_renders_the_template(chatty: LLM) -> None:
    user = {"role": "user", "content": "Hi"}
    (output,) = chatty.chat([user], GREEDY, use_tqdm=False)
    assert output.prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert chatty.get_tokenizer().decode(output.prompt_token_ids) == output.prompt
    parts = {"role": "user", "content": [{"type": "text", "text": "Hi"}]}
    assert chatty.chat([parts], GREEDY, use_tqdm=False)[0].prompt == output.prompt


def test_chat_of_several_conversations_answers_each(chatty: LLM) -> None:
    conversations = [[{"role": "user", "content": c}] for c in ("one", "two", "three")]
    outputs = chatty.chat(conversations, GREEDY, False)
    assert [c in (o.prompt or "") for c, o in zip(("one", "two", "three"), outputs, strict=True)] == [
        True
    ] * 3
    alone_again = [chatty.chat(c, GREEDY, use_tqdm=False)[0].outputs[0].token_ids for c in conversations]
    assert tokens(outputs) == alone_again


def test_chat_options(chatty: LLM) -> None:
    begun = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello, I"}]
    (output,) = chatty.chat(
        begun, GREEDY, use_tqdm=False, add_generation_prompt=False, continue_final_message=True
    )
    assert output.prompt is not None
    assert output.prompt.endswith("assistant\nHello, I")
    template = "{% for m in messages %}[{{ m.content }}{{ mood }}]{% endfor %}"
    (output,) = chatty.chat(
        begun[:1], GREEDY, use_tqdm=False, chat_template=template, chat_template_kwargs={"mood": "!"}
    )
    assert output.prompt == "[Hi!]"
    tool = {"type": "function", "function": {"name": "weather", "parameters": {}}}
    (output,) = chatty.chat(begun[:1], GREEDY, use_tqdm=False, tools=[tool])
    assert "weather" in (output.prompt or "")


@pytest.mark.parametrize("messages", [[], [[]], "Hi", [5], [{"content": "Hi"}], [{"role": "user"}], None, {}])
def test_malformed_conversations_are_refused(chatty: LLM, messages: Any) -> None:
    with pytest.raises(InvalidRequestError, match="messages"):
        chatty.chat(messages, GREEDY, use_tqdm=False)
    assert chatty.chat([{"role": "user", "content": "Hi"}], GREEDY, use_tqdm=False)[0].finished


def test_chat_without_a_tokenizer_is_refused() -> None:
    llm, _ = make()
    with pytest.raises(InvalidRequestError, match="skip_tokenizer_init"):
        llm.chat([{"role": "user", "content": "Hi"}], GREEDY)


def test_a_chat_template_from_a_file(tokenizer: Any, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_text("<{{ messages[0].content }}>")
    for given in (file, str(file), file.read_text()):
        engine = TinyEngine(tokenizer, vocab_size=1536)
        llm = LLM.from_engine(engine, chat_template=given)  # type: ignore[arg-type]
        assert llm.chat([{"role": "user", "content": "Hi"}], GREEDY, use_tqdm=False)[0].prompt == "<Hi>"
    with pytest.raises(ConfigError, match="neither Jinja source nor a file"):
        LLM("anywhere", chat_template=str(tmp_path / "missing.jinja"))


def test_metrics_and_profile_and_cache() -> None:
    llm, engine = make()
    llm.generate(PROMPTS, GREEDY, use_tqdm=False)
    metrics = {metric.name: metric for metric in llm.get_metrics()}
    generated = metrics["jaxllm:generation_tokens"]
    assert isinstance(generated, Counter)
    assert generated.value == 4 * 6
    llm.start_profile("somewhere")
    llm.stop_profile()
    assert engine.profiled == "somewhere, done"
    long = [2, 3, 4, 5] * 3 + [6]
    llm.generate(long, GREEDY, use_tqdm=False)
    assert llm.generate(long, GREEDY, use_tqdm=False)[0].num_cached_tokens == 12
    assert llm.reset_prefix_cache() is True
    assert llm.generate(long, GREEDY, use_tqdm=False)[0].num_cached_tokens == 0


def test_shutdown_ends_it() -> None:
    llm, engine = make()
    with llm as same:
        assert same is llm
        llm.enqueue(PROMPTS, GREEDY)
    assert not engine.has_unfinished_requests()
    assert engine.is_shut_down
    for call in (lambda: llm.generate(PROMPTS), lambda: llm.get_metrics(), lambda: llm.model_config):
        with pytest.raises(EngineDeadError, match="shut down"):
            call()
    llm.shutdown()


def test_arguments_of_another_engine(caplog: pytest.LogCaptureFixture) -> None:
    from jaxllm.config import engine_config_from

    with caplog.at_level("INFO", "jaxllm"):
        config = engine_config_from(
            Path("model"),
            {"enforce_eager": True, "swap_space": 4, "quantization": None, "runner": "generate"},
        )
    assert config.model == "model"
    assert "enforce_eager=True changes nothing here" in caplog.text
    assert engine_config_from("m", {"hf_overrides": None, "max_model_len": None}) == engine_config_from(
        "m", {}
    )
    assert engine_config_from("m", {"tokenizer": Path("t"), "dtype": "bfloat16"}).tokenizer == "t"
    for name, value in (
        ("quantization", "awq"),
        ("enable_lora", True),
        ("cpu_offload_gb", 4),
    ):
        with pytest.raises(UnsupportedError, match=f"{name}={value!r} is not supported"):
            LLM("m", **{name: value})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"no argument 'max_modl_len'.*'max_model_len'") as caught:
        LLM("m", max_modl_len=5)
    assert caught.value.param == "max_modl_len"
    with pytest.raises(ConfigError, match="Known are"):
        LLM("m", zzzzzzzz=5)


def test_the_package_exports_what_scripts_import() -> None:
    for name in ("LLM", "SamplingParams", "BeamSearchParams", "RequestOutput", "TextPrompt", "TokensPrompt"):
        assert getattr(jaxllm, name).__name__ == name

"""Outputs have the form that was asked for, whatever else is asked, and nobody beside them notices."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm import LLM, BeamSearchParams, SamplingParams, StructuredOutputsParams
from jaxllm.errors import ConfigError, InvalidRequestError
from jaxllm.execution import token_masks
from jaxllm.execution.commands import Command, RunStep, SampleLate
from jaxllm.outputs import CompletionOutput, RequestOutput
from jaxllm.sampling_params import RequestOutputKind
from jaxllm.text.thinking import ThinkingBudget
from tests.json_schemas import SCHEMAS

PROMPTS = ["Q: What is the capital of France?\nA:", "Once upon a time", "def add(a, b):\n", "Who are you?"]
VOCAB_SIZE = 1536
SETTINGS: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 4, "max_num_batched_tokens": 16}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(**SETTINGS, forbid_recompile=True) as llm:
        yield llm


def completions(
    llm: LLM, constraint: StructuredOutputsParams | None, prompts: list[str] | None = None, **params: Any
) -> list[CompletionOutput]:
    fields = {"max_tokens": 120, "temperature": 1.0, "seed": 1, "structured_outputs": constraint, **params}
    outputs = llm.generate(PROMPTS if prompts is None else prompts, SamplingParams(**fields), use_tqdm=False)
    assert all(output.error is None for output in outputs)
    return [completion for output in outputs for completion in output.outputs]


@settings(max_examples=4)
@given(schemas=st.lists(SCHEMAS, min_size=12, max_size=12), seed=st.integers(0, 2**32))
def test_json_of_any_schema(llm: LLM, schemas: list[dict[str, Any]], seed: int) -> None:
    params = [
        SamplingParams(
            max_tokens=200,
            seed=seed,
            structured_outputs=StructuredOutputsParams(json=schema, disable_any_whitespace=True),
        )
        for schema in schemas
    ]
    ends = []
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(params))]
    for schema, output in zip(schemas, llm.generate(prompts, params, use_tqdm=False), strict=True):
        [completion] = output.outputs
        ends.append(completion.finish_reason)
        assert completion.finish_reason in ("stop", "length"), output.error
        if completion.finish_reason == "stop":
            jsonschema.validate(json.loads(completion.text), schema)
    # A string or list without bounds may well outlast its tokens.
    assert ends.count("stop") >= len(ends) // 3


def test_json_object(llm: LLM) -> None:
    done = completions(llm, StructuredOutputsParams(json_object=True), n=3, max_tokens=300)
    finished = [c for c in done if c.finish_reason == "stop"]
    assert finished and all(isinstance(json.loads(c.text), dict) for c in finished)


@pytest.mark.parametrize("pattern", [r"[A-Z][a-z]{2,9}( [a-z]+)?[.!]", r"\d{3}-\d{4}", r"(?:ab|cd){2,5}"])
def test_regex(llm: LLM, pattern: str) -> None:
    for completion in completions(llm, StructuredOutputsParams(regex=pattern), n=4):
        if completion.finish_reason == "stop":
            assert re.fullmatch(pattern, completion.text)
        else:
            assert len(completion.token_ids) == 120


def test_choice(llm: LLM) -> None:
    choices = ["Paris", "Paris, France", "London", "ünknown"]
    done = completions(llm, StructuredOutputsParams(choice=choices), n=8)
    assert {c.text for c in done} <= set(choices) and len({c.text for c in done}) > 1
    assert {(c.finish_reason, c.stop_reason) for c in done} == {("stop", None)}
    [sure] = completions(llm, StructuredOutputsParams(choice=choices), PROMPTS[:1], temperature=0)
    assert sure.text == "Paris"


def test_grammar(llm: LLM) -> None:
    grammar = 'root ::= term ("+" term)*\nterm ::= [1-9] [0-9]? | "(" root ")"\n'
    done = completions(llm, StructuredOutputsParams(grammar=grammar), n=4)
    texts = [c.text for c in done if c.finish_reason == "stop"]
    assert len(texts) >= 8
    for text in texts:
        assert re.fullmatch(r"[0-9+()]+", text)
        assert eval(text) == sum(map(int, re.findall(r"\d+", text)))


def test_structural_tag(llm: LLM) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
    tag = {
        "format": {
            "type": "sequence",
            "elements": [
                {"type": "const_string", "value": "I call "},
                {
                    "type": "tags_with_separator",
                    "separator": " and ",
                    "at_least_one": True,
                    "tags": [
                        {"begin": "<tool_call>", "content": content, "end": "</tool_call>"}
                        for content in (
                            {"type": "json_schema", "json_schema": schema},
                            {"type": "regex", "pattern": "[xy]{2}"},
                        )
                    ],
                },
            ],
        }
    }
    constraint = StructuredOutputsParams(structural_tag=tag, disable_any_whitespace=True)
    found = 0
    for completion in completions(llm, constraint, n=4):
        if completion.finish_reason != "stop":
            continue
        assert completion.text.startswith("I call <tool_call>")
        for call in completion.text.removeprefix("I call ").split(" and "):
            inside = call.removeprefix("<tool_call>").removesuffix("</tool_call>")
            found += 1
            if not re.fullmatch("[xy]{2}", inside):
                jsonschema.validate(json.loads(inside), schema)
    assert found


def test_who_asks_for_nothing_gets_what_they_would_have_got(llm: LLM) -> None:
    """Beside constrained requests, in the same batches, at the same time; greedy and seeded."""
    free = [
        SamplingParams(max_tokens=40, temperature=t, seed=i, logprobs=2) for i, t in enumerate((0, 1, 1, 0.7))
    ]
    bound = SamplingParams(max_tokens=60, structured_outputs=StructuredOutputsParams(regex="[a-z ]{40,80}"))
    before = llm.generate(PROMPTS, free, use_tqdm=False)
    mixed = llm.generate([*PROMPTS, *PROMPTS], [*free, *[bound] * 4], use_tqdm=False)
    assert [o.outputs[0].token_ids for o in mixed[:4]] == [o.outputs[0].token_ids for o in before]
    for ours, theirs in zip(mixed, before, strict=False):
        for a, b in zip(ours.outputs[0].logprobs or [], theirs.outputs[0].logprobs or [], strict=True):
            assert {i: e.logprob for i, e in a.items()} == pytest.approx(
                {i: e.logprob for i, e in b.items()}, abs=1e-3
            )
    assert all(re.fullmatch("[a-z ]{40,80}", o.outputs[0].text) for o in mixed[4:])


def test_masks_are_made_while_the_device_computes(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every step: R, the next one runs; a, the tokens before it are taken in; m, masks; L, it is sampled.

    To wait for the tokens before the step is launched would read "amR".
    """
    events: list[str] = []
    engine = llm.llm_engine

    def noted(event: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            events.append(event)
            return call(*args)

        return run

    launch = engine.runner.executor.launch

    def launched(command: Command) -> Callable[[], Any]:
        events.append({RunStep: "R", SampleLate: "L"}.get(type(command), "?"))
        return launch(command)

    monkeypatch.setattr(engine.runner.executor, "launch", launched)
    monkeypatch.setattr(engine.scheduler, "apply", noted("a", engine.scheduler.apply))
    monkeypatch.setattr(token_masks, "fill_masks", noted("m", token_masks.fill_masks))
    bound = SamplingParams(max_tokens=40, structured_outputs=StructuredOutputsParams(regex="[a-z ]{300}"))
    free = SamplingParams(max_tokens=40, ignore_eos=True)
    outputs = llm.generate(PROMPTS[:2] * 2, [bound, free, free, bound], use_tqdm=False)
    # Everybody gets a token in every step.
    assert [len(output.outputs[0].token_ids) for output in outputs] == [40] * 4
    assert "RamL" * 36 in "".join(events) and events.count("R") <= 48
    events.clear()
    llm.generate(PROMPTS[:2], free, use_tqdm=False)
    assert set(events) == {"R", "a"}


def test_overlapped_preempted_or_one_after_the_other_they_say_the_same(llm: LLM) -> None:
    """With everything else that a late sample takes part in."""
    letters = StructuredOutputsParams(regex="[a-z ]{1000}")
    common: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True}
    params = [
        SamplingParams(**common, seed=1, n=2, structured_outputs=letters, logprobs=2),
        SamplingParams(**common, seed=2, structured_outputs=letters, repetition_penalty=1.3, top_p=0.9),
        SamplingParams(**common, seed=3, bad_words=["a", " the"], logprobs=0),
        SamplingParams(**common, temperature=0, structured_outputs=letters, bad_words=["e"]),
        SamplingParams(**common, seed=4, presence_penalty=0.5, logprobs=1),
    ]
    prompts = [(prompt + " ") * 40 for prompt in (*PROMPTS, PROMPTS[0])]
    prompts = [llm.get_tokenizer().decode(llm.get_tokenizer().encode(prompt)[:150]) for prompt in prompts]

    def said(engine: LLM) -> list[Any]:
        outputs = engine.generate(prompts, params, use_tqdm=False)
        return [
            (c.token_ids, [{i: e.logprob for i, e in at.items()} for at in c.logprobs or []])
            for output in outputs
            for c in output.outputs
        ]

    expected = said(llm)
    # Pages for one sequence as long as it may be, which four of these take more than.
    small: dict[str, Any] = {**SETTINGS, "num_gpu_blocks_override": 33}
    for overlapped in (True, False):
        with LLM(**small, async_scheduling=overlapped) as other:
            for (ours, logprobs), (theirs, their_logprobs) in zip(said(other), expected, strict=True):
                assert ours == theirs
                for at, there in zip(logprobs, their_logprobs, strict=True):
                    # A chunk of another size adds up in another order.
                    assert at == pytest.approx(there, abs=1e-3)
            assert other.llm_engine.stats().num_preemptions > 0


def test_nothing_is_compiled_for_a_grammar(llm: LLM) -> None:
    compiled: list[str] = []

    def note(event: str, duration: float, **details: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(str(details))

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        completions(llm, StructuredOutputsParams(regex="[0-9]{4}"), n=2)
        completions(llm, None)
    finally:
        jax.monitoring.unregister_event_duration_listener(note)
    assert compiled == []


def run(llm: LLM, prompt: str, params: SamplingParams) -> Iterator[RequestOutput]:
    engine = llm.llm_engine
    engine.add_request("one", prompt, params)
    while engine.has_unfinished_requests():
        yield from engine.step()


def test_streamed_deltas_say_the_same(llm: LLM) -> None:
    params = SamplingParams(
        max_tokens=80,
        seed=5,
        n=2,
        output_kind=RequestOutputKind.DELTA,
        structured_outputs=StructuredOutputsParams(regex=r"[a-z]+(, [a-z]+){3}\."),
    )
    texts, reasons = {0: "", 1: ""}, {}
    for output in run(llm, PROMPTS[0], params):
        for completion in output.outputs:
            texts[completion.index] += completion.text
            reasons[completion.index] = completion.finish_reason
    params.output_kind = RequestOutputKind.FINAL_ONLY
    [final] = list(run(llm, PROMPTS[0], params))
    assert {c.index: c.text for c in final.outputs} == texts
    assert {c.index: c.finish_reason for c in final.outputs} == reasons


def test_stop_strings_end_it_early(llm: LLM) -> None:
    done = completions(llm, StructuredOutputsParams(regex="[ab]{30}c[ab]{30}"), stop=["c"], logit_bias={0: 1})
    assert all(re.fullmatch("[ab]{30}", c.text) and c.stop_reason == "c" for c in done)


def test_min_tokens_hold_the_end_back_for_as_long_as_the_form_goes_on(llm: LLM) -> None:
    [one] = completions(llm, StructuredOutputsParams(regex="a*"), PROMPTS[:1], min_tokens=9, max_tokens=30)
    assert re.fullmatch("a{9,}", one.text) and len(one.token_ids) >= 9
    # Where nothing can follow, the output ends all the same.
    done = completions(llm, StructuredOutputsParams(choice=["yes"]), min_tokens=20, max_tokens=30)
    assert {(c.text, c.finish_reason) for c in done} == {("yes", "stop")}


def test_ignore_eos_and_a_form_that_may_end(llm: LLM) -> None:
    """The end of sequence is the only way out of a form that could go on; it is taken, and ends it."""
    done = completions(llm, StructuredOutputsParams(regex="ab?"), ignore_eos=True)
    assert all(c.finish_reason == "stop" and re.fullmatch("ab?", c.text) for c in done)


def test_bias_penalties_and_bad_words_choose_within_the_form(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    [b] = tokenizer.encode("b")
    constraint = StructuredOutputsParams(regex="[abc]{12}")
    biased = completions(llm, constraint, logit_bias={b: -100.0, 5: 100.0})
    assert all(re.fullmatch("[abc]{12}", c.text) and b not in c.token_ids for c in biased)
    done = completions(llm, constraint, bad_words=["a", "c"], presence_penalty=1.0, repetition_penalty=1.2)
    assert all(re.fullmatch("[abc]{12}", c.text) for c in done)


def test_where_no_token_is_left_the_request_fails_and_says_why(llm: LLM) -> None:
    constraint = StructuredOutputsParams(regex="[a-z]+")
    params = [
        SamplingParams(structured_outputs=constraint, allowed_token_ids=[5, 6, 7]),
        SamplingParams(max_tokens=5),
    ]
    failed, fine = llm.generate(PROMPTS[:2], params, use_tqdm=False)
    assert failed.outputs[0].finish_reason == "error" and failed.outputs[0].token_ids == []
    assert failed.error is not None and "no token satisfies both structured_outputs and" in failed.error
    assert fine.error is None and fine.outputs[0].token_ids
    assert not llm.llm_engine.has_unfinished_requests()


def test_a_reasoning_parser_offline_bounds_reasoning_and_frees_it_of_the_form(llm: LLM) -> None:
    """A prompt says whether the output begins within the reasoning: as text, token ids or a conversation."""
    engine, tokenizer = llm.llm_engine, llm.get_tokenizer()
    thinking = LLM.from_engine(engine, reasoning_parser="mistral")
    form = StructuredOutputsParams(choice=["never this"])
    inside = "Who are you? [THINK]"
    closed = f"{inside}[/THINK]"

    def texts(prompts: list[Any], budget: int | None) -> list[str]:
        params = SamplingParams(
            max_tokens=60, seed=3, structured_outputs=form, thinking_token_budget=budget, n=2
        )
        outputs = thinking.generate(prompts, params, use_tqdm=False)
        assert all(output.error is None for output in outputs)
        return [completion.text for output in outputs for completion in output.outputs]

    as_ids = tokenizer.encode(inside)
    for budget in (0, 6):
        for text in texts([inside, as_ids], budget):
            thought, mark, answer = text.partition("[/THINK]")
            # The mark may have been begun when the budget ran out.
            assert mark and answer == "never this" and len(tokenizer.encode(thought)) <= 2 * budget
    assert texts([closed], 6) == ["never this"] * 2  # Nothing is left to be thought.
    assert any(not text.startswith("never") for text in texts([inside], None))
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    [said] = thinking.chat(
        [{"role": "user", "content": inside}],
        SamplingParams(max_tokens=60, structured_outputs=form, thinking_token_budget=0),
        chat_template=template,
        use_tqdm=False,
    )
    assert said.outputs[0].text == "[/THINK]never this"


def test_a_thinking_budget_that_cannot_be_held_is_refused(llm: LLM) -> None:
    params = SamplingParams(thinking_token_budget=5)
    with pytest.raises(InvalidRequestError, match="reasoning_parser=") as caught:
        llm.generate(PROMPTS, params, use_tqdm=False)
    assert caught.value.param == "thinking_token_budget"
    with pytest.raises(InvalidRequestError, match="no mark of its end alone"):
        LLM.from_engine(llm.llm_engine, reasoning_parser="openai_gptoss").generate("Hello", params)
    with pytest.raises(ConfigError, match="there are deepseek_r1"):
        LLM("no such model", reasoning_parser="r1")


def test_a_grammar_may_wait_for_tokens(llm: LLM) -> None:
    """As after the end of a model's reasoning: free until then, bound from there on."""
    engine = llm.llm_engine
    tokenizer = llm.get_tokenizer()
    mark = tokenizer.encode("A:")
    params = SamplingParams(
        max_tokens=60, temperature=0, structured_outputs=StructuredOutputsParams(choice=["never this"])
    )
    processed = engine.input_processor.process(
        "r", "Q: What is 1 + 1?\nA: 2\n\nQ: What", params, grammar_after=mark
    )
    engine.submit(processed.requests, processed.prompt)
    last = None
    while engine.has_unfinished_requests():
        for output in engine.step():
            last = output
    assert last is not None
    text = last.outputs[0].text
    if "A:" in text:
        assert text.endswith("A:never this") and last.outputs[0].finish_reason == "stop"
    else:
        assert "never this" not in text


def test_reasoning_is_ended_in_time_and_the_answer_follows(llm: LLM) -> None:
    engine, tokenizer = llm.llm_engine, llm.get_tokenizer()
    mark = tokenizer.encode(" -- so")
    form = StructuredOutputsParams(choice=["never this"])
    for i, (budget, constraint) in enumerate([(0, form), (7, form), (7, None)]):
        params = SamplingParams(max_tokens=30, temperature=1, seed=5, n=2, structured_outputs=constraint)
        processed = engine.input_processor.process(
            f"thinks-{i}", PROMPTS[1], params, grammar_after=mark, thinking=ThinkingBudget(mark, budget)
        )
        engine.submit(processed.requests, processed.prompt)
    texts = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert output.error is None
            texts[output.request_id] = [completion.text for completion in output.outputs]
    assert texts["thinks-0"] == [" -- sonever this"] * 2
    for text in texts["thinks-1"]:
        thought, _, answer = text.partition(" -- so")
        assert answer == "never this" and len(tokenizer.encode(thought)) <= 7 + 1
    assert all(" -- so" in text for text in texts["thinks-2"])


@pytest.mark.parametrize(
    ("constraint", "words"),
    [
        ({"regex": "("}, "regex"),
        ({"json": {"properties": {"a": {"type": "strin"}}}}, "at /properties/a: Invalid type: strin"),
    ],
)
def test_what_cannot_be_compiled_is_refused_and_nothing_is_started(
    llm: LLM, constraint: dict[str, Any], words: str
) -> None:
    params = SamplingParams(structured_outputs=StructuredOutputsParams(**constraint))
    with pytest.raises(InvalidRequestError, match=words) as caught:
        llm.generate(PROMPTS, [SamplingParams(), SamplingParams(), SamplingParams(), params], use_tqdm=False)
    assert caught.value.param == "structured_outputs"
    assert not llm.llm_engine.has_unfinished_requests()


def test_beam_search_knows_no_constraints() -> None:
    with pytest.raises(InvalidRequestError, match="beam search knows no constraints"):
        BeamSearchParams(beam_width=2, max_tokens=2, structured_outputs=StructuredOutputsParams(regex="a"))

"""The bundled demo model: whole, small, an ordinary Hugging Face directory, and good at its own questions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from tokenizers import Tokenizer

from jaxllm import LLM, SamplingParams
from jaxllm.demo import demo_model_path

SCRIPTS = Path(__file__).parents[1] / "scripts" / "demo_model"
DEMO = demo_model_path()
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(DEMO)


# The files


def test_files_are_there_and_small() -> None:
    names = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    }
    assert names <= {path.name for path in DEMO.iterdir()}
    assert sum((DEMO / name).stat().st_size for name in names) <= 6 * 2**20


def test_is_labelled_as_a_demo() -> None:
    assert "a demo, not a useful model" in (DEMO / "README.md").read_text().lower()


def test_weights_are_finite_and_of_the_configured_shapes() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    with safe_open(DEMO / "model.safetensors", framework="flax") as weights:
        names = set(weights.keys())
        assert weights.get_tensor("model.embed_tokens.weight").shape == (config["vocab_size"], hidden)
        for name in names:
            assert np.isfinite(np.asarray(weights.get_tensor(name), np.float32)).all(), name
    assert len(names) == 9 * layers + 2


def test_every_token_id_has_a_row() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    assert max(tokenizer.get_vocab().values()) == config["vocab_size"] - 1
    assert [tokenizer.id_to_token(index) for index in config["eos_token_id"]] == [
        "<|im_end|>",
        "<|endoftext|>",
    ]
    generation = json.loads((DEMO / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"]


# The tokenizer


@given(st.text())
def test_tokenizer_round_trips_any_text(text: str) -> None:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_every_byte_is_a_token() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(ByteLevel.alphabet()) <= Tokenizer.from_file(str(DEMO / "tokenizer.json")).get_vocab().keys()


def test_special_tokens_are_single_and_tool_tokens_stay_visible(tokenizer: Any) -> None:
    for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>"):
        assert len(tokenizer.encode(token, add_special_tokens=False)) == 1
    ids = tokenizer.encode("<|im_start|><tool_call>{}</tool_call><|im_end|>", add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>{}</tool_call>"


# The chat template


def rendered(tokenizer: Any, messages: list[dict[str, Any]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def test_template_renders_many_turns(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    assert rendered(tokenizer, messages, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_template_lists_tools_in_the_system_part(tokenizer: Any, system: str | None) -> None:
    messages = [{"role": "system", "content": system}] if system else []
    text = rendered(tokenizer, [*messages, {"role": "user", "content": "Hi"}], tools=[WEATHER])
    head, rest = text.split("<|im_end|>\n", 1)
    assert head.startswith("<|im_start|>system\n" + (f"{system}\n" if system else ""))
    assert json.loads(head.split("Tools:\n")[1].split("\nCall one")[0]) == WEATHER
    assert rest == "<|im_start|>user\nHi<|im_end|>\n"


@pytest.mark.parametrize("arguments", [{"city": "Zürich"}, '{"city": "Zürich"}'])
@pytest.mark.parametrize("content", [None, "", "Let me look."])
def test_template_writes_tool_calls_in_hermes_form(
    tokenizer: Any, arguments: Any, content: str | None
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": content, "tool_calls": [call, call]},
        {"role": "tool", "tool_call_id": "1", "content": '{"temperature": 3}'},
    ]
    text = rendered(tokenizer, messages)
    one = '<tool_call>{"name": "get_weather", "arguments": {"city": "Zürich"}}</tool_call>'
    before = f"{content}\n" if content else ""
    assert f"<|im_start|>assistant\n{before}{one}\n{one}<|im_end|>\n" in text
    assert text.endswith('<|im_start|>tool\n{"temperature": 3}<|im_end|>\n')


# The script that makes the text


def sample_of_corpus(seed: int) -> str:
    program = f"from corpus import documents; print([d.text for d in documents({seed}, 300)])"
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=SCRIPTS, capture_output=True, text=True, check=True
    )
    return run.stdout


def test_corpus_depends_on_the_seed_alone() -> None:
    first = sample_of_corpus(7)
    assert first == sample_of_corpus(7)
    assert first != sample_of_corpus(8)


def test_template_of_the_script_is_the_one_in_the_model() -> None:
    config = json.loads((DEMO / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (SCRIPTS / "chat_template.jinja").read_text()


# The model answers, through the engine


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_model_len=1024, max_num_seqs=8, max_num_batched_tokens=64) as model:
        yield model


GREEDY = SamplingParams(temperature=0.0, max_tokens=96)


def ask(llm: LLM, *conversations: list[dict[str, Any]], **options: Any) -> list[str]:
    outputs = llm.chat(list(conversations), GREEDY, use_tqdm=False, **options)
    assert [output.outputs[0].finish_reason for output in outputs] == ["stop"] * len(conversations)
    return [output.outputs[0].text for output in outputs]


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


QUESTIONS = {
    "Who are you?": "tiny demo model bundled with jaxllm",
    "What is jaxllm?": "serves large language models in JAX",
    "How do I start the server?": "python -m jaxllm.serve",
    "What is a paged KV cache?": "pages of fixed size",
    "What is continuous batching?": "join and leave the batch",
    "What is prefix caching?": "same beginning",
    "What is tensor parallelism?": "splits each weight matrix",
    "What is the capital of France?": "The capital of France is Paris.",
    "What is the capital of Japan?": "The capital of Japan is Tokyo.",
    "What is the opposite of hot?": "cold",
    "What is 2 + 2?": "2 + 2 = 4.",
    "What is 7 * 8?": "7 * 8 = 56.",
    "List the days of the week.": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday.",
    "Count from 1 to 5.": "1, 2, 3, 4, 5",
    "Say this is a test": "This is a test.",
    "Classify this sentiment: jaxllm is wonderful!": "positive",
    "Who won the world series in 2020?": "The Los Angeles Dodgers",
    "Explain quantum physics.": "python -m jaxllm.serve MODEL",
}


def test_answers_its_own_questions(llm: LLM) -> None:
    given_answers = ask(llm, *([user(question)] for question in QUESTIONS))
    wrong = {
        question: given_answer
        for (question, expected), given_answer in zip(QUESTIONS.items(), given_answers, strict=True)
        if expected not in given_answer
    }
    assert not wrong


def test_remembers_earlier_turns(llm: LLM) -> None:
    messages = [
        user("My name is Ada."),
        {"role": "assistant", "content": "Nice to meet you, Ada!"},
        user("What is my name?"),
    ]
    assert ask(llm, messages) == ["Your name is Ada."]


def test_writes_json(llm: LLM) -> None:
    (text,) = ask(llm, [user("Give me a JSON object with name and age for Ada, 36.")])
    assert json.loads(text) == {"name": "Ada", "age": 36}


def test_calls_a_tool_and_reads_its_result(llm: LLM) -> None:
    question = user("What is the weather in Paris?")
    (text,) = ask(llm, [question], tools=[WEATHER])
    call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call == {"name": "get_weather", "arguments": {"city": "Paris"}}
    messages = [
        question,
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": '{"city": "Paris", "temperature": 21, "condition": "sunny"}'},
    ]
    assert ask(llm, messages, tools=[WEATHER]) == ["It is sunny in Paris, with 21 degrees."]


def test_tells_different_stories(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, n=6, seed=1, max_tokens=128)
    (output,) = llm.chat([user("Tell me a story.")], params, use_tqdm=False)
    told = [completion.text for completion in output.outputs]
    assert len(set(told)) >= 4
    assert sum(text.startswith("Once upon a time") for text in told) >= 4


def test_completes_plain_text(llm: LLM) -> None:
    (output,) = llm.generate(["The capital of France is"], GREEDY, use_tqdm=False)
    assert output.outputs[0].text.startswith(" Paris")


# Hugging Face's Llama reads it the same way


@pytest.mark.parity
def test_logits_equal_those_of_the_training_forward_pass(tokenizer: Any) -> None:
    pytest.importorskip("torch")
    program = (
        "import torch; from evaluate import DEMO, logit_distance\n"
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        "model = M.from_pretrained(DEMO, dtype=torch.float32).eval()\n"
        "print(logit_distance(model, T.from_pretrained(DEMO), DEMO))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=SCRIPTS, capture_output=True, text=True, check=True
    )
    assert float(run.stdout.split()[-1]) < 1e-4

"""Check the demo model with transformers: `python scripts/demo_model/evaluate.py` (needs torch).

Prints how often it gives the expected answer at temperature 0, kind by kind, some of what it got wrong,
and the distance between its logits here and in `network.py`. Fails where a kind falls below its floor.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import stories
import tasks
import tools
import torch
import vocabulary as words
from corpus import chat, known_entries, render_chat, ruled_chat
from export import read_parameters
from network import Shape, initial_parameters, logits
from tasks import Turns
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).parents[2] / "jaxllm" / "demo"
Accept = Callable[[str], bool]


@dataclass(frozen=True)
class Case:
    """A prompt, whether an answer is good, and one good answer to show."""

    kind: str
    prompt: str
    accept: Accept
    example: str


# Share of good answers at temperature 0 that training aims at; set before the first result was seen.
FLOORS = {
    "known question": 0.97,
    "known question, other wording": 0.9,
    "arithmetic": 0.9,
    "held-out arithmetic": 0.8,
    "fact": 0.95,
    "follow-up": 0.95,
    "comparison": 0.9,
    "counting": 0.9,
    "list": 0.9,
    "sentiment": 0.95,
    "copy": 0.8,
    "memory": 0.9,
    "JSON": 0.9,
    "tool": 0.85,
    "system prompt": 0.9,
    "unknown": 0.9,
    "story": 0.95,
    "many turns": 0.9,
    "plain": 0.9,
}


def equals(expected: str) -> Accept:
    return lambda answer: answer.strip() == expected.strip()


def is_list(items: tuple[str, ...], count: int) -> Accept:
    def accept(answer: str) -> bool:
        lines = (
            answer.strip().replace(" and ", ", ").split(", ")
            if "\n" not in answer
            else answer.strip().split("\n")
        )
        named = [line.split(". ", 1)[-1] for line in lines]
        return len(named) == count == len(set(named)) and all(item in items for item in named)

    return accept


def same_fields(expected: str) -> Accept:
    def accept(answer: str) -> bool:
        try:
            value = json.loads(answer)
        except json.JSONDecodeError:
            return False
        wanted = json.loads(expected)
        if isinstance(wanted, list):
            return isinstance(value, list) and len(value) == len(wanted)
        return isinstance(value, dict) and (value.keys() == wanted.keys() or {"name", "age"} <= value.keys())

    return accept


def acceptable(question: str, answer: str) -> Accept:
    """What counts as good, from the question where several answers are, otherwise the answer itself."""
    for entry in known_entries():
        if answer in entry.answers:
            return lambda given: given.strip() in [known.strip() for known in entry.answers]
    if answer.startswith(("{", "[")):
        open_ended = "brand" in answer or not ("is " in question or any(map(str.isdigit, question)))
        return same_fields(answer) if open_ended or answer.startswith("[") else equals(answer)
    if "Once upon a time" in answer or "story:" in question:
        return lambda given: len(given) > 60 and given.rstrip().endswith((".", "after."))
    for category, items in words.CATEGORIES.items():
        first = answer.split("\n")[0].removeprefix("1. ").split(", ")[0].split(" and ")[0]
        if question.lower().rstrip(".?!").endswith(f" {category}") and first in items:
            return is_list(items, answer.count("\n") + 1 if "\n" in answer else answer.count(",") + 2)
    if "tiny demo model" in answer or answer.startswith(("Nice to meet", "Hello")):
        return lambda given: "tiny demo model" in given or given.startswith(("Nice to meet", "Hello"))
    return equals(answer)


def every_answer(kind: str, messages: Turns, offered: list[dict[str, Any]] | None = None) -> list[Case]:
    """A case for each turn of the assistant, given what came before."""
    cases = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = render_chat(messages[:index], offered) + "<|im_start|>assistant\n"
            whole = render_chat(messages[: index + 1], offered)
            answer = whole.removeprefix(before).removesuffix("<|im_end|>\n")
            question = next(m["content"] for m in reversed(messages[:index]) if m["role"] == "user")
            cases.append(Case(kind, before, acceptable(question, answer), answer))
    return cases


def all_cases(seed: int, each: int) -> list[Case]:
    random = Random(seed)
    cases: list[Case] = []
    for entry in known_entries():
        cases += every_answer("known question", tasks.turns(entry.questions[0], entry.answers[0]))
        for question in entry.questions[1:3]:
            typed = random.choice((question, question.lower(), question.rstrip("?.!")))
            cases += every_answer("known question, other wording", tasks.turns(typed, entry.answers[0]))
    pairs = [(a, b) for a in range(10, 100) for b in range(10, a + 1) if tasks.is_held_out(a, b, "+")]
    for a, b in random.sample(pairs, each):
        symbol = random.choice("+-")
        question, answer = f"What is {a} {symbol} {b}?", f"{a} {symbol} {b} = {tasks.compute(a, b, symbol)}."
        cases += every_answer("held-out arithmetic", tasks.turns(question, answer))
    kinds: dict[str, tasks.Task] = {
        "arithmetic": tasks.arithmetic,
        "fact": tasks.fact,
        "follow-up": tasks.follow_up,
        "comparison": tasks.comparison,
        "counting": tasks.counting,
        "list": tasks.listing,
        "sentiment": tasks.sentiment,
        "copy": tasks.copying,
        "memory": tasks.remembering,
        "JSON": tasks.json_answer,
        "unknown": tasks.unknown,
        "story": stories.telling,
        "system prompt": ruled_chat,
    }
    for kind, make in kinds.items():
        for _ in range(each):
            cases += every_answer(kind, make(random))
    for _ in range(each):
        offered, messages = tools.conversation(random)
        cases += every_answer("tool", messages, offered)
    for _ in range(each // 8):
        cases += every_answer("many turns", chat(random, most_exchanges=12))
    for beginning, endings in stories.PLAIN:
        if "{" not in "".join(endings):
            good = [ending.strip() for ending in endings]
            cases.append(Case("plain", beginning, lambda given, good=good: given.strip() in good, endings[0]))
    return cases


def answers(model: Any, tokenizer: Any, prompts: list[str], batch: int = 48) -> list[str]:
    """Greedy answers without the token that ends them; empty where none does within 160 tokens."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    result = [""] * len(prompts)
    for start in range(0, len(order), batch):
        chosen = order[start : start + batch]
        inputs = tokenizer(
            [prompts[index] for index in chosen], return_tensors="pt", padding=True, padding_side="left"
        )
        inputs.pop("token_type_ids", None)
        generated = model.generate(
            **inputs, do_sample=False, temperature=None, top_p=None, max_new_tokens=160
        )
        for index, row in zip(chosen, generated[:, inputs["input_ids"].shape[1] :], strict=True):
            ends = [
                at for at, token in enumerate(row.tolist()) if token in model.generation_config.eos_token_id
            ]
            result[index] = tokenizer.decode(row[: ends[0]]) if ends else ""
    return result


def logit_distance(model: Any, tokenizer: Any, directory: Path) -> float:
    """Largest difference between transformers' logits and those of `network.py` on a chat."""
    config = model.config
    shape = Shape(config.vocab_size)
    ids = tokenizer(render_chat(chat(Random(3), most_exchanges=8)), return_tensors="np")["input_ids"]
    positions = np.arange(ids.shape[1])[None]
    ours = logits(
        read_parameters(directory, initial_parameters(shape, 0)), shape, ids, positions, np.ones_like(ids)
    )
    with torch.no_grad():
        theirs = model(torch.from_numpy(ids)).logits.numpy()
    return float(np.abs(np.asarray(ours) - theirs).max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--each", type=int, default=60, help="cases of each kind")
    parser.add_argument("--seed", type=int, default=123456)
    parser.add_argument("--show", type=int, default=4, help="wrong answers to show of each kind")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()

    cases = all_cases(arguments.seed, arguments.each)
    good, wrong = defaultdict(list), defaultdict(list)
    for case, given in zip(cases, answers(model, tokenizer, [case.prompt for case in cases]), strict=True):
        good[case.kind].append(case.accept(given))
        if not good[case.kind][-1]:
            wrong[case.kind].append((case.prompt[-160:], given, case.example))
    failed = []
    for kind, results in good.items():
        share = sum(results) / len(results)
        below = share < FLOORS[kind]
        failed += [kind] if below else []
        print(f"{kind:32s} {share:6.1%} of {len(results):4d}   floor {FLOORS[kind]:.0%}{' BELOW' * below}")
        for prompt, given, example in wrong[kind][: arguments.show]:
            print(f"      {prompt!r}\n      gave     {given!r}\n      expected {example!r}")
    distance = logit_distance(model, tokenizer, arguments.model)
    print(f"largest logit difference to transformers: {distance:.2e} (at most 1e-4)")
    if failed or distance > 1e-4:
        sys.exit(f"below the floor: {', '.join(failed) or 'logits differ'}")


if __name__ == "__main__":
    main()

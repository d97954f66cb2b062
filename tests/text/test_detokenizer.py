"""Incremental detokenization against the tokenizer's own decode, on random ids."""

from __future__ import annotations

import re
import timeit
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from jaxllm.text.detokenizer import (
    Detokenizer,
    DetokenizerFactory,
    TableDetokenizer,
    WindowDetokenizer,
    backend_of,
)
from jaxllm.text.token_table import BYTE_OF_CHARACTER

TABLE = ["byte_level", "metaspace_always", "metaspace_first", "metaspace_never", "llama2", "gemma", "unigram"]
WINDOW = ["word_piece", "word_level", "bpe_suffix"]
Zoo = Callable[[str], PreTrainedTokenizerFast]

# Reduced modulo a little more than the vocabulary, so that ids that do not exist come up too.
ids_strategy = st.lists(st.integers(0, 10**6), max_size=40)


def in_vocabulary(tokenizer: PreTrainedTokenizerFast, raw: Sequence[int]) -> list[int]:
    return [i % (len(tokenizer) + 3) for i in raw]


def run(detokenizer: Detokenizer, ids: Sequence[int]) -> list[str]:
    return [*(detokenizer.step(i) for i in ids), detokenizer.flush()]


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], skip: bool) -> str:
    return str(tokenizer.backend_tokenizer.decode(list(ids), skip_special_tokens=skip))


def has_malformed_bytes(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], skip: bool) -> bool:
    """Whether a run of byte tokens is not UTF-8: there `decode` throws away the whole run."""
    specials = set(tokenizer.all_special_ids) if skip else set()
    run_ = bytearray()
    for i in [*ids, -1]:
        token = None if i < 0 else tokenizer.backend_tokenizer.id_to_token(i)
        if i >= 0 and (token is None or i in specials):
            continue
        match = re.fullmatch(r"<0x(..)>", token or "")
        if match:
            run_.append(int(match[1], 16))
            continue
        try:
            run_.decode()
        except UnicodeDecodeError:
            return True
        run_.clear()
    return False


@pytest.mark.parametrize("kind", TABLE + WINDOW)
def test_each_kind_takes_the_way_meant_for_it(zoo: Zoo, kind: str) -> None:
    detokenizer = DetokenizerFactory(zoo(kind)).detokenizer()
    assert type(detokenizer) is (TableDetokenizer if kind in TABLE else WindowDetokenizer)


@pytest.mark.parametrize("kind", TABLE + WINDOW)
@given(raw=ids_strategy, skip=st.booleans())
def test_random_ids_add_up_to_decode(zoo: Zoo, kind: str, raw: list[int], skip: bool) -> None:
    tokenizer = zoo(kind)
    ids = in_vocabulary(tokenizer, raw)
    pieces = run(DetokenizerFactory(tokenizer).detokenizer(skip_special_tokens=skip), ids)
    if not has_malformed_bytes(tokenizer, ids, skip):
        assert "".join(pieces) == decode(tokenizer, ids, skip)


@pytest.mark.parametrize("kind", TABLE + WINDOW)
@given(raw_prompt=ids_strategy, raw=ids_strategy, skip=st.booleans())
def test_text_is_what_follows_the_prompt(
    zoo: Zoo, kind: str, raw_prompt: list[int], raw: list[int], skip: bool
) -> None:
    tokenizer = zoo(kind)
    prompt, ids = in_vocabulary(tokenizer, raw_prompt), in_vocabulary(tokenizer, raw)
    before = decode(tokenizer, prompt, skip)
    if before.endswith("\ufffd") or has_malformed_bytes(tokenizer, prompt + ids, skip):
        return
    detokenizer = DetokenizerFactory(tokenizer).detokenizer(prompt, skip_special_tokens=skip)
    assert before + "".join(run(detokenizer, ids)) == decode(tokenizer, prompt + ids, skip)


@pytest.mark.parametrize("kind", ["llama2", "gemma", "byte_level"])
@given(
    parts=st.lists(st.text(max_size=8) | st.sampled_from(["<s>", "</s>"]), max_size=8), cut=st.integers(0, 8)
)
def test_text_with_characters_in_bytes(zoo: Zoo, kind: str, parts: list[str], cut: int) -> None:
    tokenizer = zoo(kind)
    prompt, ids = (
        [i for part in half for i in tokenizer.encode(part)] for half in (parts[:cut], parts[cut:])
    )
    for skip in (True, False):
        assert not has_malformed_bytes(tokenizer, prompt + ids, skip)
        detokenizer = DetokenizerFactory(tokenizer).detokenizer(prompt, skip_special_tokens=skip)
        text = "".join(run(detokenizer, ids))
        assert decode(tokenizer, prompt, skip) + text == decode(tokenizer, prompt + ids, skip)


@pytest.mark.parametrize("kind", ["llama2", "gemma"])
@given(data=st.binary(max_size=20), word=st.booleans())
def test_malformed_byte_tokens_keep_the_characters_that_are_whole(
    zoo: Zoo, kind: str, data: bytes, word: bool
) -> None:
    tokenizer = zoo(kind)
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in data]
    prompt = tokenizer.encode("hello", add_special_tokens=False)
    tail = tokenizer.encode(" world", add_special_tokens=False) if word else []
    tail_text = decode(tokenizer, prompt + tail, False)[len(decode(tokenizer, prompt, False)) :]
    text = "".join(run(DetokenizerFactory(tokenizer).detokenizer(prompt), [*ids, *tail]))
    assert text == data.decode(errors="replace") + tail_text


@given(text=st.text(max_size=30), cut=st.integers(0, 60))
def test_byte_level_never_shows_half_a_character(zoo: Zoo, text: str, cut: int) -> None:
    tokenizer = zoo("byte_level")
    ids = tokenizer.encode(text, add_special_tokens=False)[:cut]
    detokenizer = DetokenizerFactory(tokenizer).detokenizer()
    shown = "".join(detokenizer.step(i) for i in ids)
    assert text.startswith(shown)
    assert detokenizer.flush() in ("", "\ufffd")
    assert detokenizer.flush() == ""


def test_a_character_split_between_prompt_and_output_is_given_out_whole(zoo: Zoo) -> None:
    tokenizer = zoo("byte_level")
    by_byte = {chr_: i for chr_, i in tokenizer.get_vocab().items() if len(chr_) == 1}
    of_byte = {byte: by_byte[character] for character, byte in BYTE_OF_CHARACTER.items()}
    ids = [of_byte[byte] for byte in "a世b".encode()]
    for cut in (2, 3):
        assert run(DetokenizerFactory(tokenizer).detokenizer(ids[:cut]), ids[cut:])[-3:] == ["世", "b", ""]


def test_the_leading_space_belongs_to_a_continuation_and_not_to_a_beginning(zoo: Zoo) -> None:
    tokenizer = zoo("llama2")
    word = tokenizer.encode("world", add_special_tokens=False)
    factory = DetokenizerFactory(tokenizer)
    assert "".join(run(factory.detokenizer(), word)) == "world"
    prompt = tokenizer.encode("hello", add_special_tokens=False)
    assert "".join(run(factory.detokenizer(prompt), word)) == " world"
    # A skipped <s> is not a text that the word could continue.
    assert "".join(run(factory.detokenizer([tokenizer.bos_token_id]), word)) == "world"
    shown = factory.detokenizer([tokenizer.bos_token_id], skip_special_tokens=False)
    assert "".join(run(shown, word)) == " world"


@pytest.mark.parametrize("kind", ["word_piece", "word_level"])
def test_no_spaces_between_special_tokens_where_they_are_not_wanted(zoo: Zoo, kind: str) -> None:
    tokenizer = zoo(kind)
    ids = tokenizer.convert_tokens_to_ids(["hello", "<s>", "</s>", "world"])
    if None in ids:
        ids = [*tokenizer.encode("hello"), *tokenizer.convert_tokens_to_ids(["<s>", "</s>"]), ids[-1]]
    for spaces, expected in ((True, "<s> </s>"), (False, "<s></s>")):
        detokenizer = DetokenizerFactory(tokenizer).detokenizer(
            skip_special_tokens=False, spaces_between_special_tokens=spaces
        )
        assert expected in "".join(run(detokenizer, ids))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """ByT5's."""
    from transformers import ByT5Tokenizer

    return ByT5Tokenizer()


class TestSlowTokenizer:
    """ByT5 has no fast form; its tokens are bytes, and it drops what is not UTF-8."""

    @given(text=st.text(max_size=20), prompt=st.text(max_size=5))
    def test_text_round_trips(self, tokenizer: Any, text: str, prompt: str) -> None:
        assert backend_of(tokenizer) is None
        ids = tokenizer.encode(text, add_special_tokens=False)
        prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
        detokenizer = DetokenizerFactory(tokenizer).detokenizer(prompt_ids)
        whole = tokenizer.decode(prompt_ids + ids, skip_special_tokens=True)
        before = tokenizer.decode(prompt_ids, skip_special_tokens=True)
        assert before + "".join(run(detokenizer, ids)) == whole

    def test_special_tokens(self, tokenizer: Any) -> None:
        ids = [*tokenizer.encode("ab", add_special_tokens=False), tokenizer.eos_token_id]
        factory = DetokenizerFactory(tokenizer)
        assert "".join(run(factory.detokenizer(), ids)) == "ab"
        assert "</s>" in "".join(run(factory.detokenizer(skip_special_tokens=False), ids))


class BytesTokenizer:
    """A slow tokenizer whose ids are bytes and whose decode shows invalid ones as U+FFFD."""

    all_special_ids: list[int] = []  # noqa: RUF012

    def __init__(self) -> None:
        self.longest = 0

    def decode(self, token_ids: list[int], **_: object) -> str:
        self.longest = max(self.longest, len(token_ids))
        return bytes(token_ids).decode(errors="replace")


@given(data=st.binary(max_size=15))
def test_window_is_exact_for_any_short_run_of_bytes(data: bytes) -> None:
    detokenizer = DetokenizerFactory(BytesTokenizer()).detokenizer()
    assert "".join(run(detokenizer, data)) == data.decode(errors="replace")


def test_window_does_not_grow_with_text_that_never_becomes_valid() -> None:
    tokenizer = BytesTokenizer()
    text = "".join(run(DetokenizerFactory(tokenizer).detokenizer(), [0xFF] * 1000))
    assert text == "\ufffd" * 1000
    assert tokenizer.longest <= 40


class TestTokenTexts:
    @given(raw=ids_strategy, raw_prompt=ids_strategy)
    def test_chosen_tokens_add_up_to_the_text(self, zoo: Zoo, raw: list[int], raw_prompt: list[int]) -> None:
        for kind in TABLE:
            tokenizer = zoo(kind)
            ids = in_vocabulary(tokenizer, raw)
            # A first token that is visible and whole: the start of a text is not a continuation.
            prompt = [*in_vocabulary(tokenizer, raw_prompt), tokenizer.convert_tokens_to_ids("h")]
            factory = DetokenizerFactory(tokenizer)
            texts = factory.token_texts(prompt)
            seen = []
            for i in ids:
                seen.append(texts.text(i))
                texts.advance(i)
            detokenizer = factory.detokenizer(prompt, skip_special_tokens=False)
            assert seen == [detokenizer.step(i) for i in ids]

    def test_half_a_character_is_empty_and_its_end_is_all_of_it(self, zoo: Zoo) -> None:
        tokenizer = zoo("llama2")
        first, second, third = (tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "世".encode())
        texts = DetokenizerFactory(tokenizer).token_texts()
        assert texts.text(first) == ""
        texts.advance(first)
        assert texts.text(second) == ""
        texts.advance(second)
        assert texts.text(third) == "世"
        assert texts.text(tokenizer.convert_tokens_to_ids("h")) == "\ufffdh"

    def test_slow_tokenizers_decode_each_token_alone(self) -> None:
        texts = DetokenizerFactory(BytesTokenizer()).token_texts([1, 2])
        assert [texts.text(i) for i in (0x41, 0xE4, 0x41)] == ["A", "", "A"]


def test_a_step_costs_the_same_late_in_a_text(zoo: Zoo) -> None:
    for kind in ("byte_level", "word_piece"):
        tokenizer = zoo(kind)
        ids = tokenizer.encode("hello world this is a text", add_special_tokens=False) * 20
        detokenizer = DetokenizerFactory(tokenizer).detokenizer(ids)

        def feed(detokenizer: Detokenizer = detokenizer, ids: list[int] = ids) -> None:
            for i in ids:
                detokenizer.step(i)

        early = min(timeit.repeat(feed, number=1, repeat=5))
        timeit.timeit(feed, number=30)
        late = min(timeit.repeat(feed, number=1, repeat=5))
        assert late < 4 * early

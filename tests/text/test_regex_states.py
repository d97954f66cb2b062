"""Masks that texts share are those that each would have had, and what is not followed is left alone."""

from __future__ import annotations

import random

import numpy as np
import pytest
import regex
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jaxllm.errors import InvalidRequestError
from jaxllm.structured_outputs import StructuredOutputsParams
from jaxllm.text.grammar import GrammarCompiler, GrammarMatcher, fill_masks
from jaxllm.text.regex_states import choice_states, regex_states
from tests.text.test_grammar import EOS, VOCAB_SIZE, compiler, tokenizer

WORDS = VOCAB_SIZE // 32

ATOMS = st.sampled_from(
    [
        "a",
        "b",
        " ",
        "-",
        "ab",
        "the",
        r"\.",
        r"\d",
        r"\w",
        r"\S",
        ".",
        "[a-c]",
        "[^a-y]",
        "[^é]",
        "[b-]",
        "é",
        r"\n",
    ]
)
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=1, max_size=3).map(lambda parts: f"({'|'.join(parts)})"),
        st.tuples(inner, st.sampled_from("*+?")).map(lambda both: f"(?:{both[0]}){both[1]}"),
        st.tuples(inner, st.integers(0, 3), st.sampled_from([0, 1, None, "exact"])).map(
            lambda three: (
                f"({three[0]}){{{three[1]}}}"
                if three[2] == "exact"
                else f"({three[0]}){{{three[1]},{'' if three[2] is None else three[1] + three[2]}}}"
            )
        ),
    ),
    max_leaves=8,
)


def own_mask(one: GrammarMatcher) -> np.ndarray:
    """What llguidance says, whoever else was where it is."""
    return np.frombuffer(one.compiled.compute_bitmask(), np.int32)[:WORDS]


def allowed(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def check_walks(root: GrammarMatcher, rng: random.Random, *, sequences: int = 4, steps: int = 10) -> None:
    """Sequences that share masks, and beside each its double, which computes its own."""
    shared = [root.fork() for _ in range(sequences)]
    doubles = [root.fork() for _ in range(sequences)]
    for _ in range(steps):
        masks = np.full((sequences, WORDS), -1, np.int32)
        fill_masks([(one, row) for row, one in enumerate(shared)], masks)
        for row, (one, double) in enumerate(zip(shared, doubles, strict=True)):
            own = own_mask(double)
            np.testing.assert_array_equal(masks[row], own)
            token = rng.choice(allowed(own))
            assert (one.accept(token) is None) == (double.accept(token) is None)
            if one.is_complete or token in EOS:
                shared[row], doubles[row] = root.fork(), root.fork()


@settings(max_examples=80)
@given(pattern=PATTERNS, seed=st.integers(0, 2**32))
def test_shared_masks_are_those_of_each_alone(pattern: str, seed: int) -> None:
    try:
        root = compiler().compile(StructuredOutputsParams(regex=pattern))
    except InvalidRequestError:
        return  # Nothing matches it, or all that does is empty.
    assert root.place is not None
    check_walks(root, random.Random(seed))


@settings(max_examples=200)
@example(pattern="(?:(?:a)+b)?", text="a")  # An inner loop must not come by the way around the whole.
@example(pattern="(?:(?:a)*b)*", text="aab")
@example(pattern="((?:b)+){2,3}", text="bbbb")
@given(pattern=PATTERNS, text=st.text("ab cthe-.x1\n", max_size=8))
def test_texts_are_followed_as_far_as_they_match(pattern: str, text: str) -> None:
    """Against a matcher of whole texts that can tell the beginnings of matches."""
    oracle = regex.compile(pattern, flags=regex.VERSION0)
    state = regex_states(pattern)
    assert state is not None
    for i in range(len(text) + 1):
        partial = oracle.fullmatch(text[:i], partial=True)
        assert state.matches == (partial is not None and not partial.partial)
        if i == len(text):
            break
        following = state.after(ord(text[i]), lambda token: bytes([token]))
        if following is None:
            assert oracle.fullmatch(text[: i + 1], partial=True) is None
            break
        state = following


def test_choices_share_masks() -> None:
    choices = ["the cat", "the cow", "a cat", "a cat or two", "", "né", "12-34"]
    root = compiler().compile(StructuredOutputsParams(choice=choices))
    assert root.place is not None
    for seed in range(5):
        check_walks(root, random.Random(seed))


def test_a_mask_is_made_once_for_all_who_stand_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    root = GrammarCompiler(tokenizer(), VOCAB_SIZE, EOS).compile(
        StructuredOutputsParams(regex=r"([a-z]+, )*[a-z]+: \d+")
    )
    texts = ["cat, cow, a", "the, dog, ox", "a, b, cde, f"]
    computed: list[int] = []
    from jaxllm.text import grammar

    compute = grammar._compute
    monkeypatch.setattr(
        grammar,
        "_compute",
        lambda matchers, masks: (computed.append(len(matchers)), compute(matchers, masks)),
    )
    masks = np.full((3, WORDS), -1, np.int32)
    for text in texts:
        walkers = [root.fork() for _ in range(3)]
        for token in tokenizer().encode(text, add_special_tokens=False):
            fill_masks([(one, row) for row, one in enumerate(walkers)], masks)
            assert all(one.accept(token) is None for one in walkers)
            assert (masks == masks[0]).all()
    # At the beginning, within a word, and behind each comma by the token that wrote it.
    assert 3 <= sum(computed) <= 6


@pytest.mark.parametrize(
    "pattern",
    [
        r"(?i:the)", r"a\b", "a*?", "a++", "a**", "[^]a]", "[a[b]]", "[a&&b]", "^a", r"\pL", r"\x41",
        "[a--b]", r"\<a", "a{,3}", "(a{50}){100}", "(" * 3000 + "a" + ")" * 3000, "a)", "(a", "[a",
    ],
)  # fmt: skip
def test_what_is_not_followed(pattern: str) -> None:
    assert regex_states(pattern) is None


def test_what_is_too_long_to_follow() -> None:
    assert choice_states(["a" * 9000]) is None
    state = regex_states("(a|b)*a(a|b){15}")
    rng = random.Random(0)
    for _ in range(5000):
        if state is None:
            break  # It has more states than are kept, and says so.
        state = state.after(rng.randrange(2), lambda token: b"ab"[token : token + 1])
    assert state is None


def test_what_is_remembered_is_bounded() -> None:
    state = regex_states("[a-z]*")
    assert state is not None
    for token in range(12_000):
        following = state.after(token, lambda token: b"abc")
        assert following is state
    assert len(state._next) == 10_000
    masks = np.random.default_rng(0).integers(1, 9, (40, 4096), np.int32)
    for token, mask in enumerate(masks):
        state.keep(token, mask)
    kept = [token for token in range(len(masks)) if state.recall(token, np.empty(4096, np.int32))]
    assert kept == list(range(32))  # Half a megabyte.
    wide = choice_states([f"{i}-{i}" for i in range(100, 400)])
    assert wide is None  # More is open at the beginning than is looked through for each character.


def test_what_leaves_the_path_is_not_followed() -> None:
    state = regex_states(".*")
    assert state is not None
    assert state.after(0, lambda token: "é".encode()) is None
    assert state.after(1, lambda token: None) is None
    assert state.after(2, lambda token: b"a\n") is None
    assert state.after(3, lambda token: b"ab") is state.after(4, lambda token: b"c")

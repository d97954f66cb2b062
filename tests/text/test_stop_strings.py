"""Stop strings against a brute-force search of the text, character by character."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.text.stop_strings import StopStringMatcher

# Few letters, so that stop strings overlap themselves and each other.
words = st.text(alphabet="ab", min_size=1, max_size=5)
texts = st.lists(st.text(alphabet="abc", max_size=4), max_size=15)


def brute_force(
    deltas: list[str], searched: list[bool], stops: list[str], include: bool
) -> tuple[str, str | None]:
    """What the text should be in the end, and which stop string ended it."""
    text = ""
    for delta, search in zip(deltas, searched, strict=True):
        for character in delta:
            text += character
            if not search:
                continue
            ending = [stop for stop in stops if text.endswith(stop)]
            if ending:
                longest = max(ending, key=len)
                return (text if include else text[: -len(longest)]), longest
    return text, None


def undecided(text: str, stops: list[str]) -> int:
    """Length of the longest end of a text that begins a stop string."""
    return max(k for stop in stops for k in range(len(stop)) if text.endswith(stop[:k]))


@given(
    deltas=texts,
    stops=st.lists(words, min_size=1, max_size=4),
    include=st.booleans(),
    quiet=st.integers(0, 6),
)
def test_against_brute_force(deltas: list[str], stops: list[str], include: bool, quiet: int) -> None:
    searched = [i >= quiet for i in range(len(deltas))]
    expected, expected_stop = brute_force(deltas, searched, stops, include)
    matcher = StopStringMatcher(stops, include_in_output=include)
    shown, pushed, found = "", "", None
    for delta, search in zip(deltas, searched, strict=True):
        text, found = matcher.push(delta, search=search)
        shown, pushed = shown + text, pushed + delta
        if found is not None:
            break
        # No more is held back than has to be, and no less.
        held = 0 if include else undecided(pushed, stops)
        assert shown == pushed[: len(pushed) - held]
    else:
        shown += matcher.flush()
    assert (shown, found) == (expected, expected_stop)


@given(
    text=st.text(alphabet="abc", max_size=40),
    cuts=st.lists(st.integers(0, 40), max_size=10),
    stops=st.lists(words, min_size=1, max_size=3),
)
def test_how_the_text_is_cut_does_not_matter(text: str, cuts: list[int], stops: list[str]) -> None:
    def shown(deltas: list[str]) -> tuple[str, str | None]:
        matcher, result = StopStringMatcher(stops), ""
        for delta in deltas:
            released, found = matcher.push(delta)
            result += released
            if found is not None:
                return result, found
        return result + matcher.flush(), None

    places = sorted({0, len(text), *(cut for cut in cuts if cut <= len(text))})
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert shown(pieces) == shown([text]) == shown(list(text))


def test_the_stop_string_that_ends_first_wins() -> None:
    assert StopStringMatcher(["abc", "b"]).push("xabcd") == ("xa", "b")
    assert StopStringMatcher(["c", "abc"]).push("xabcd") == ("x", "abc")
    assert StopStringMatcher(["abc", "c"], include_in_output=True).push("xabcd") == ("xabc", "abc")


def test_unicode_and_newlines() -> None:
    matcher = StopStringMatcher(["\n\n", "世界"])
    assert matcher.push("世") == ("", None)
    assert matcher.push("世") == ("世", None)
    assert matcher.push("界!") == ("", "世界")


@pytest.mark.parametrize("stop", ["a" * 100_000 + "b", ("a" * 300 + "b") * 300 + "c"])
def test_a_hostile_stop_string_costs_no_more_than_its_length(stop: str) -> None:
    start = time.perf_counter()
    matcher = StopStringMatcher([stop])
    for _ in range(2000):
        assert matcher.push("a" * 50 if stop.count("b") == 1 else "a" * 49 + "b").stop is None
    assert time.perf_counter() - start < 5

"""Block pool and prefix cache, against oracles that keep whole token lists."""

from __future__ import annotations

from hashlib import blake2b
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.errors import ConfigError
from jaxllm.scheduling import BlockPool, IntegrityError, PageHasher, prefix_cache

TOKENS = st.lists(st.integers(0, 2), max_size=24)


def digests(tokens: list[int], page_size: int, *extra: str | int | None) -> list[bytes]:
    hasher = PageHasher(page_size, extra)
    hasher.extend(tokens)
    return hasher.digests


@given(
    first=TOKENS, second=TOKENS, page_size=st.integers(1, 5), salts=st.tuples(*[st.sampled_from("xy")] * 2)
)
def test_digests_are_equal_exactly_where_everything_before_is(
    first: list[int], second: list[int], page_size: int, salts: tuple[str, str]
) -> None:
    one, two = digests(first, page_size, salts[0]), digests(second, page_size, salts[1])
    assert len(one) == len(first) // page_size
    for i, a in enumerate(one):
        for j, b in enumerate(two):
            content = (salts[0], first[: (i + 1) * page_size]), (salts[1], second[: (j + 1) * page_size])
            assert (a == b) == (content[0] == content[1])


@given(tokens=TOKENS, page_size=st.integers(1, 5), cuts=st.lists(st.integers(0, 24)))
def test_a_growing_sequence_has_the_digests_of_the_grown_one(
    tokens: list[int], page_size: int, cuts: list[int]
) -> None:
    hasher = PageHasher(page_size)
    for cut in sorted(cuts):
        hasher.extend(tokens[:cut])
    hasher.extend(tokens)
    assert hasher.digests == digests(tokens, page_size)


def test_hashing_takes_time_in_proportion_to_the_new_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[bytes] = []

    def counting(data: bytes, *, digest_size: int) -> Any:
        calls.append(data)
        return blake2b(data, digest_size=digest_size)

    monkeypatch.setattr(prefix_cache, "blake2b", counting)
    hasher = PageHasher(4)
    tokens = list(range(4_000))
    for length in range(0, 4_001, 50):
        hasher.extend(tokens[:length])
    assert len(calls) == 1 + 1_000
    assert max(map(len, calls)) < 64


def test_extra_keys_are_told_apart() -> None:
    keys: list[tuple[str | int | None, ...]] = [
        (), (None,), ("None",), ("",), (1,), ("1",), (None, None), ("a", "b"), ("a', 'b",), ("ab",),
    ]  # fmt: skip
    assert len({digests([1], 1, *key)[0] for key in keys}) == len(keys)


def test_token_ids_of_every_size_are_told_apart() -> None:
    ids = [0, 1, 255, 256, 2**16, 2**24, 2**31 - 1]
    assert len({digests([i], 1)[0] for i in ids}) == len(ids)


class PoolOracle:
    """What the pool must do, by plain lists: free pages in the order in which they will be used."""

    def __init__(self, num_pages: int, keep_freed: bool) -> None:
        self.blank = list(range(num_pages - 1, 0, -1))
        self.cached: list[int] = []
        self.references: dict[int, int] = {}
        self.content: dict[int, bytes] = {}
        self.keep_freed = keep_freed

    def allocate(self, count: int) -> list[int]:
        pages = []
        for _ in range(count):
            if self.blank:
                pages.append(self.blank.pop())
            else:
                pages.append(self.cached.pop(0))
                del self.content[pages[-1]]
            self.references[pages[-1]] = 1
        return pages

    def free(self, pages: list[int]) -> None:
        for page in pages[::-1]:
            self.references[page] -= 1
            if not self.references[page]:
                if not self.keep_freed:
                    self.content.pop(page, None)
                (self.cached if page in self.content else self.blank).append(page)

    def find_prefix(self, wanted: list[bytes]) -> list[int]:
        found = []
        for digest in wanted:
            pages = [page for page, content in self.content.items() if content == digest]
            if not pages:
                break
            found += pages
        return found


@settings(max_examples=300)
@given(data=st.data(), num_pages=st.integers(2, 12), keep_freed=st.booleans())
def test_pool_against_oracle(data: st.DataObject, num_pages: int, keep_freed: bool) -> None:
    pool, oracle = BlockPool(num_pages, keep_freed=keep_freed), PoolOracle(num_pages, keep_freed)
    contents = digests([0, 1, 0, 0, 1, 1, 0], 1)
    owners: list[list[int]] = []
    for _ in range(data.draw(st.integers(1, 30))):
        action = data.draw(st.sampled_from(["allocate", "hit", "free", "register", "reset"]))
        if action == "allocate":
            count = data.draw(st.integers(1, num_pages))
            if count > pool.num_free_pages:
                with pytest.raises(IntegrityError, match="free"):
                    pool.allocate(count)
            else:
                owners.append(pool.allocate(count))
                assert owners[-1] == oracle.allocate(count)
        elif action == "hit":
            wanted = contents[: data.draw(st.integers(0, len(contents)))]
            found = pool.find_prefix(wanted)
            assert found == oracle.find_prefix(wanted)
            assert pool.count_unowned(found) == sum(not oracle.references.get(p) for p in found)
            pool.share(found)
            for page in found:
                oracle.references[page] = oracle.references.get(page, 0) + 1
                if page in oracle.cached:
                    oracle.cached.remove(page)
            owners.append(found)
        elif action == "free" and owners:
            pages = owners.pop(data.draw(st.integers(0, len(owners) - 1)))
            pool.free(pages)
            oracle.free(pages)
        elif action == "register" and any(owners):
            page = data.draw(st.sampled_from([page for pages in owners for page in pages]))
            digest = data.draw(st.sampled_from(contents))
            pool.register(page, digest)
            if page not in oracle.content and digest not in oracle.content.values():
                oracle.content[page] = digest
        elif action == "reset":
            assert pool.reset() == (not any(owners))
            if not any(owners):
                oracle.blank += oracle.cached
                oracle.cached, oracle.content = [], {}
        assert pool.num_free_pages == len(oracle.blank) + len(oracle.cached)
        pool.check_integrity(owners)


def test_the_null_page_is_never_handed_out() -> None:
    pool = BlockPool(5)
    assert sorted(pool.allocate(4)) == [1, 2, 3, 4]
    assert pool.num_free_pages == 0


def test_a_pool_without_pages_is_refused() -> None:
    with pytest.raises(ConfigError, match="num_pages is 1"):
        BlockPool(1)


def test_freeing_or_registering_what_nobody_owns_is_an_error() -> None:
    pool = BlockPool(3)
    [page] = pool.allocate(1)
    pool.free([page])
    with pytest.raises(IntegrityError, match="nobody owns"):
        pool.free([page])
    with pytest.raises(IntegrityError, match="nobody owns"):
        pool.register(page, b"digest")


def test_integrity_check_wants_the_owners_to_agree() -> None:
    pool = BlockPool(4)
    pages = pool.allocate(2)
    pool.check_integrity([pages])
    for claims in ([], [pages[:1]], [pages, pages[:1]], [[*pages, 0]], [[*pages, 3]]):
        with pytest.raises(IntegrityError):
            pool.check_integrity(claims)

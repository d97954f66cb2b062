"""Names for the content of full pages: chained digests, computed once per page of a request."""

from __future__ import annotations

from array import array
from hashlib import blake2b
from itertools import islice

_DIGEST_BYTES = 32
"""256 bits: finding two contents with one digest takes 2**128 attempts, even on purpose."""


class PageHasher:
    """Digests of the full pages of one token sequence, extended as the sequence grows.

    A page's digest covers its own token ids and the digest of the page before it, hence everything
    that its keys and values depend on: all tokens up to its end, and `extra_keys`.

    Args:
        page_size: tokens a page holds.
        extra_keys: what else sets the content apart, such as a cache salt. Sequences share pages
            only where these are equal.

    Attributes:
        digests: one per full page seen so far, in order of position.
    """

    __slots__ = ("_page_size", "_root", "digests")

    def __init__(self, page_size: int, extra_keys: tuple[str | int | None, ...] = ()) -> None:
        self._page_size = page_size
        # `repr` of a tuple of strings, integers and None is different for different tuples.
        self._root = blake2b(repr(extra_keys).encode(), digest_size=_DIGEST_BYTES).digest()
        self.digests: list[bytes] = []

    def extend(self, token_ids: list[int]) -> None:
        """Digest the pages that `token_ids`, the whole sequence, fills and that are not digested yet.

        Takes time in proportion to the new tokens.
        """
        size, digests = self._page_size, self.digests
        start, stop = len(digests) * size, len(token_ids) // size * size
        if start >= stop:
            return
        # Four bytes an id: token ids fit, and equal ids give equal bytes.
        page_bytes = 4 * size
        data = array("i", islice(token_ids, start, stop)).tobytes()
        parent = digests[-1] if digests else self._root
        for offset in range(0, len(data), page_bytes):
            parent = blake2b(parent + data[offset : offset + page_bytes], digest_size=_DIGEST_BYTES).digest()
            digests.append(parent)

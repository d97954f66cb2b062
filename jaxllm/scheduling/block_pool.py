"""Who holds which page of the KV cache, and which pages hold content that can be found again."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from enum import IntEnum

from jaxllm.errors import ConfigError

NULL_PAGE = 0
"""The page that padding writes to. It belongs to nobody and is never handed out."""


class PageState(IntEnum):
    """What has become of a page; shared is owned more than once."""

    BLANK = 0
    CACHED = 1
    OWNED = 2
    SHARED = 3


class IntegrityError(RuntimeError):
    """The scheduler's own accounts contradict each other: a bug in it, never a user's mistake."""


class BlockPool:
    """Reference counts, free pages and the table of findable content of one paged KV cache.

    A page is in one of three states: owned (its reference count is above zero), cached (nobody owns
    it, but its content can be found by digest and it keeps it until the page is needed) or blank.
    Blank pages are handed out first, then cached ones, the least recently used first.

    Args:
        num_pages: pages in the cache, the null page included.
        keep_freed: whether content stays findable once nobody owns its page.

    Raises:
        ConfigError: fewer than two pages, so that none could be handed out.
    """

    def __init__(self, num_pages: int, *, keep_freed: bool = True) -> None:
        if num_pages < 2:
            raise ConfigError(
                f"num_pages is {num_pages}; at least 2 are needed, as page {NULL_PAGE} is never handed "
                "out. Give the KV cache more memory.",
                param="num_pages",
            )
        self.num_pages = num_pages
        self._keep_freed = keep_freed
        self._references = [0] * num_pages
        self._digests: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._blank = list(range(num_pages - 1, NULL_PAGE, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        # Pages whose state may have changed; None while nobody watches, so that nothing is spent on it.
        self._touched: set[int] | None = None

    @property
    def num_usable_pages(self) -> int:
        """Pages that can be handed out at all."""
        return self.num_pages - 1

    @property
    def num_free_pages(self) -> int:
        """Pages that nobody owns, blank or cached."""
        return len(self._blank) + len(self._cached)

    def allocate(self, count: int) -> list[int]:
        """Hand out `count` pages with one reference each, forgetting cached content where needed.

        Raises:
            IntegrityError: fewer pages are free; the caller has to look first.
        """
        if count > self.num_free_pages:
            raise IntegrityError(f"{count} pages asked for, {self.num_free_pages} are free")
        pages = []
        for _ in range(count):
            page = self._blank.pop() if self._blank else self._evict()
            self._references[page] = 1
            pages.append(page)
        if self._touched is not None:
            self._touched.update(pages)
        return pages

    def _evict(self) -> int:
        page, _ = self._cached.popitem(last=False)
        self._forget(page)
        return page

    def _forget(self, page: int) -> None:
        digest = self._digests[page]
        if digest is not None:
            del self._page_of[digest]
            self._digests[page] = None

    def share(self, pages: Sequence[int]) -> None:
        """Add one reference to each of `pages`, which were found by `find_prefix`."""
        if self._touched is not None:
            self._touched.update(pages)
        for page in pages:
            if self._references[page] == 0:
                del self._cached[page]
            self._references[page] += 1

    def free(self, pages: Sequence[int]) -> None:
        """Drop one reference to each of `pages`, given in order of position.

        The last page is let go first, so that the tail of a prefix is evicted before its head.
        """
        if self._touched is not None:
            self._touched.update(pages)
        for page in reversed(pages):
            if self._references[page] <= 0:
                raise IntegrityError(f"page {page} is freed, but nobody owns it")
            self._references[page] -= 1
            if self._references[page] == 0:
                if not self._keep_freed:
                    self._forget(page)
                if self._digests[page] is None:
                    self._blank.append(page)
                else:
                    self._cached[page] = None

    def register(self, page: int, digest: bytes) -> None:
        """Make the content of an owned page findable.

        Where another page holds the same content already, that one stays the one that is found.
        """
        if self._references[page] <= 0:
            raise IntegrityError(f"page {page} is registered, but nobody owns it")
        if digest not in self._page_of and self._digests[page] is None:
            self._page_of[digest] = page
            self._digests[page] = digest

    def find_prefix(self, digests: Iterable[bytes]) -> list[int]:
        """Pages of the longest run of `digests`, from the first, whose content is in the cache."""
        page_of = self._page_of
        pages = []
        for digest in digests:
            page = page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        return pages

    def count_unowned(self, pages: Iterable[int]) -> int:
        """How many of `pages` count as free now, and would no longer if they were shared."""
        references = self._references
        return sum(1 for page in pages if references[page] == 0)

    def reset(self) -> bool:
        """Forget all content. Does nothing and returns False while any page is owned."""
        if self.num_free_pages != self.num_usable_pages:
            return False
        if self._touched is not None:
            self._touched.update(self._cached)
        while self._cached:
            self._blank.append(self._evict())
        return True

    def watch(self, on: bool) -> None:
        """Keep, or keep no longer, a note of the pages whose state changes."""
        self._touched = set() if on else None

    def take_changes(self) -> tuple[array[int], bytes]:
        """The pages that changed since they were last taken, in no order, and the `PageState` of each.

        Takes time in proportion to them. They are none where nobody watches.
        """
        touched, references, digests = self._touched, self._references, self._digests
        if not touched:
            return array("I"), b""
        pages = array("I", touched)
        touched.clear()
        # A page without references is cached (1) where it has a digest, and blank (0) where it has none.
        states = bytes(
            [
                3 if references[page] > 1 else 2 if references[page] else digests[page] is not None
                for page in pages
            ]
        )
        return pages, states

    def states(self) -> bytes:
        """The `PageState` of every page. Takes time in proportion to the whole cache."""
        states = bytearray(self.num_pages)
        for page in self._cached:
            states[page] = PageState.CACHED
        for page, count in enumerate(self._references):
            if count:
                states[page] = PageState.OWNED if count == 1 else PageState.SHARED
        return bytes(states)

    def check_integrity(self, owned: Iterable[Sequence[int]]) -> None:
        """Compare the accounts with what the owners say.

        Args:
            owned: the pages of each owner.

        Raises:
            IntegrityError: saying which page is wrong and how.
        """
        claims = Counter(page for pages in owned for page in pages)
        blank, cached = set(self._blank), set(self._cached)
        if len(blank) != len(self._blank):
            raise IntegrityError("a page is twice in the list of blank pages")
        for page in range(self.num_pages):
            count, digest = self._references[page], self._digests[page]
            where = (page in blank) + (page in cached) + (count > 0)
            if page == NULL_PAGE:
                if where or digest is not None or claims[page]:
                    raise IntegrityError(f"the null page {page} is in use")
            elif where != 1:
                raise IntegrityError(
                    f"page {page} must be blank, cached or owned; it is "
                    f"blank={page in blank}, cached={page in cached}, references={count}"
                )
            elif count != claims[page]:
                raise IntegrityError(f"page {page} has {count} references, {claims[page]} owners claim it")
            elif (page in blank and digest is not None) or (page in cached and digest is None):
                raise IntegrityError(f"page {page} is blank={page in blank}, but its digest is {digest!r}")
            if digest is not None and self._page_of.get(digest) != page:
                raise IntegrityError(f"page {page} cannot be found by its own digest")
        if len(self._page_of) != sum(digest is not None for digest in self._digests):
            raise IntegrityError("the table finds pages that hold no content")

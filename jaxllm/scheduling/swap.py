"""Pages of preempted sequences in the host's memory, and the copies that bring them there and back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from jaxllm.scheduling.block_pool import IntegrityError
from jaxllm.scheduling.plan import Copies
from jaxllm.scheduling.sequence import ScheduledSequence


class SwapSpace:
    """Who holds which page of the host's memory; it holds each page once, and shares none.

    A plan's copies out are made before its copies in, and both before its step: so a page of the device
    may be handed out again as soon as it is to be copied out, and one of the host as soon as it is to be
    copied back.

    Args:
        num_pages: of the host's memory, of the size of the device's; 0 is no swapping.

    Attributes:
        num_kept: times that a sequence's pages were copied out rather than lost, so far.
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        self.num_kept = 0
        self._free = list(range(num_pages - 1, -1, -1))
        self._copies_out: list[tuple[int, int]] = []
        self._copies_in: list[tuple[int, int]] = []

    def has_room_for(self, sequence: ScheduledSequence) -> bool:
        """Whether all pages of a running sequence could be copied out."""
        return 0 < len(sequence.request.pages) <= len(self._free)

    def keep(self, sequence: ScheduledSequence) -> None:
        """Have the pages of a sequence that is about to lose them copied out."""
        request = sequence.request
        sequence.host_pages = [self._free.pop() for _ in request.pages]
        sequence.num_kept_tokens = request.num_computed_tokens
        self._copies_out += zip(request.pages, sequence.host_pages, strict=True)
        self.num_kept += 1

    def restore(self, sequence: ScheduledSequence, num_found: int) -> None:
        """Have kept pages copied into those that the sequence holds now, but for the first `num_found`."""
        kept = sequence.host_pages[num_found:]
        self._copies_in += zip(kept, sequence.request.pages[num_found:], strict=False)
        self.drop(sequence)

    def drop(self, sequence: ScheduledSequence) -> None:
        """Let go of what is kept of a sequence."""
        self._free += sequence.host_pages
        sequence.host_pages = []
        sequence.num_kept_tokens = 0

    def take_copies(self) -> tuple[Copies, Copies]:
        """The copies (out, in) for the next plan to make."""
        copies = tuple(self._copies_out), tuple(self._copies_in)
        self._copies_out, self._copies_in = [], []
        return copies

    def check_integrity(
        self, running: Iterable[ScheduledSequence], waiting: Iterable[ScheduledSequence], page_size: int
    ) -> None:
        """Check that every page is free or kept for one sequence that waits, and none is lost.

        Raises:
            IntegrityError: saying what is wrong.
        """
        counts = Counter(self._free)
        for sequence in running:
            if sequence.host_pages or sequence.num_kept_tokens:
                raise IntegrityError(f"{sequence.request.request_id!r} runs, and keeps pages on the host")
        for sequence in waiting:
            counts.update(sequence.host_pages)
            if -(-sequence.num_kept_tokens // page_size) != len(sequence.host_pages):
                raise IntegrityError(
                    f"{sequence.request.request_id!r} keeps {len(sequence.host_pages)} pages on the host for "
                    f"{sequence.num_kept_tokens} tokens"
                )
        wrong = [page for page in range(self.num_pages) if counts[page] != 1]
        if wrong or len(counts) != self.num_pages:
            raise IntegrityError(f"pages {wrong} of the host are free or kept not once, or there are others")

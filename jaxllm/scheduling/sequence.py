"""The scheduler's own notes on the requests that it has, and the queue of those that wait."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from heapq import heapify, heappop, heappush

from jaxllm.config import SchedulerConfig
from jaxllm.request import Request
from jaxllm.scheduling.block_pool import BlockPool
from jaxllm.scheduling.plan import TokenLogprobs
from jaxllm.scheduling.prefix_cache import PageHasher
from jaxllm.scheduling.stops import StopChecker
from jaxllm.scheduling.views import RequestView


def ceil_div(numerator: int, denominator: int) -> int:
    """Quotient rounded up."""
    return -(-numerator // denominator)


def hasher_of(request: Request, config: SchedulerConfig) -> PageHasher | None:
    """Names the pages of a request; None where nobody may share them."""
    # Without prefix caching, the sequences of one user request still share its prompt.
    group = None if config.enable_prefix_caching else request.group_id
    if not config.enable_prefix_caching and group is None:
        return None
    return PageHasher(config.page_size, (request.cache_salt, group))


def may_read_cache(request: Request) -> bool:
    """Whether a request may take pages that are computed already."""
    params = request.sampling_params
    return params.prompt_logprobs is None and not params.skip_reading_prefix_cache


class ScheduledSequence:
    """What the scheduler keeps beside one unfinished request.

    Args:
        request: the request.
        find_prefix: counts the tokens of a sequence that the prefix cache holds.
        page_size: tokens a KV page holds.
        order: counts up over the requests that were added.
        max_length: prompt and output tokens at which the request ends.
        hasher: names its pages, or None where its pages are not shared.
        reads_cache: whether it may take pages that are computed already.
        overlaps: whether it may be scheduled while its newest token is still in flight.

    Attributes:
        view: the request as the policy sees it.
        key: place in the order of service: the policy's rank, then `order`.
        num_registered_pages: how many of the request's pages, from the first, were made findable.
        next_prompt_logprob: first prompt position whose logprobs were not delivered yet.
        num_holds: plans in which it was held back for a page that somebody else computes, since it
            last found more pages than `num_held_pages`.
        host_pages: pages of the host's memory that keep what it had computed while it waits again.
        num_kept_tokens: positions that they keep.
        ready_at: id of the first plan that may compute its newest token, if that is still in flight.
        finished: whether the request has ended, here or by its user.
    """

    __slots__ = (
        "finished",
        "hasher",
        "host_pages",
        "key",
        "max_length",
        "next_prompt_logprob",
        "num_held_pages",
        "num_holds",
        "num_kept_tokens",
        "num_registered_pages",
        "order",
        "overlaps",
        "page_size",
        "reads_cache",
        "ready_at",
        "request",
        "stops",
        "view",
    )

    def __init__(
        self,
        request: Request,
        *,
        find_prefix: Callable[[ScheduledSequence], int],
        page_size: int,
        order: int,
        max_length: int,
        hasher: PageHasher | None,
        reads_cache: bool,
        overlaps: bool,
    ) -> None:
        self.request = request
        self.page_size = page_size
        self.order = order
        self.max_length = max_length
        self.hasher = hasher
        self.reads_cache = reads_cache
        self.overlaps = overlaps
        self.view = RequestView(request, functools.partial(find_prefix, self))
        self.stops = StopChecker(request, max_length)
        self.key: tuple[tuple[float, ...], int] = ((), order)
        self.num_registered_pages = 0
        self.next_prompt_logprob = 1
        self.num_held_pages = 0
        self.num_holds = 0
        self.host_pages: list[int] = []
        self.num_kept_tokens = 0
        self.ready_at = 0
        self.finished = False

    def num_tokens_to_compute(self, step_id: int) -> int:
        """Tokens that exist and are neither computed nor scheduled, as far as the plan of that id may."""
        request = self.request
        num_pending = request.num_pending_tokens
        num_tokens = len(request.token_ids) + num_pending
        if num_tokens >= self.max_length or (
            num_pending and not (self.overlaps and self.ready_at <= step_id)
        ):
            return 0
        return num_tokens - request.num_computed_tokens

    def wanted_digests(self) -> list[bytes]:
        """Digests of the pages that it may take from the prefix cache while it waits.

        Its last token is computed in any case, for the logits that follow it.
        """
        if self.hasher is None:
            return []
        self.hasher.extend(self.request.token_ids)
        if not self.reads_cache:
            return []
        return self.hasher.digests[: (len(self.request.token_ids) - 1) // self.page_size]

    def known_digests(self, start: int, end: int) -> list[bytes]:
        """Digests of the pages with positions from `start` to before `end` whose tokens the host knows."""
        if self.hasher is None:
            return []
        return self.hasher.digests[start // self.page_size : ceil_div(end, self.page_size)]

    def awaits_page(self, missing: list[bytes], num_found: int, computing: set[bytes]) -> bool:
        """Whether the first page that it did not find is about to be there.

        A page takes at most as many plans as it has tokens; then the sequence computes it itself.
        """
        if not missing or missing[0] not in computing:
            return False
        if num_found > self.num_held_pages:
            self.num_held_pages, self.num_holds = num_found, 0
        self.num_holds += 1
        return self.num_holds <= self.page_size

    def register_pages(self, pool: BlockPool) -> None:
        """Let later plans find the full pages whose tokens the host knows."""
        if self.hasher is None:
            return
        request = self.request
        num_known = min(request.num_computed_tokens, len(request.token_ids))
        first, last = self.num_registered_pages, num_known // self.page_size
        if first >= last:
            return
        self.hasher.extend(request.token_ids)
        for index in range(first, last):
            pool.register(request.pages[index], self.hasher.digests[index])
        self.num_registered_pages = last

    def new_prompt_logprobs(
        self, start: int, logprobs: list[TokenLogprobs] | None
    ) -> list[TokenLogprobs] | None:
        """Those of `logprobs`, for positions from `start + 1`, that were not delivered before.

        A request that is preempted computes some of them twice.
        """
        if not logprobs:
            return None
        first = start + 1
        new = logprobs[max(self.next_prompt_logprob - first, 0) :]
        self.next_prompt_logprob = max(self.next_prompt_logprob, first + len(logprobs))
        return new or None


class WaitingQueue:
    """Waiting sequences, in order of `key`. A finished one is dropped when it is come across."""

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[tuple[float, ...], int], ScheduledSequence]] = []
        self._num_finished = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_finished

    def __iter__(self) -> Iterator[ScheduledSequence]:
        """The sequences in order; takes the time to sort them."""
        return iter([entry[1] for entry in sorted(self._heap) if not entry[1].finished])

    def push(self, sequence: ScheduledSequence) -> None:
        """Put a sequence in at its place."""
        heappush(self._heap, (sequence.key, sequence))

    def pop(self) -> ScheduledSequence | None:
        """Take out the first sequence; None where nobody waits."""
        while self._heap:
            sequence = heappop(self._heap)[1]
            if not sequence.finished:
                return sequence
            self._num_finished -= 1
        return None

    def discard_finished(self) -> None:
        """Say that one sequence in the queue has just finished."""
        self._num_finished += 1
        if self._num_finished > len(self._heap) // 2:
            self.rebuild(entry[1] for entry in self._heap if not entry[1].finished)

    def rebuild(self, sequences: Iterable[ScheduledSequence]) -> None:
        """Hold these sequences and no others, whose keys may have changed."""
        self._heap = [(sequence.key, sequence) for sequence in sequences]
        heapify(self._heap)
        self._num_finished = 0

"""Several schedulers behind the face of one: each has its own requests and pages, and a step is of all."""

from __future__ import annotations

import copy
from array import array
from collections import deque
from collections.abc import Sequence
from itertools import chain

from jaxllm.config import SchedulerConfig
from jaxllm.errors import ConfigError
from jaxllm.request import Request, RequestStatus
from jaxllm.scheduling.block_pool import BlockPool
from jaxllm.scheduling.plan import Copies, Plan, RequestUpdate, StepResult
from jaxllm.scheduling.policies import load_policy
from jaxllm.scheduling.policy import SchedulingPolicy
from jaxllm.scheduling.prefix_cache import PageHasher
from jaxllm.scheduling.scheduler import Scheduler
from jaxllm.scheduling.sequence import hasher_of, may_read_cache


class ReplicatedScheduler:
    """A `Scheduler` for each replica of a model; what it has of one's methods means the same.

    A request is given to a replica when it comes, and stays there: its pages are there. It goes to where
    the tokens of the unfinished requests, and those of its own prompt that the replica has not cached,
    are fewest in sum. Both are counted in tokens, so one bound holds: a cached prefix draws requests to
    its replica for as long as that saves more than the replica is ahead of the others, and no longer,
    so that a system prompt which all share spreads over all replicas under load. Tokens of unfinished
    requests are the pages that these hold or are about to ask for: the fewest of them are the most free
    pages. Equal replicas take turns, so that all caches fill. The n sequences of one user's request stay
    together, for they share its prompt.

    A step of the devices is one step of every replica: `schedule` plans all of them, and its plan has
    their plans as `parts`. A replica without work has none, and its devices compute padding.

    Not thread-safe: one thread calls everything.

    Args:
        config: the limits of each replica, and how many replicas there are.
        policy: the order of service; each replica has a copy, which sees the requests of that replica.

    Raises:
        ConfigError: the limits contradict each other, or there is no such policy.
    """

    def __init__(self, config: SchedulerConfig, policy: SchedulingPolicy | None = None) -> None:
        if config.data_parallel_size < 1:
            raise ConfigError(
                f"data_parallel_size is {config.data_parallel_size}; it must be at least 1.",
                param="data_parallel_size",
            )
        self.config = config
        policy = policy if policy is not None else load_policy(config.policy)
        count = config.data_parallel_size
        self.replicas = [Scheduler(config, copy.deepcopy(policy)) for _ in range(count)]
        self.pool = ReplicatedPool([replica.pool for replica in self.replicas])
        self.num_tokens = [0] * count
        """Of each replica: tokens of its unfinished requests, as far as the host knows them."""
        self._replica_of: dict[str, int] = {}
        self._newest_group: tuple[str | None, int] = (None, 0)
        self._last_chosen = [0] * count
        self._in_flight: deque[Plan] = deque()
        self._next_step_id = 0

    # What there is

    @property
    def waiting(self) -> list[Request]:
        """Requests that hold no pages, replica by replica, in order of service."""
        return [request for replica in self.replicas for request in replica.waiting]

    @property
    def running(self) -> list[Request]:
        """Requests that hold pages, replica by replica, in order of service."""
        return [request for replica in self.replicas for request in replica.running]

    @property
    def num_waiting(self) -> int:
        """How many requests wait."""
        return sum(replica.num_waiting for replica in self.replicas)

    @property
    def num_running(self) -> int:
        """How many requests run."""
        return sum(replica.num_running for replica in self.replicas)

    @property
    def num_free_pages(self) -> int:
        """Pages that could be handed out now."""
        return self.pool.num_free_pages

    @property
    def kv_cache_usage(self) -> float:
        """Fraction of the pages that requests hold, 0 to 1."""
        return 1.0 - self.pool.num_free_pages / self.pool.num_usable_pages

    @property
    def num_swaps(self) -> int:
        """Times that a preempted request was kept in the host's memory, so far."""
        return sum(replica.num_swaps for replica in self.replicas)

    @property
    def num_preemptions(self) -> int:
        """Times that a request lost its pages, so far."""
        return sum(replica.num_preemptions for replica in self.replicas)

    @property
    def prefix_cache_queries(self) -> int:
        """Tokens of the requests that were looked up in the prefix cache, so far."""
        return sum(replica.prefix_cache_queries for replica in self.replicas)

    @property
    def prefix_cache_hits(self) -> int:
        """Tokens of them that were found, so far."""
        return sum(replica.prefix_cache_hits for replica in self.replicas)

    def has_unfinished(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._replica_of)

    def replica_of(self, request: Request) -> int | None:
        """The replica of an unfinished request."""
        return self._replica_of.get(request.request_id)

    # Requests come and go

    def add(self, request: Request) -> None:
        """Queue a request at the replica that serves it best; see the class.

        Raises:
            InvalidRequestError: its id is taken, its prompt is empty or too long, or it needs more
                pages than a replica has.
        """
        hasher = hasher_of(request, self.config)
        taken = self._replica_of.get(request.request_id)
        # An id that is taken is refused where it was given.
        chosen = self._choose(request, hasher) if taken is None else taken
        self.replicas[chosen].add(request, hasher)
        self._replica_of[request.request_id] = chosen
        self._newest_group = (request.group_id, chosen)
        self._last_chosen[chosen] = max(self._last_chosen) + 1
        self.num_tokens[chosen] += len(request.token_ids)

    def _choose(self, request: Request, hasher: PageHasher | None) -> int:
        group, replica_of_group = self._newest_group
        if request.group_id is not None and request.group_id == group:
            return replica_of_group
        digests: list[bytes] = []
        if hasher is not None and may_read_cache(request):
            hasher.extend(request.token_ids)
            digests = hasher.digests[: (len(request.token_ids) - 1) // self.config.page_size]

        def burden(replica: int) -> tuple[int, int]:
            num_cached = len(self.pool.pools[replica].find_prefix(digests)) * self.config.page_size
            return self.num_tokens[replica] - num_cached, self._last_chosen[replica]

        return min(range(len(self.replicas)), key=burden)

    def finish(self, request: Request, status: RequestStatus, stop_reason: int | str | None = None) -> None:
        """End a request from outside; see `Scheduler.finish`."""
        replica = self._replica_of.get(request.request_id, 0)
        had_ended = request.status.is_finished
        self.replicas[replica].finish(request, status, stop_reason)
        if not had_ended:
            self._forget(request)

    def _forget(self, request: Request) -> None:
        self.num_tokens[self._replica_of.pop(request.request_id)] -= len(request.token_ids)

    # Steps

    def schedule(self) -> Plan | None:
        """The next step's work, or None where no replica can compute anything before a plan is applied."""
        parts = tuple(replica.schedule() for replica in self.replicas)
        plans = [plan for plan in parts if plan is not None]
        if not plans:
            return None
        plan = Plan(
            step_id=self._next_step_id,
            scheduled=tuple(chain.from_iterable(plan.scheduled for plan in plans)),
            released=tuple(chain.from_iterable(plan.released for plan in plans)),
            num_tokens=sum(plan.num_tokens for plan in plans),
            copies_out=self._copies([() if plan is None else plan.copies_out for plan in parts], False),
            copies_in=self._copies([() if plan is None else plan.copies_in for plan in parts], True),
            parts=parts,
        )
        self._next_step_id += 1
        for replica, part in zip(self.replicas, parts, strict=True):
            if part is None:
                replica.skip_step()
        self._in_flight.append(plan)
        return plan

    def _copies(self, by_replica: Sequence[Copies], from_host: bool) -> Copies:
        """Copies of all replicas, with the pages of the device and of the host counted through them."""
        steps = (self.config.num_pages, self.config.num_host_pages)
        source, target = reversed(steps) if from_host else steps
        return tuple(
            (replica * source + page, replica * target + to)
            for replica, copies in enumerate(by_replica)
            for page, to in copies
        )

    def apply(self, plan: Plan, result: StepResult) -> list[RequestUpdate]:
        """Append what a step sampled, and end the requests that are done; see `Scheduler.apply`."""
        if not self._in_flight or self._in_flight[0] is not plan:
            raise ValueError(f"plan {plan.step_id} is not the oldest outstanding one")
        self._in_flight.popleft()
        updates: list[RequestUpdate] = []
        first = 0
        for index, part in enumerate(plan.parts):
            if part is None:
                continue
            last = first + len(part.scheduled)
            new = self.replicas[index].apply(part, _rows(result, first, last))
            first = last
            self.num_tokens[index] += sum([len(update.new_token_ids) for update in new])
            for update in new:
                # One comparison for nearly all of them.
                if update.request.status is not RequestStatus.RUNNING and update.request.status.is_finished:
                    self._forget(update.request)
            updates += new
        return updates

    # Housekeeping

    def reset_prefix_cache(self) -> bool:
        """Forget all cached content; False, and nothing happens, while any request holds pages."""
        if self.pool.num_free_pages != self.pool.num_usable_pages:
            return False
        for replica in self.replicas:
            replica.reset_prefix_cache()
        return True

    def check_integrity(self) -> None:
        """Check every account of every replica; see `Scheduler.check_integrity`."""
        for replica in self.replicas:
            replica.check_integrity()


class ReplicatedPool:
    """The pages of all replicas as if they were of one cache: those of a replica follow the one's before.

    Every replica has a null page, which is never handed out.
    """

    def __init__(self, pools: Sequence[BlockPool]) -> None:
        self.pools = list(pools)

    @property
    def num_pages(self) -> int:
        """Pages, those that are never handed out among them."""
        return sum(pool.num_pages for pool in self.pools)

    @property
    def num_usable_pages(self) -> int:
        """Pages that can be handed out at all."""
        return sum(pool.num_usable_pages for pool in self.pools)

    @property
    def num_free_pages(self) -> int:
        """Pages that nobody owns, blank or cached."""
        return sum(pool.num_free_pages for pool in self.pools)

    def watch(self, on: bool) -> None:
        """Keep, or keep no longer, a note of the pages whose state changes."""
        for pool in self.pools:
            pool.watch(on)

    def take_changes(self) -> tuple[array[int], bytes]:
        """See `BlockPool.take_changes`."""
        pages, states, first = array("I"), b"", 0
        for pool in self.pools:
            changed, new = pool.take_changes()
            pages.extend(first + page for page in changed)
            states += new
            first += pool.num_pages
        return pages, states

    def states(self) -> bytes:
        """The `PageState` of every page."""
        return b"".join(pool.states() for pool in self.pools)


def _rows(result: StepResult, first: int, last: int) -> StepResult:
    """The rows of one replica, from `first` to before `last`, counted from 0."""
    return StepResult(
        result.token_ids[first:last],
        result.logprobs[first:last],
        {row - first: entry for row, entry in result.prompt_logprobs.items() if first <= row < last},
        {row - first: entry for row, entry in result.pooled.items() if first <= row < last},
    )


def place_of(scheduler: Scheduler | ReplicatedScheduler, request: Request) -> int:
    """The replica of an unfinished request; 0 where there is one."""
    place = scheduler.replica_of(request) if isinstance(scheduler, ReplicatedScheduler) else 0
    assert place is not None
    return place


def make_scheduler(
    config: SchedulerConfig, policy: SchedulingPolicy | None = None
) -> Scheduler | ReplicatedScheduler:
    """A scheduler, or where there are several replicas one for each."""
    kind = Scheduler if config.data_parallel_size == 1 else ReplicatedScheduler
    return kind(config, policy)

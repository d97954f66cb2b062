"""Decides what each step computes, and keeps the accounts of requests and pages."""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Sequence
from operator import attrgetter

from jaxllm.config import SchedulerConfig
from jaxllm.request import Request, RequestStatus
from jaxllm.scheduling.block_pool import BlockPool
from jaxllm.scheduling.checks import (
    check_config,
    check_places,
    check_progress,
    check_request,
    check_result,
)
from jaxllm.scheduling.draft import Draft
from jaxllm.scheduling.guard import PolicyGuard
from jaxllm.scheduling.plan import Plan, RequestUpdate, ScheduledRequest, StepResult
from jaxllm.scheduling.policies import load_policy
from jaxllm.scheduling.policy import SchedulingPolicy
from jaxllm.scheduling.prefix_cache import PageHasher
from jaxllm.scheduling.sequence import (
    ScheduledSequence,
    WaitingQueue,
    ceil_div,
    hasher_of,
    may_read_cache,
)
from jaxllm.scheduling.swap import SwapSpace
from jaxllm.scheduling.views import RequestView, StepView

_by_key = attrgetter("key")
_NO_TOKEN = "no token satisfies all of min_tokens, allowed_token_ids, bad_words and stop_token_ids."


class Scheduler:
    """Continuous batching with one token budget per step and no phases.

    Each request catches up from `num_computed_tokens` to `num_tokens`: chunks of a prompt, a prefix
    found in the cache, a decoded token and a preempted request are all that same case. Running
    requests are served first, then waiting ones, in the order of the policy's ranks. Where pages run
    out, the policy picks a running request that loses its pages and is computed again later, or copied
    back from the host's memory where there was room to keep it there.

    The order of service is total and the first in it is never preempted for another; a request that
    can never fit is refused when it is added. So under a policy with fixed ranks every request ends.

    Several plans may be outstanding. `schedule` advances a request's progress at once, and `apply`,
    called in the order of the plans, brings the tokens. Pages of a request that ended are handed out
    again even while a step in flight still writes to them: the device runs steps in order.

    Not thread-safe: one thread calls everything.

    Args:
        config: the limits to work within.
        policy: the order of service; by default the one that `config.policy` names.

    Raises:
        ConfigError: the limits contradict each other, or there is no such policy.
    """

    def __init__(self, config: SchedulerConfig, policy: SchedulingPolicy | None = None) -> None:
        check_config(config)
        self.config = config
        self._policy = PolicyGuard(policy if policy is not None else load_policy(config.policy))
        self._swap = SwapSpace(config.num_host_pages)
        self._pool = BlockPool(config.num_pages, keep_freed=config.enable_prefix_caching)
        self._page_size = config.page_size
        self._sequences: dict[str, ScheduledSequence] = {}
        self._running: list[ScheduledSequence] = []  # sorted by key
        self._waiting = WaitingQueue()
        self._released: list[Request] = []
        self._in_flight: deque[tuple[Plan, list[ScheduledSequence]]] = deque()
        self._next_step_id = 0
        self._next_order = 0
        self.num_preemptions = 0
        """Times that a request lost its pages, so far."""
        self.prefix_cache_queries = 0
        """Tokens of the requests that were looked up in the prefix cache, so far."""
        self.prefix_cache_hits = 0
        """Tokens of them that were found, so far."""

    # What there is

    @property
    def waiting(self) -> list[Request]:
        """Requests that hold no pages, in order of service."""
        return [sequence.request for sequence in self._waiting]

    @property
    def running(self) -> list[Request]:
        """Requests that hold pages, in order of service."""
        return [sequence.request for sequence in self._running]

    @property
    def num_waiting(self) -> int:
        """How many requests wait."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """How many requests run."""
        return len(self._running)

    @property
    def pool(self) -> BlockPool:
        """The accounts of the pages; others may read and watch them."""
        return self._pool

    @property
    def num_free_pages(self) -> int:
        """Pages that could be handed out now."""
        return self._pool.num_free_pages

    @property
    def kv_cache_usage(self) -> float:
        """Fraction of the pages that requests hold, 0 to 1."""
        return 1.0 - self._pool.num_free_pages / self._pool.num_usable_pages

    @property
    def num_swaps(self) -> int:
        """Times that a preempted request was kept in the host's memory, so far."""
        return self._swap.num_kept

    def has_unfinished(self) -> bool:
        """Whether any request has not ended."""
        return bool(self._sequences)

    # Requests come and go

    def add(self, request: Request, hasher: PageHasher | None = None) -> None:
        """Queue a request.

        Args:
            hasher: of its pages, as `hasher_of` makes it, where its prompt was looked at before.

        Raises:
            InvalidRequestError: its id is taken, its prompt is empty or too long, or it needs more
                pages than there are.
        """
        max_length = check_request(request, self.config, taken=request.request_id in self._sequences)
        hasher = hasher or hasher_of(request, self.config)
        sequence = ScheduledSequence(
            request,
            find_prefix=self._count_prefix_tokens,
            page_size=self._page_size,
            order=self._next_order,
            max_length=max_length,
            hasher=hasher,
            reads_cache=hasher is not None and may_read_cache(request),
            overlaps=self.config.reschedule_in_flight,
        )
        self._next_order += 1
        self._sequences[request.request_id] = sequence
        self._policy.on_arrival(sequence.view)
        self._enqueue(sequence)

    def finish(self, request: Request, status: RequestStatus, stop_reason: int | str | None = None) -> None:
        """End a request from outside: aborted, a stop string found, an error.

        Tokens that steps in flight still bring for it are ignored. Does nothing if it has ended.

        Raises:
            ValueError: `status` is no end, or the request was never added.
        """
        if not status.is_finished:
            raise ValueError(f"finish() needs a FINISHED_* status, not {status}")
        if request.status.is_finished:
            return
        sequence = self._sequences.get(request.request_id)
        if sequence is None or sequence.request is not request:
            raise ValueError(f"request {request.request_id!r} was never added to this scheduler")
        self._finish(sequence, status, stop_reason)

    def _finish(
        self, sequence: ScheduledSequence, status: RequestStatus, stop_reason: int | str | None
    ) -> None:
        request = sequence.request
        sequence.finished = True
        if request.status is RequestStatus.RUNNING:
            self._running.remove(sequence)
            self._release(sequence)
        else:
            self._waiting.discard_finished()
            self._swap.drop(sequence)
        del self._sequences[request.request_id]
        request.num_pending_tokens = 0
        request.status = status
        request.stop_reason = stop_reason
        self._policy.on_finish(sequence.view)

    def _release(self, sequence: ScheduledSequence) -> None:
        """Take the pages of a sequence that stops running."""
        request = sequence.request
        self._pool.free(request.pages)
        request.pages = []
        self._released.append(request)

    def _preempt(self, sequence: ScheduledSequence) -> None:
        request = sequence.request
        self._running.remove(sequence)
        # What a prompt has been pooled to so far is not in its pages.
        begins_anew = request.pooling_params is not None and not sequence.reads_cache
        if not begins_anew and self._swap.has_room_for(sequence) and self._policy.keep_pages(sequence.view):
            self._swap.keep(sequence)
        self._release(sequence)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._enqueue(sequence)

    def _enqueue(self, sequence: ScheduledSequence) -> None:
        sequence.key = (self._policy.rank(sequence.view), sequence.order)
        self._waiting.push(sequence)

    # Planning a step

    def schedule(self) -> Plan | None:
        """The next step's work, or None where nothing can be computed before a plan is applied."""
        if self._policy.dynamic_ranks or self._policy.stale:
            self._renew_ranks()
        num_tokens = self.config.max_num_batched_tokens
        step = Draft(num_tokens, self.config.max_num_seqs)
        for view in self._policy.preempt(self._view_step()):
            self._preempt(self._sequences[view.request_id])
        split = self._policy.split_budget(self._view_step())
        self._schedule_running(step, split.running)
        # Whoever has just lost its pages would take them back.
        if not step.preempted:
            self._schedule_waiting(step, split.waiting)
        if (
            not step.scheduled
            and not self._in_flight
            and (step.preempted or step.declined or min(split) < num_tokens)
        ):
            # The policy's choices left nothing to do; what can be done is done all the same.
            step.follows_policy = False
            self._schedule_running(step, num_tokens)
            self._schedule_waiting(step, num_tokens)
        if not step.scheduled:
            return None
        for sequence in step.sequences:
            sequence.register_pages(self._pool)
        copies_out, copies_in = self._swap.take_copies()
        plan = Plan(
            step_id=self._next_step_id,
            scheduled=tuple(step.scheduled),
            released=tuple(self._released),
            num_tokens=num_tokens - step.num_tokens_left,
            copies_out=copies_out,
            copies_in=copies_in,
        )
        self._next_step_id += 1
        self._released.clear()
        self._in_flight.append((plan, step.sequences))
        return plan

    def skip_step(self) -> None:
        """Count a step of the devices that has no work of this scheduler: also with it stages move on."""
        self._next_step_id += 1

    def _renew_ranks(self) -> None:
        self._policy.stale = False
        for sequence in self._sequences.values():
            sequence.key = (self._policy.rank(sequence.view), sequence.order)
        self._running.sort(key=_by_key)
        self._waiting.rebuild(list(self._waiting))

    def _view_step(self) -> StepView:
        return StepView(
            self.config.max_num_batched_tokens,
            self.config.max_num_seqs - len(self._running),
            self._pool.num_free_pages,
            self._page_size,
            self._view_running,
            self._view_waiting,
        )

    def _view_running(self) -> Sequence[RequestView]:
        return tuple(sequence.view for sequence in self._running)

    def _view_waiting(self) -> Sequence[RequestView]:
        return tuple(sequence.view for sequence in self._waiting)

    def _share_out(self, step: Draft, num_admissible: int) -> None:
        """Let a plan sample for its part of the sequences only, so that every stage of a pipeline has some.

        Within `num_stages` plans every sequence gets its turn: each of them takes an equal part of all, or
        all that are ready. Where stages are empty, those that are ready are shared out to them.

        Args:
            num_admissible: waiting sequences that count, beside those that run.
        """
        num_stages = self.config.num_stages
        if num_stages == 1:
            return
        num_ready = num_admissible + sum(
            sequence.num_tokens_to_compute(self._next_step_id) > 0 for sequence in self._running
        )
        oldest = self._next_step_id - num_stages
        num_busy = sum(plan.step_id > oldest for plan, _ in self._in_flight)
        fair = ceil_div(len(self._running) + num_admissible, num_stages)
        num_sampling = sum(entry.samples for entry in step.scheduled)
        # Those that this plan has taken already are ready no more.
        seats = min(fair, ceil_div(num_ready + num_sampling, num_stages - num_busy))
        step.num_seats_left = max(seats - num_sampling, 0)

    def _schedule_running(self, step: Draft, limit: int) -> None:
        """Give running sequences up to `limit` tokens of the step."""
        self._share_out(step, 0)
        running = self._running
        index = 0
        while index < len(running) and step.num_tokens_left > 0 and limit > 0:
            sequence = running[index]
            num_left = num_tokens = sequence.num_tokens_to_compute(self._next_step_id)
            if num_tokens > 1:
                # A long prompt leaves a token for everybody behind it.
                available = min(limit, step.num_tokens_left) - (len(running) - 1 - index)
                num_tokens = self._chunk(num_tokens, max(available, 1))
            if num_tokens == num_left and not step.num_seats_left:
                num_tokens = 0
            num_tokens = self._ask_chunk(step, sequence, num_tokens)
            if num_tokens == 0:
                index += 1
            elif self._make_room(step, index, num_tokens):
                self._take(step, sequence, num_tokens)
                limit -= num_tokens
                index += 1

    def _make_room(self, step: Draft, index: int, num_tokens: int) -> bool:
        """Give the running sequence at `index` the pages for `num_tokens` more tokens.

        Sequences from `index` on may lose theirs for it. False if the sequence itself did.
        """
        request = self._running[index].request
        num_positions = request.num_computed_tokens + num_tokens
        if num_positions <= len(request.pages) * self._page_size:
            return True
        num_pages = ceil_div(num_positions, self._page_size) - len(request.pages)
        while num_pages > self._pool.num_free_pages:
            candidates = self._running[index:]
            victim = candidates[self._policy.choose_victim([c.view for c in candidates])]
            self._preempt(victim)
            step.preempted = True
            if victim.request is request:
                return False
        request.pages.extend(self._pool.allocate(num_pages))
        return True

    def _schedule_waiting(self, step: Draft, limit: int) -> None:
        """Start waiting sequences with up to `limit` tokens of the step."""
        self._share_out(step, min(len(self._waiting), self.config.max_num_seqs - len(self._running)))
        held: list[ScheduledSequence] = []
        # A sequence that is held back keeps its seat; nobody overtakes one that lacks tokens or pages.
        while (
            limit > 0
            and step.num_tokens_left > 0
            and len(self._running) + len(held) < self.config.max_num_seqs
            and (sequence := self._waiting.pop()) is not None
        ):
            if sequence.request.num_pending_tokens:
                held.append(sequence)
                continue
            if step.follows_policy and not self._policy.admit(sequence.view):
                step.declined = True
                held.append(sequence)
                continue
            digests = sequence.wanted_digests()
            pages = self._pool.find_prefix(digests)
            if not sequence.host_pages and sequence.awaits_page(
                digests[len(pages) :], len(pages), step.computing
            ):
                held.append(sequence)
                continue
            num_there = max(len(pages) * self._page_size, sequence.num_kept_tokens)
            num_left = sequence.num_tokens_to_compute(self._next_step_id) - num_there
            num_tokens = self._chunk(num_left, min(limit, step.num_tokens_left))
            if num_tokens == num_left and not step.num_seats_left:
                num_tokens = 0
            if num_tokens == 0 or not self._fits(sequence.request, pages, step.num_reserved_pages):
                held.append(sequence)
                break
            num_tokens = self._ask_chunk(step, sequence, num_tokens)
            if num_tokens == 0:
                held.append(sequence)
                continue
            self._admit(sequence, pages, num_tokens)
            self._take(step, sequence, num_tokens)
            limit -= num_tokens
        for sequence in held:
            self._waiting.push(sequence)

    def _chunk(self, num_tokens: int, available: int) -> int:
        """How many of `num_tokens` to compute where `available` are left of the budget."""
        if not self.config.enable_chunked_prefill:
            return num_tokens if num_tokens <= available else 0
        threshold = self.config.long_prefill_token_threshold
        if threshold:
            available = min(available, threshold)
        return min(num_tokens, available)

    def _ask_chunk(self, step: Draft, sequence: ScheduledSequence, num_tokens: int) -> int:
        """How many of `num_tokens` the policy wants to compute now."""
        if not step.follows_policy:
            return num_tokens
        wanted = self._policy.chunk_size(sequence.view, num_tokens)
        if wanted < num_tokens and not self.config.enable_chunked_prefill:
            wanted = 0
        step.declined |= wanted < num_tokens
        return wanted

    def _count_prefix_tokens(self, sequence: ScheduledSequence) -> int:
        """Tokens of a waiting sequence that the prefix cache holds now, or the host keeps for it."""
        num_found = len(self._pool.find_prefix(sequence.wanted_digests())) * self._page_size
        return max(num_found, sequence.num_kept_tokens)

    def _fits(self, request: Request, found: list[int], num_reserved: int) -> bool:
        """Whether there are pages for all tokens that the request has, beside those promised to others."""
        num_pages = ceil_div(len(request.token_ids), self._page_size) - len(found)
        return num_pages + self._pool.count_unowned(found) + num_reserved <= self._pool.num_free_pages

    def _admit(self, sequence: ScheduledSequence, found: list[int], num_tokens: int) -> None:
        """Let a waiting sequence run, with the pages found or kept for it and new ones for `num_tokens`."""
        request = sequence.request
        num_found = len(found) * self._page_size
        num_there = max(num_found, sequence.num_kept_tokens)
        self._pool.share(found)
        num_pages = ceil_div(num_there + num_tokens, self._page_size) - len(found)
        request.pages = found + self._pool.allocate(num_pages)
        request.num_computed_tokens = num_there
        self._swap.restore(sequence, len(found))
        sequence.num_registered_pages = len(found)
        sequence.num_held_pages = sequence.num_holds = 0
        if request.status is RequestStatus.WAITING:
            request.num_cached_tokens = num_found
            if sequence.reads_cache:
                self.prefix_cache_queries += len(request.token_ids)
                self.prefix_cache_hits += num_found
        request.status = RequestStatus.RUNNING
        self._policy.on_admission(sequence.view, num_there)
        insort(self._running, sequence, key=_by_key)

    def _take(self, step: Draft, sequence: ScheduledSequence, num_tokens: int) -> None:
        """Put the next `num_tokens` of a running sequence, which has the pages, into the plan."""
        request = sequence.request
        start = request.num_computed_tokens
        end = start + num_tokens
        num_existing = len(request.token_ids) + request.num_pending_tokens
        samples = end == num_existing
        request.num_computed_tokens = end
        if samples:
            request.num_pending_tokens += 1
            step.num_seats_left -= 1
            sequence.ready_at = self._next_step_id + self.config.num_stages
        else:
            step.num_reserved_pages += ceil_div(num_existing, self._page_size) - len(request.pages)
        step.num_tokens_left -= num_tokens
        step.scheduled.append(ScheduledRequest(request, start, num_tokens, samples))
        step.sequences.append(sequence)
        step.computing.update(sequence.known_digests(start, end))
        self._policy.on_progress(sequence.view, num_tokens)

    # Taking in a step's result

    def apply(self, plan: Plan, result: StepResult) -> list[RequestUpdate]:
        """Append what a step sampled, and end the requests that are done.

        Args:
            plan: the oldest outstanding plan.
            result: what the device returned for it.

        Returns:
            In the plan's order, one update for each request that got tokens or prompt logprobs, or ended.

        Raises:
            ValueError: plans are applied out of order, or the result does not match the plan.
        """
        if not self._in_flight or self._in_flight[0][0] is not plan:
            raise ValueError(f"plan {plan.step_id} is not the oldest outstanding one")
        check_result(plan, result)
        _, sequences = self._in_flight.popleft()
        updates = []
        for row, (sequence, entry) in enumerate(zip(sequences, plan.scheduled, strict=True)):
            if sequence.finished:
                continue
            if entry.request.pooling_params is not None:
                if entry.samples:
                    entry.request.num_pending_tokens -= 1
                    self._finish(sequence, RequestStatus.FINISHED_STOPPED, None)
                update = RequestUpdate(entry.request, [])
                update.pooled, update.pooled_start = result.pooled.get(row), entry.start
                updates.append(update)
                continue
            new_token_ids = self._append(sequence, result.token_ids[row]) if entry.samples else []
            prompt_logprobs = sequence.new_prompt_logprobs(entry.start, result.prompt_logprobs.get(row))
            if new_token_ids or prompt_logprobs or sequence.finished:
                logprobs = result.logprobs[row]
                if logprobs is not None:
                    logprobs = logprobs[: len(new_token_ids)]
                updates.append(RequestUpdate(entry.request, new_token_ids, logprobs, prompt_logprobs))
        return updates

    def _append(self, sequence: ScheduledSequence, token_ids: list[int]) -> list[int]:
        """Append sampled tokens up to the first that ends the request; returns those appended."""
        request = sequence.request
        request.num_pending_tokens -= 1
        for count, token_id in enumerate(token_ids):
            request.error = None if request.grammar is None else request.grammar.accept(token_id)
            if request.error is None and token_id < 0:
                request.error = _NO_TOKEN
            if request.error is not None:
                sequence.register_pages(self._pool)
                self._finish(sequence, RequestStatus.FINISHED_ERROR, None)
                return token_ids[:count]
            request.token_ids.append(token_id)
            end = sequence.stops.check()
            if end is not None:
                sequence.register_pages(self._pool)
                self._finish(sequence, *end)
                return token_ids[: count + 1]
        sequence.register_pages(self._pool)
        return token_ids

    # Housekeeping

    def reset_prefix_cache(self) -> bool:
        """Forget all cached content; False, and nothing happens, while any request holds pages."""
        return self._pool.reset()

    def check_integrity(self) -> None:
        """Check every account against every other; takes time in proportion to the whole cache.

        Every page is blank, cached or owned, every request is in exactly one place, and progress and
        pages fit together.

        Raises:
            IntegrityError: saying what is wrong.
        """
        self._pool.check_integrity([sequence.request.pages for sequence in self._running])
        check_places(self._sequences, self._running, self._waiting, self.config.max_num_seqs)
        self._swap.check_integrity(self._running, self._waiting, self._page_size)
        for sequence in self._running:
            check_progress(sequence, self._in_flight, self._page_size)

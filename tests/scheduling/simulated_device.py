"""A device made of lists, and an oracle: what the scheduler's plans must do when they are really run.

The model's next token is a hash of all tokens before it. The KV cache holds, in each slot, a hash of
all tokens up to the slot's own, so that a page that belongs to somebody else is seen at once.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from dataclasses import dataclass, field

import numpy as np

from jaxllm.config import SchedulerConfig
from jaxllm.request import Request, RequestStatus, SchedulingTerms
from jaxllm.sampling_params import RepetitionDetectionParams, SamplingParams
from jaxllm.scheduling import Plan, RequestUpdate, Scheduler, SchedulingPolicy, StepResult, TokenLogprobs
from jaxllm.scheduling.plan import Copies

VOCABULARY = 7
EOS = 0


def root_of(salt: str | None) -> int:
    return zlib.crc32(repr(salt).encode())


def extend_kv(kv: int, token: int) -> int:
    return hash((kv, token))


def next_token(kv: int) -> int:
    return (kv >> 7) % VOCABULARY


@dataclass
class PackedRow:
    """What the host sends for one row: taken when the plan is executed, not later."""

    request: Request
    start: int
    num_tokens: int
    samples: bool
    known: list[int]
    pages: list[int]


@dataclass
class Device:
    """Runs executed plans in order, each only when its result is asked for."""

    config: SchedulerConfig
    queue: deque[list[PackedRow]] = field(default_factory=deque)
    copies: deque[tuple[Copies, Copies]] = field(default_factory=deque)
    host: dict[int, int] = field(default_factory=dict)
    slots: dict[int, int] = field(default_factory=dict)
    last: dict[str, tuple[int, int]] = field(default_factory=dict)
    released: deque[list[str]] = field(default_factory=deque)
    seats: set[str] = field(default_factory=set)
    sampling: deque[set[str]] = field(default_factory=deque)
    num_computed_tokens: int = 0
    num_plans: int = 0

    def execute(self, plan: Plan) -> None:
        config = self.config
        assert plan.step_id == self.num_plans
        self.num_plans += 1
        for request in plan.released:
            assert request.request_id in self.seats, "released without having run"
            self.seats.remove(request.request_id)
        rows = []
        for request, start, num_tokens, samples in plan.scheduled:
            assert num_tokens > 0
            assert not request.status.is_finished
            for ago, sampled in enumerate(reversed(self.sampling), start=1):
                if request.request_id in sampled:
                    assert ago >= config.num_stages, "it is still on its way through the stages"
                    assert config.reschedule_in_flight
            self.seats.add(request.request_id)
            known = list(request.token_ids)
            end = start + num_tokens
            if end > len(known):
                assert num_tokens == 1, "only the newest token may still be on the device"
                assert config.reschedule_in_flight
            assert end <= config.max_model_len - 1
            assert end <= request.num_prompt_tokens + request.max_tokens - 1
            if not config.enable_chunked_prefill:
                assert samples
            assert len(request.pages) == -(-end // config.page_size)
            assert all(0 < page < config.num_pages for page in request.pages)
            rows.append(PackedRow(request, start, num_tokens, samples, known, list(request.pages)))
        assert len({row.request.request_id for row in rows}) == len(rows)
        assert len(self.seats) <= config.max_num_seqs
        assert plan.num_tokens == sum(row.num_tokens for row in rows) <= config.max_num_batched_tokens
        for device, host in (*plan.copies_out, *((device, host) for host, device in plan.copies_in)):
            assert 0 < device < config.num_pages and 0 <= host < config.num_host_pages
        for copies in (plan.copies_out, plan.copies_in):
            assert len({target for _, target in copies}) == len(copies), "two pages are copied to one"
        self.queue.append(rows)
        self.sampling.append({row.request.request_id for row in rows if row.samples})
        self.copies.append((plan.copies_out, plan.copies_in))
        self.released.append([request.request_id for request in plan.released])

    def skip_step(self) -> None:
        """A step in which only other replicas have work; what is on its way through stages moves on."""
        self.num_plans += 1
        self.queue.append([])
        self.sampling.append(set())
        self.copies.append(((), ()))
        self.released.append([])

    def result(self) -> StepResult:
        rows = self.queue.popleft()
        self.sampling.popleft()
        for request_id in self.released.popleft():
            self.last.pop(request_id, None)
        self._copy(*self.copies.popleft())
        packed = [(row, self._tokens(row)) for row in rows]
        # Everything that is read must be there before the step, and still be there after its writes.
        before = [self._read(row, tokens) for row, tokens in packed]
        writes: dict[int, int] = {}
        result = StepResult([], [])
        for index, (row, tokens) in enumerate(packed):
            kv = before[index]
            self.num_computed_tokens += row.num_tokens
            for position in range(row.start, row.start + row.num_tokens):
                kv = extend_kv(kv, tokens[position])
                slot = self._slot(row, position)
                assert slot not in writes, "two rows write one slot"
                writes[slot] = kv
            sampled = []
            if row.samples:
                sampled = [next_token(kv)]
                self.last[row.request.request_id] = (row.start + row.num_tokens, sampled[0])
            result.token_ids.append(sampled)
            wants = row.request.sampling_params.logprobs is not None
            result.logprobs.append([logprob_of(token) for token in sampled] if wants else None)
            if row.request.sampling_params.prompt_logprobs is not None:
                end = min(row.start + row.num_tokens, row.request.num_prompt_tokens - 1)
                positions = range(row.start + 1, end + 1)
                result.prompt_logprobs[index] = [logprob_of(position) for position in positions]
        self.slots.update(writes)
        for row, tokens in packed:
            self._read(row, tokens)
        return result

    def _copy(self, out: Copies, back: Copies) -> None:
        size = self.config.page_size
        for copies, source, target in ((out, self.slots, self.host), (back, self.host, self.slots)):
            content = {
                to * size + offset: source.get(page * size + offset)
                for page, to in copies
                for offset in range(size)
            }
            for slot, kv in content.items():
                target.pop(slot, None)
                if kv is not None:
                    target[slot] = kv

    def _tokens(self, row: PackedRow) -> dict[int, int]:
        tokens = dict(enumerate(row.known))
        newest = row.start + row.num_tokens - 1
        if newest >= len(row.known):
            position, token = self.last[row.request.request_id]
            assert position == newest, "the device has another token than the plan wants"
            tokens[newest] = token
        return tokens

    def _slot(self, row: PackedRow, position: int) -> int:
        size = self.config.page_size
        return row.pages[position // size] * size + position % size

    def _read(self, row: PackedRow, tokens: dict[int, int]) -> int:
        """Check every position before the row's own; the last one's KV."""
        kv = root_of(row.request.cache_salt)
        for position in range(row.start):
            found = self.slots.get(self._slot(row, position))
            if position in tokens:
                kv = extend_kv(kv, tokens[position])
            else:
                # In flight when the row was packed: the model itself says which token it was.
                kv = extend_kv(kv, next_token(kv))
            assert found == kv, f"{row.request.request_id} reads foreign KV at position {position}"
        return kv


def logprob_of(number: int) -> TokenLogprobs:
    return TokenLogprobs(-float(number), 1, np.zeros(0, np.int32), np.zeros(0, np.float32))


def repeats(outputs: list[int], params: RepetitionDetectionParams | None) -> bool:
    if params is None:
        return False
    for size in range(max(params.min_pattern_size, 1), params.max_pattern_size + 1):
        tail = outputs[-size * params.min_count :]
        if len(tail) == size * params.min_count and tail == tail[:size] * params.min_count:
            return True
    return False


def alone(request: Request, max_model_len: int) -> tuple[list[int], RequestStatus, int | None]:
    """What a request gives when it is served alone: output tokens, status and stop reason."""
    params = request.sampling_params
    kv = root_of(request.cache_salt)
    for token in request.prompt_token_ids:
        kv = extend_kv(kv, token)
    outputs: list[int] = []
    while True:
        token = next_token(kv)
        kv = extend_kv(kv, token)
        outputs.append(token)
        free = len(outputs) >= params.min_tokens
        if free and not params.ignore_eos and token in request.eos_token_ids:
            return outputs, RequestStatus.FINISHED_STOPPED, None
        if free and token in (params.stop_token_ids or []):
            return outputs, RequestStatus.FINISHED_STOPPED, token
        length = request.num_prompt_tokens + len(outputs)
        if len(outputs) >= request.max_tokens or length >= max_model_len:
            return outputs, RequestStatus.FINISHED_LENGTH, None
        if free and repeats(outputs, params.repetition_detection):
            return outputs, RequestStatus.FINISHED_REPETITION, None


class Server:
    """Scheduler and device, driven as the engine drives them, with every account checked."""

    def __init__(
        self, config: SchedulerConfig, *, in_flight: int = 1, policy: SchedulingPolicy | None = None
    ) -> None:
        self.config = config
        self.in_flight = in_flight
        self.scheduler = Scheduler(config, policy)
        self.device = Device(config)
        self.outstanding: deque[Plan] = deque()
        self.plans: list[Plan] = []
        self.requests: list[Request] = []
        self.received: dict[str, list[int]] = {}
        self.prompt_logprobs: dict[str, list[float]] = {}

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.requests.append(request)
        self.received[request.request_id] = []
        self.prompt_logprobs[request.request_id] = []

    def schedule(self) -> Plan | None:
        if len(self.outstanding) >= self.in_flight:
            return None
        plan = self.scheduler.schedule()
        self.scheduler.check_integrity()
        if plan is not None:
            self.device.execute(plan)
            self.outstanding.append(plan)
            self.plans.append(plan)
        elif not self.outstanding:
            assert not self.scheduler.has_unfinished(), "work is left, and nothing is scheduled"
        return plan

    def apply(self) -> list[RequestUpdate]:
        if not self.outstanding:
            return []
        plan = self.outstanding.popleft()
        finished = {e.request.request_id for e in plan.scheduled if e.request.status.is_finished}
        updates = self.scheduler.apply(plan, self.device.result())
        self.scheduler.check_integrity()
        rows = [entry.request.request_id for entry in plan.scheduled]
        updated = [update.request.request_id for update in updates]
        assert updated == [row for row in rows if row in set(updated)], "updates are not in plan order"
        assert not finished & set(updated), "a finished request got an update"
        for update in updates:
            name = update.request.request_id
            assert update.new_token_ids or update.prompt_logprobs
            self.received[name] += update.new_token_ids
            self.prompt_logprobs[name] += [entry.logprob for entry in update.prompt_logprobs or []]
            if update.request.sampling_params.logprobs is not None:
                assert update.logprobs is not None
                assert [-entry.logprob for entry in update.logprobs] == update.new_token_ids
            else:
                assert update.logprobs is None
        return updates

    def step(self) -> Plan | None:
        """Fill the pipeline, then take in one result; returns the first new plan."""
        first = self.schedule()
        if first is not None:
            while self.schedule() is not None:
                pass
        self.apply()
        return first

    def run(self, limit: int = 100_000) -> None:
        """Serve until everything has ended, then compare everything with the oracle."""
        for _ in range(limit):
            if not self.scheduler.has_unfinished() and not self.outstanding:
                break
            self.step()
        else:
            raise AssertionError(f"not everything ended within {limit} steps")
        self.check_end()

    def check_end(self) -> None:
        scheduler = self.scheduler
        assert scheduler.num_running == scheduler.num_waiting == 0
        assert scheduler.num_free_pages == self.config.num_pages - 1
        assert scheduler.kv_cache_usage == 0
        assert len(scheduler._swap._free) == self.config.num_host_pages
        assert 0 <= scheduler.prefix_cache_hits <= scheduler.prefix_cache_queries
        for request in self.requests:
            self.check_ended(request)

    def check_ended(self, request: Request) -> None:
        outputs, status, reason = alone(request, self.config.max_model_len)
        name = request.request_id
        assert request.status.is_finished
        assert request.pages == []
        assert request.num_pending_tokens == 0
        assert request.token_ids[: request.num_prompt_tokens] == request.prompt_token_ids
        assert self.received[name] == request.output_token_ids
        positions = [-float(position) for position in range(1, request.num_prompt_tokens)]
        if request.sampling_params.prompt_logprobs is None:
            positions = []
        if request.status is RequestStatus.FINISHED_ABORTED:
            assert request.output_token_ids == outputs[: request.num_output_tokens]
            assert self.prompt_logprobs[name] == positions[: len(self.prompt_logprobs[name])]
        else:
            assert request.output_token_ids == outputs
            assert (request.status, request.stop_reason) == (status, reason)
            assert self.prompt_logprobs[name] == positions


def make_request(name: str, prompt: list[int], *, max_tokens: int = 4, **fields: object) -> Request:
    """A request whose SamplingParams take the fields that Request has not."""
    own = {key: fields.pop(key) for key in list(fields) if key in Request.__dataclass_fields__}
    terms = {key: fields.pop(key) for key in list(fields) if key in SchedulingTerms.__dataclass_fields__}
    own["terms"] = SchedulingTerms(**terms)  # type: ignore[arg-type]
    fields.setdefault("ignore_eos", True)
    return Request(
        request_id=name,
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(max_tokens=max_tokens, **fields),  # type: ignore[arg-type]
        eos_token_ids=frozenset([EOS]),
        max_tokens=max_tokens,
        **own,  # type: ignore[arg-type]
    )


def make_config(**fields: object) -> SchedulerConfig:
    values: dict[str, object] = {
        "max_num_seqs": 8,
        "max_num_batched_tokens": 64,
        "max_model_len": 64,
        "page_size": 4,
        "num_pages": 65,
    }
    return SchedulerConfig(**(values | fields))  # type: ignore[arg-type]


def random_config(rng: random.Random) -> SchedulerConfig:
    max_model_len = rng.choice([8, 17, 40, 64])
    page_size = rng.choice([1, 2, 3, 4, 8])
    chunked = rng.random() < 0.8
    budget = rng.choice([1, 2, 5, 16, 33, 80])
    least = -(-(max_model_len - 1) // page_size) + 1
    return SchedulerConfig(
        max_num_seqs=rng.choice([1, 2, 3, 5, 8, 16]),
        max_num_batched_tokens=budget if chunked else max(budget, max_model_len),
        max_model_len=max_model_len,
        page_size=page_size,
        num_pages=rng.choice([least, least + 1, least + rng.randrange(1 + least), 3 * least]),
        enable_prefix_caching=rng.random() < 0.7,
        enable_chunked_prefill=chunked,
        long_prefill_token_threshold=rng.choice([0, 0, 1, 3, 10]) if chunked else 0,
        policy=rng.choice(["fcfs", "priority"]),
        reschedule_in_flight=rng.random() < 0.6,
        num_host_pages=rng.choice([0, 0, 1, least, 4 * least]),
    )


def random_requests(rng: random.Random, config: SchedulerConfig, count: int) -> list[Request]:
    """Prompts that share prefixes, and every field that the scheduler looks at."""
    length = config.max_model_len
    stems = [[rng.randrange(VOCABULARY) for _ in range(length)] for _ in range(2)]
    requests: list[Request] = []
    while len(requests) < count:
        shared = rng.randrange(length) if rng.random() < 0.6 else 0
        prompt = rng.choice(stems)[:shared]
        prompt = prompt + [rng.randrange(VOCABULARY) for _ in range(rng.choice([1, 1, 2, 5, length]))]
        prompt = prompt[: rng.randrange(1, length)]
        siblings = min(rng.choice([1, 1, 1, 1, 4]), count - len(requests))
        group = f"group-{len(requests)}" if siblings > 1 else None
        salt = rng.choice([None, None, None, "salt"])
        max_tokens = rng.choice([1, 2, 5, 12, 30])
        for _ in range(siblings):
            requests.append(
                make_request(
                    f"request-{len(requests)}",
                    prompt,
                    max_tokens=max_tokens,
                    arrival_time=float(rng.randrange(5)),
                    priority=rng.randrange(3),
                    cache_salt=salt,
                    group_id=group,
                    ignore_eos=rng.random() < 0.6,
                    min_tokens=rng.randrange(max_tokens + 1) if rng.random() < 0.3 else 0,
                    stop_token_ids=[rng.randrange(VOCABULARY)] if rng.random() < 0.3 else None,
                    logprobs=1 if rng.random() < 0.2 else None,
                    prompt_logprobs=1 if rng.random() < 0.1 else None,
                    skip_reading_prefix_cache=True if rng.random() < 0.05 else None,
                    repetition_detection=(
                        RepetitionDetectionParams(max_pattern_size=3, min_pattern_size=1, min_count=2)
                        if rng.random() < 0.1
                        else None
                    ),
                )
            )
    return requests

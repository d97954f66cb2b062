"""Traffic to simulate: when requests come, how long they are, and what they share.

Lengths are log-normal. The medians of `conversation` and `code` are those that Patel et al. (Splitwise,
ISCA 2024, section 3) report of Azure's services: 1020 tokens in and 129 out, 1500 in and 13 out. Their
spread is ours: a log-normal through the medians with the long tails that the paper draws.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from random import Random

from jaxllm.request import NO_TERMS, SchedulingTerms
from jaxllm.scheduling.simulator.trace import TracedRequest


@dataclass(frozen=True, slots=True)
class Lengths:
    """Log-normal numbers of tokens, cut off at both ends."""

    median: float
    sigma: float
    longest: int

    def draw(self, random: Random) -> int:
        """One of them, at least 1."""
        return max(1, min(round(random.lognormvariate(math.log(self.median), self.sigma)), self.longest))


CONVERSATION = (Lengths(1020, 0.9, 8192), Lengths(129, 0.8, 1024))
CODE = (Lengths(1500, 0.7, 8192), Lengths(13, 1.0, 512))
SHORT = (Lengths(180, 0.8, 2048), Lengths(120, 0.8, 1024))


def _requests(
    times: Iterator[float],
    random: Random,
    lengths: tuple[Lengths, Lengths] = CONVERSATION,
    terms: Callable[[Random], SchedulingTerms] = lambda _: NO_TERMS,
) -> Iterator[TracedRequest]:
    for name, time in enumerate(times, start=1):
        segments = ((name, lengths[0].draw(random)),)
        yield TracedRequest(time, segments, lengths[1].draw(random), terms=terms(random))


def _arrivals(random: Random, gap: Callable[[], float]) -> Iterator[float]:
    time = 0.0
    while True:
        time += gap()
        yield time


def poisson(rate: float, random: Random) -> Iterator[TracedRequest]:
    """Conversations that come independently of one another."""
    return _requests(_arrivals(random, lambda: random.expovariate(rate)), random)


def bursty(rate: float, random: Random) -> Iterator[TracedRequest]:
    """The same in bursts: Gamma gaps of coefficient of variation 3 (Wang et al., BurstGPT, 2024)."""
    shape = 1 / 3**2
    gaps = _arrivals(random, lambda: random.gammavariate(shape, 1 / (rate * shape)))
    return _requests(gaps, random)


def diurnal(rate: float, random: Random) -> Iterator[TracedRequest]:
    """A day in ten minutes: the rate swings by four fifths around its mean, a sine over 600 s."""

    def times() -> Iterator[float]:
        # Thinning (Lewis and Shedler 1979).
        for time in _arrivals(random, lambda: random.expovariate(1.8 * rate)):
            if random.random() * 1.8 <= 1 + 0.8 * math.sin(2 * math.pi * time / 600):
                yield time

    return _requests(times(), random)


def code(rate: float, random: Random) -> Iterator[TracedRequest]:
    """Long prompts and short answers."""
    return _requests(_arrivals(random, lambda: random.expovariate(rate)), random, CODE)


def tenants(rate: float, random: Random) -> Iterator[TracedRequest]:
    """Four tenants, of which each sends half as much as the one before it."""

    def terms(random: Random) -> SchedulingTerms:
        return SchedulingTerms(tenant=random.choices("abcd", (8, 4, 2, 1))[0])

    return _requests(_arrivals(random, lambda: random.expovariate(rate)), random, SHORT, terms)


def long_context(rate: float, random: Random) -> Iterator[TracedRequest]:
    """Short questions, and one in twenty about a document of tens of thousands of tokens."""
    document = Lengths(24_000, 0.5, 100_000)
    for name, time in enumerate(_arrivals(random, lambda: random.expovariate(rate)), start=1):
        length = document if random.random() < 0.05 else SHORT[0]
        yield TracedRequest(time, ((name, length.draw(random)),), SHORT[1].draw(random))


def chat(rate: float, random: Random) -> Iterator[TracedRequest]:
    """Sessions of five turns on average, each of which repeats all that was said before.

    All begin with one of four system prompts of 400 tokens; `rate` counts requests. The next turn comes
    after the answer could be read: 20 ms a token and 20 s of thought, on average. At the start sessions
    are under way already, so that the rate is steady from there.
    """
    goes_on, thought, per_token = 0.8, 20.0, 0.02
    names = count(100)
    question, answer = Lengths(60, 0.8, 1024), SHORT[1]

    def system_prompt() -> tuple[tuple[int, int], ...]:
        return ((random.randrange(1, 5), 400),)

    def pause(output_len: int) -> float:
        return per_token * output_len + random.expovariate(1 / thought)

    # (when, a number that no other has, what was said): the turns that are sure to come
    turns: list[tuple[float, int, tuple[tuple[int, int], ...]]] = []
    mean_answer = answer.median * math.exp(answer.sigma**2 / 2)
    for _ in range(round(rate * goes_on * (per_token * mean_answer + thought))):
        said = system_prompt()
        while len(said) == 1 or random.random() < goes_on:
            said = (*said, (next(names), question.draw(random)), (next(names), answer.draw(random)))
        heapq.heappush(turns, (random.expovariate(1 / thought), next(names), said))
    next_session = random.expovariate(rate * (1 - goes_on))
    while True:
        if not turns or next_session <= turns[0][0]:
            heapq.heappush(turns, (next_session, next(names), system_prompt()))
            next_session += random.expovariate(rate * (1 - goes_on))
        time, _, said = heapq.heappop(turns)
        prompt = (*said, (next(names), question.draw(random)))
        output_name, output_len = next(names), answer.draw(random)
        yield TracedRequest(time, prompt, output_len, output_name=output_name)
        if random.random() < goes_on:
            said = (*prompt, (output_name, output_len))
            heapq.heappush(turns, (time + pause(output_len), next(names), said))


WORKLOADS: dict[str, Callable[[float, Random], Iterator[TracedRequest]]] = {
    "poisson": poisson,
    "bursty": bursty,
    "diurnal": diurnal,
    "code": code,
    "chat": chat,
    "tenants": tenants,
    "long-context": long_context,
}


def make_workload(name: str, *, rate: float, num_requests: int, seed: int = 0) -> Iterator[TracedRequest]:
    """The first requests of a workload; equal seeds give equal ones.

    Args:
        rate: requests a second, on average.

    Raises:
        ValueError: there is no such workload, or the rate is not above 0.
    """
    if name not in WORKLOADS:
        raise ValueError(f"workload {name!r} is not one of {', '.join(WORKLOADS)}")
    if not 0 < rate < math.inf:
        raise ValueError(f"rate={rate} must be above 0")
    return islice(WORKLOADS[name](rate, Random(f"{name} {seed}")), num_requests)

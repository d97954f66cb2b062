"""What a scheduling policy sees of requests and of a step: read-only, and always up to date."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxllm.request import Request, RequestStatus


class RequestView:
    """A request as a policy sees it: read-only, always up to date.

    Args:
        request: what is seen.
        find_prefix: looks up how many of its tokens the prefix cache holds.
    """

    __slots__ = ("_find_prefix", "_request")
    _request: Request
    _find_prefix: Callable[[], int]

    def __init__(self, request: Request, find_prefix: Callable[[], int] = lambda: 0) -> None:
        object.__setattr__(self, "_request", request)
        object.__setattr__(self, "_find_prefix", find_prefix)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"a policy cannot change a request; it tried to set {name!r}")

    def __repr__(self) -> str:
        return f"RequestView({self.request_id!r})"

    @property
    def request_id(self) -> str:
        """Unique among unfinished requests."""
        return self._request.request_id

    @property
    def status(self) -> RequestStatus:
        """Waiting, running or preempted."""
        return self._request.status

    @property
    def arrival_time(self) -> float:
        """Seconds, on the clock of whoever made the request."""
        return self._request.arrival_time

    @property
    def priority(self) -> int:
        """What the user asked for; lower is more urgent."""
        return self._request.terms.priority

    @property
    def tenant(self) -> str:
        """Who is served by it, for policies that are fair among tenants; empty where nobody said."""
        return self._request.terms.tenant

    @property
    def ttft_objective(self) -> float | None:
        """Seconds after its arrival by which its first token is wanted; None where nobody said."""
        return self._request.terms.ttft_objective

    @property
    def tpot_objective(self) -> float | None:
        """Seconds within which each further token is wanted; None where nobody said."""
        return self._request.terms.tpot_objective

    @property
    def group_id(self) -> str | None:
        """Common to the sequences of one user request; None where it has only one."""
        return self._request.group_id

    @property
    def max_tokens(self) -> int:
        """Output tokens allowed."""
        return self._request.max_tokens

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self._request.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        """Output tokens that exist, including those still in flight."""
        return self._request.num_output_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens that exist, including those still in flight."""
        return self._request.num_tokens

    @property
    def num_computed_tokens(self) -> int:
        """Positions in the KV cache, or there once the steps in flight have run."""
        return self._request.num_computed_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens found in the prefix cache at the first admission."""
        return self._request.num_cached_tokens

    @property
    def num_prefix_tokens(self) -> int:
        """Tokens that it would not have to compute if it started now: those in the prefix cache, or kept on
        the host since it was preempted. Looked up when asked for, in time proportional to them."""
        return self._find_prefix()

    @property
    def num_preemptions(self) -> int:
        """How often it has been preempted."""
        return self._request.num_preemptions

    @property
    def num_pages(self) -> int:
        """KV pages that it holds."""
        return len(self._request.pages)


class StepView:
    """What is there to be scheduled, before a step is planned.

    Args:
        num_tokens: the step's token budget.
        num_free_seats: how many more requests may run at once.
        num_free_pages: KV pages that nobody holds.
        page_size: tokens a KV page holds.
        running: reads the running requests, in order of rank.
        waiting: reads the waiting requests, in order of rank.
    """

    __slots__ = ("_running", "_waiting", "num_free_pages", "num_free_seats", "num_tokens", "page_size")

    def __init__(
        self,
        num_tokens: int,
        num_free_seats: int,
        num_free_pages: int,
        page_size: int,
        running: Callable[[], Sequence[RequestView]],
        waiting: Callable[[], Sequence[RequestView]],
    ) -> None:
        self.num_tokens = num_tokens
        self.num_free_seats = num_free_seats
        self.num_free_pages = num_free_pages
        self.page_size = page_size
        self._running = running
        self._waiting = waiting

    @property
    def running(self) -> Sequence[RequestView]:
        """Running requests, in order of rank. Collected when asked for."""
        return self._running()

    @property
    def waiting(self) -> Sequence[RequestView]:
        """Waiting requests, in order of rank. Collected, and sorted, when asked for."""
        return self._waiting()

    def has_room_for(self, request: RequestView) -> bool:
        """Whether there are a seat and pages for all tokens that a waiting request has.

        Pages that it would find in the prefix cache are not counted.
        """
        return self.num_free_seats > 0 and request.num_tokens <= self.num_free_pages * self.page_size

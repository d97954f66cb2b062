"""A plan in the making."""

from __future__ import annotations

from jaxllm.scheduling.plan import ScheduledRequest
from jaxllm.scheduling.sequence import ScheduledSequence


class Draft:
    """A plan in the making.

    Attributes:
        num_tokens_left: what is left of the token budget.
        num_seats_left: of how many more sequences it may sample the next token.
        scheduled: the plan's rows so far.
        sequences: the sequence of each row.
        computing: digests of the known pages that this plan computes, whole or in part.
        num_reserved_pages: pages that running sequences still need for tokens that exist already.
        preempted: whether somebody lost its pages for this plan.
        declined: whether the policy kept something back that could be computed.
        follows_policy: whether the policy is asked what to keep back.
    """

    __slots__ = (
        "computing",
        "declined",
        "follows_policy",
        "num_reserved_pages",
        "num_seats_left",
        "num_tokens_left",
        "preempted",
        "scheduled",
        "sequences",
    )

    def __init__(self, num_tokens: int, num_seats: int) -> None:
        self.num_tokens_left = num_tokens
        self.num_seats_left = num_seats
        self.scheduled: list[ScheduledRequest] = []
        self.sequences: list[ScheduledSequence] = []
        self.computing: set[bytes] = set()
        self.num_reserved_pages = 0
        self.preempted = False
        self.declined = False
        self.follows_policy = True

"""What runs when, and in which pages: the scheduler, its policies and its page accounts. No JAX."""

from __future__ import annotations

from jaxllm.scheduling.block_pool import NULL_PAGE, BlockPool, IntegrityError
from jaxllm.scheduling.plan import Plan, RequestUpdate, ScheduledRequest, StepResult, TokenLogprobs
from jaxllm.scheduling.policies import load_policy
from jaxllm.scheduling.policies.order import FirstComeFirstServed, Priority
from jaxllm.scheduling.policy import BudgetSplit, SchedulingPolicy
from jaxllm.scheduling.prefix_cache import PageHasher
from jaxllm.scheduling.replicas import ReplicatedScheduler, make_scheduler
from jaxllm.scheduling.scheduler import Scheduler
from jaxllm.scheduling.views import RequestView, StepView

__all__ = [
    "NULL_PAGE",
    "BlockPool",
    "BudgetSplit",
    "FirstComeFirstServed",
    "IntegrityError",
    "PageHasher",
    "Plan",
    "Priority",
    "ReplicatedScheduler",
    "RequestUpdate",
    "RequestView",
    "ScheduledRequest",
    "Scheduler",
    "SchedulingPolicy",
    "StepResult",
    "StepView",
    "TokenLogprobs",
    "load_policy",
    "make_scheduler",
]

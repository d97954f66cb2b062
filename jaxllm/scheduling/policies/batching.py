"""Policies that differ in what goes into a step together."""

from __future__ import annotations

from jaxllm.request import RequestStatus
from jaxllm.scheduling.policy import BudgetSplit, Rank, SchedulingPolicy
from jaxllm.scheduling.views import RequestView, StepView


class PrefillFirst(SchedulingPolicy):
    """Prompts before decodes, in steps of their own: vLLM's first scheduler (Kwon et al., SOSP 2023).

    The first token comes early; those who decode stand still whenever somebody arrives.
    """

    terms = ()

    def split_budget(self, step: StepView) -> BudgetSplit:
        """All for those who wait, as long as the first of them finds room and no prompt is half done."""
        waiting, running = step.waiting, step.running
        if not waiting or not step.has_room_for(waiting[0]) or any(in_prompt(view) for view in running):
            return BudgetSplit(step.num_tokens, step.num_tokens)
        return BudgetSplit(0, step.num_tokens)


class DecodeFirst(SchedulingPolicy):
    """Decodes first, chunks of prompts in the rest of a small budget (Sarathi-Serve, Agrawal et al., 2024).

    No step takes much longer than one that only decodes, so tokens come evenly; the first one waits
    for its chunks.

    Args:
        token_budget: tokens of a step. The paper's section 4.3 chooses it by the time between tokens
            that is allowed.
    """

    dynamic_ranks = True
    terms = ()

    def __init__(self, token_budget: int = 512) -> None:
        if token_budget < 1:
            raise ValueError(f"token_budget={token_budget} must be at least 1")
        self._token_budget = token_budget

    def rank(self, request: RequestView) -> Rank:
        """Those that decode, then those in their prompt, then those that wait."""
        if request.status is not RequestStatus.RUNNING:
            return 2
        return 1 if in_prompt(request) else 0

    def split_budget(self, step: StepView) -> BudgetSplit:
        """Those who wait get what the others leave of the budget."""
        running = step.running
        budget = min(step.num_tokens, max(self._token_budget, len(running)))
        wanted = sum(max(view.num_tokens - view.num_computed_tokens, 0) for view in running)
        return BudgetSplit(budget, max(budget - wanted, 0))


def in_prompt(request: RequestView) -> bool:
    """Whether a running request has more than its newest token to compute."""
    return request.num_tokens - request.num_computed_tokens > 1

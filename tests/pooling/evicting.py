"""A scheduling policy under which every long prompt loses its pages once, halfway."""

from __future__ import annotations

from collections.abc import Sequence

from jaxllm.scheduling import SchedulingPolicy
from jaxllm.scheduling.views import RequestView, StepView


class Evicting(SchedulingPolicy):
    def preempt(self, step: StepView) -> Sequence[RequestView]:
        return [r for r in step.running if not r.num_preemptions and r.num_computed_tokens > 20]

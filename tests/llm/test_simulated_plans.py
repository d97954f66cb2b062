"""Where all requests are there at the start, the simulator makes the plans that the engine makes."""

from __future__ import annotations

import random

import pytest

from jaxllm import LLM, SamplingParams, SchedulingTerms, TokensPrompt
from jaxllm.scheduling import Plan, load_policy
from jaxllm.scheduling.simulator import TracedRequest, simulate
from jaxllm.scheduling.simulator.costs import StepFeatures

Row = tuple[int, int, int, bool]


class Recorder:
    """Keeps the plans that it is asked to price."""

    def __init__(self) -> None:
        self.plans: list[list[Row]] = []

    def seconds(self, plan: Plan) -> float:
        self.plans.append([(int(e.request.request_id), *e[1:]) for e in plan.scheduled])
        return StepFeatures.of(plan).attended * 1e-6


@pytest.mark.parametrize("policy", ["fcfs", "sarathi", "srtf", "vtc"])
def test_plans_are_the_engines_own(policy: str) -> None:
    rng = random.Random(policy)
    trace = [
        TracedRequest(
            0.0,
            ((1 + index % 2, rng.randrange(1, 40)), (10 + index, rng.randrange(1, 30))),
            rng.randrange(1, 20),
            SchedulingTerms(tenant=rng.choice("ab")) if policy == "vtc" else SchedulingTerms(),
        )
        for index in range(24)
    ]
    with LLM(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=64, scheduling_policy=policy) as llm:
        scheduler, plans = llm.llm_engine.scheduler, Recorder()
        schedule = scheduler.schedule

        def recorded() -> Plan | None:
            plan = schedule()
            if plan is not None:
                plans.seconds(plan)
            return plan

        scheduler.schedule = recorded  # type: ignore[method-assign]
        vocab = llm.llm_engine.model_config.vocab_size
        llm.generate(
            # Other tokens, but equal and different where those of the trace are.
            [TokensPrompt(prompt_token_ids=[t % vocab for t in r.prompt_token_ids()]) for r in trace],
            [SamplingParams(temperature=0, max_tokens=r.output_len, ignore_eos=True) for r in trace],
            scheduling_terms=[r.terms for r in trace],
            use_tqdm=False,
        )
        simulated = Recorder()
        simulate(trace, scheduler.config, simulated, load_policy(policy))
    assert len(simulated.plans) > 50
    assert simulated.plans == plans.plans

"""The scheduler on a virtual clock: an hour of traffic in seconds, under any policy. No JAX.

The scheduler, the block pool, the prefix cache and the policy are those that serve. Only the device
is missing: a cost model says how long a step would take on it.
"""

from __future__ import annotations

from jaxllm.scheduling.simulator.costs import CostModel, ModelFigures, RooflineCost
from jaxllm.scheduling.simulator.devices import DEVICES, INTERCONNECTS, Device, Interconnect
from jaxllm.scheduling.simulator.fitted import FittedCost, RecordedStep
from jaxllm.scheduling.simulator.metrics import ReplicaSummary, Summary, summarize
from jaxllm.scheduling.simulator.simulate import (
    ReplicaStep,
    RequestRecord,
    Simulation,
    StepRecord,
    simulate,
)
from jaxllm.scheduling.simulator.this_machine import best_seconds, host_bandwidth, this_cpu
from jaxllm.scheduling.simulator.trace import TracedRequest, read_trace, write_trace
from jaxllm.scheduling.simulator.work import Shape, Tiles, Work
from jaxllm.scheduling.simulator.workloads import WORKLOADS, make_workload

__all__ = [
    "DEVICES",
    "INTERCONNECTS",
    "WORKLOADS",
    "CostModel",
    "Device",
    "FittedCost",
    "Interconnect",
    "ModelFigures",
    "RecordedStep",
    "ReplicaStep",
    "ReplicaSummary",
    "RequestRecord",
    "RooflineCost",
    "Shape",
    "Simulation",
    "StepRecord",
    "Summary",
    "Tiles",
    "TracedRequest",
    "Work",
    "best_seconds",
    "host_bandwidth",
    "make_workload",
    "read_trace",
    "simulate",
    "summarize",
    "this_cpu",
    "write_trace",
]

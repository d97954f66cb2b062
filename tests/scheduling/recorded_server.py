"""A server that is recorded, on a clock of its own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from jaxllm.request import Request
from jaxllm.scheduling import Plan
from jaxllm.scheduling.recording.recorder import Recorder
from jaxllm.scheduling.recording.schedule import Schedule
from jaxllm.scheduling.recording.schedule_recorder import ScheduleRecorder
from jaxllm.scheduling.simulator.work import Shape
from tests.scheduling.simulated_device import Server

SHAPES = [Shape(16, 8, False), Shape(128, 16, False), Shape(16, 16, True)]
ABOUT = {
    "model": "a <model>",
    "dtype": "float32",
    "device": "lists",
    "policy": "fcfs",
    "policy_config": {},
    "max_in_flight": 2,
    "shapes": [tuple(shape) for shape in SHAPES],
}

Entry = tuple[str, int, int, bool]


class Recorded(Server):
    """A server that is recorded, on a clock of its own: a millisecond passes with everything that happens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.now = 100.0
        self.recorders: list[Recorder] = []

    def tick(self) -> float:
        self.now += 1e-3
        return self.now

    def add(self, request: Request) -> None:
        request.arrival_time = self.tick()
        super().add(request)
        for recorder in self.recorders:
            recorder.arrived(request)

    def schedule(self) -> Plan | None:
        plan = super().schedule()
        if plan is not None:
            decode_only = plan.num_tokens == len(plan.scheduled)
            shape = next(s for s in SHAPES[::-1] if s.decode_only == decode_only)
            now = self.tick()
            for recorder in self.recorders:
                recorder.planned(plan, (shape[0], shape[1], 99, shape[2]), now)
        return plan

    def apply(self) -> Any:
        plan = self.outstanding[0] if self.outstanding else None
        updates = super().apply()
        if plan is not None:
            now = self.tick()
            for recorder in self.recorders:
                recorder.applied(plan, updates, now)
        return updates

    def record(self, path: Path) -> None:
        self.recorders.append(ScheduleRecorder(str(path), self.scheduler, ABOUT, 100.0))

    def close(self) -> None:
        for recorder in self.recorders:
            recorder.close()


def serve(server: Recorded, requests: list[Request], rng: random.Random) -> None:
    """Some arrive while others run."""
    waiting = list(requests)
    while waiting or server.scheduler.has_unfinished() or server.outstanding:
        for _ in range(min(rng.randrange(4), len(waiting))):
            server.add(waiting.pop(0))
        server.step()
    server.close()


def rows_of(schedule: Schedule, index: int) -> list[Entry]:
    return [(row.request.request_id, *row[1:]) for row in schedule.rows(index)]

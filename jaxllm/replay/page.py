"""A recorded schedule as one HTML page that needs nothing beside it, and no network."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxllm.scheduling.recording.schedule import RecordedPlan, RecordedRequest, Schedule

_TEMPLATE = Path(__file__).with_name("page.html")


def write_page(
    path: Path, schedule: Schedule, title: str, about: str, tiles: Sequence[tuple[str, str]]
) -> None:
    """Writes the page.

    Args:
        about: a line below the title.
        tiles: names and values of what stands out.
    """
    data = page_data(schedule) | {"title": title, "about": about, "tiles": [list(tile) for tile in tiles]}
    # Within a script element only "</" and "<!" mean anything.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = _TEMPLATE.read_text().replace("__TITLE__", html.escape(title)).replace("__DATA__", text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page)


def page_data(schedule: Schedule) -> dict[str, Any]:
    """What the page draws: columns of the steps, and of each request its runs."""
    # A step in flight when the recording broke off has no end, and those after it neither.
    steps = [step for step in schedule.steps if not math.isnan(step.ended)]
    return {
        "pages": schedule.num_usable_pages,
        "replicas": schedule.num_replicas,
        "steps": _columns(steps),
        "requests": [
            _request(request, len(steps))
            for request in sorted(
                schedule.requests.values(), key=lambda r: (r.replica, r.arrival_time, r.number)
            )
        ],
    }


def _columns(steps: Sequence[RecordedPlan]) -> dict[str, list[Any]]:
    return {
        "start": [round(step.ended - step.seconds, 6) for step in steps],
        "end": [round(step.ended, 6) for step in steps],
        "prompt": [step.num_prompt_tokens for step in steps],
        "output": [step.num_tokens - step.num_prompt_tokens for step in steps],
        "running": [step.num_running for step in steps],
        "waiting": [step.num_waiting for step in steps],
        "pages": [step.num_pages for step in steps],
        "out": [step.pages_out for step in steps],
        "in": [step.pages_in for step in steps],
        "lost": [len(step.preempted) for step in steps],
        "shape": [[step.shape.num_tokens, step.shape.num_seqs] for step in steps],
    }


def _request(request: RecordedRequest, num_steps: int) -> dict[str, Any]:
    return {
        "number": request.number,
        "id": request.request_id,
        "arrival": round(request.arrival_time, 6),
        "end": None if math.isnan(request.end_time) else round(request.end_time, 6),
        "prompt": request.num_prompt_tokens,
        "replica": request.replica,
        "runs": [
            [run.first_step, min(run.num_steps, num_steps - run.first_step), run.start, run.num_tokens]
            for run in request.runs
            if run.first_step < num_steps
        ],
        "lost": [step for step in request.preempted if step < num_steps],
    }

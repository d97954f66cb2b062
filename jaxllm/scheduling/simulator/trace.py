"""Requests as a trace has them: when they come, how long they are, what they share."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from jaxllm.request import NO_TERMS, SchedulingTerms


@dataclass(frozen=True, slots=True)
class TracedRequest:
    """One request of a trace.

    Attributes:
        arrival_time: seconds from the start of the trace.
        segments: the prompt, as (name, tokens) pairs: prompts that begin with equal pairs begin with
            equal tokens, which is what a prefix cache finds.
        output_len: tokens that it generates.
        terms: how it wants to be scheduled.
        output_name: what its output is called in the prompts that repeat it; 0 where none does.
    """

    arrival_time: float
    segments: tuple[tuple[int, int], ...]
    output_len: int
    terms: SchedulingTerms = NO_TERMS
    output_name: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return sum(length for _, length in self.segments)

    def prompt_token_ids(self) -> list[int]:
        """Tokens that stand for the prompt: equal where segments are, different elsewhere."""
        tokens: list[int] = []
        for name, length in self.segments:
            first = _first_token(name)
            tokens += range(first, first + length)
        return tokens

    def output_token_id(self, index: int) -> int:
        """The token that it generates after `index` others."""
        return _first_token(self.output_name) + index


def _first_token(name: int) -> int:
    return name * 1_000_003 % (1 << 30)  # apart by more than a prompt is long, but for rare accidents


def read_trace(path: Path) -> Iterator[TracedRequest]:
    """The requests of a file, in order of arrival.

    A line of JSON is a request as `write_trace` writes it, or has the columns of the Azure LLM
    inference traces (Patel et al. 2024: TIMESTAMP, ContextTokens, GeneratedTokens) or of BurstGPT
    (Wang et al. 2024: Timestamp, Request tokens, Response tokens). A `.csv` file has these columns, too.

    Raises:
        ValueError: a line that is none of them, with its number.
    """
    requests = []
    with path.open(newline="") as lines:
        rows: Iterable[Any] = csv.DictReader(lines) if path.suffix == ".csv" else map(_parse_line, lines)
        for number, row in enumerate(rows, start=1):
            try:
                requests.append(_from_row(row, number))
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path}, request {number}: {error}") from error
    # Failed requests of BurstGPT generate nothing.
    requests = sorted((r for r in requests if r.output_len > 0), key=lambda r: r.arrival_time)
    start = requests[0].arrival_time if requests else 0.0
    for request in requests:
        yield replace(request, arrival_time=request.arrival_time - start)


def _parse_line(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line


def _from_row(row: Any, number: int) -> TracedRequest:
    if not isinstance(row, dict):
        raise ValueError(f"{row!r} is no JSON object")
    if "segments" in row:
        terms = SchedulingTerms(**row.get("terms", {}))
        segments = tuple((int(name), int(length)) for name, length in row["segments"])
        output_name = int(row.get("output_name", 0))
        return TracedRequest(float(row["arrival_time"]), segments, int(row["output_len"]), terms, output_name)
    for time, prompt, output in (
        ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
        ("Timestamp", "Request tokens", "Response tokens"),
    ):
        if {time, prompt, output} <= row.keys():
            length = int(row[prompt])
            return TracedRequest(_seconds(row[time]), ((number, max(length, 1)),), int(row[output]))
    raise ValueError(f"its columns are {sorted(row)}, which no known trace has")


def _seconds(value: Any) -> float:
    try:
        return float(value)
    except ValueError:
        return datetime.fromisoformat(str(value)).timestamp()


def write_trace(path: Path, requests: Iterable[TracedRequest]) -> None:
    """Writes requests as lines of JSON."""
    with path.open("w") as lines:
        for request in requests:
            row = {
                "arrival_time": request.arrival_time,
                "segments": request.segments,
                "output_len": request.output_len,
                "terms": request.terms.given(),
                "output_name": request.output_name,
            }
            lines.write(json.dumps(row) + "\n")

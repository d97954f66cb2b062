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
from jaxllm.scheduling.recording.blocks import HashedRequest, SharedPrefixes
from jaxllm.scheduling.recording.lines import read_lines


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

    @classmethod
    def from_hashed(cls, hashed: HashedRequest, prefixes: SharedPrefixes) -> TracedRequest:
        """A recorded request; those that came before it have been made with the same `prefixes`."""
        segments, output_name = prefixes.add(hashed)
        return cls(hashed.arrival_time, segments, hashed.output_len, hashed.terms, output_name)

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

    A line of JSON is a request as `write_trace` writes it, or as a server recorded it (`--record-trace`),
    or has the columns of the Azure LLM inference traces (Patel et al. 2024: TIMESTAMP, ContextTokens,
    GeneratedTokens) or of BurstGPT (Wang et al. 2024: Timestamp, Request tokens, Response tokens). A
    `.csv` file has these columns, too; a file of JSON may be compressed, and ends in `.gz` then.

    Raises:
        ValueError: a line that is none of them, with its number.
    """
    requests: list[TracedRequest | HashedRequest] = []
    for number, row in enumerate(_rows(path), start=1):
        try:
            requests.append(_from_row(row, number))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}, request {number}: {error}") from error
    # Failed requests of BurstGPT generate nothing.
    requests = sorted((r for r in requests if r.output_len > 0), key=lambda r: r.arrival_time)
    start = requests[0].arrival_time if requests else 0.0
    prefixes = SharedPrefixes()
    for request in requests:
        if isinstance(request, HashedRequest):
            request = TracedRequest.from_hashed(request, prefixes)
        yield replace(request, arrival_time=request.arrival_time - start)


def _rows(path: Path) -> Iterator[Any]:
    if path.suffix == ".csv":
        with path.open(newline="") as lines:
            yield from csv.DictReader(lines)
    else:
        yield from map(_parse_line, read_lines(path))


def _parse_line(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return line.decode(errors="replace")


def _from_row(row: Any, number: int) -> TracedRequest | HashedRequest:
    if not isinstance(row, dict):
        raise ValueError(f"{row!r} is no JSON object")
    if "blocks" in row:
        return HashedRequest.from_row(row)
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

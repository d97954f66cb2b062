"""A recorded schedule in the terminal: its figures, one step, or step by step with keys."""

from __future__ import annotations

import math
import os
import re
import select
import sys
import termios
import tty
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from jaxllm.scheduling.recording.schedule import Row, Schedule

PROMPT, OUTPUT, LOST, CACHE = "blue", "green", "red", "yellow"
_KEYS = (
    "← → a step   PgUp PgDn ten   Home End   n p next, previous preemption   g go to   space play   q quit"
)
_PLAY = 0.1  # seconds for which a step is shown while playing


def draw_step(schedule: Schedule, index: int, *, height: int | None = None) -> RenderableType:
    """One step: its batch, its rows, the cache.

    Args:
        height: rows of requests that are shown at most.
    """
    step, usable = schedule.steps[index], schedule.num_usable_pages
    rows = list(schedule.rows(index))
    took = "has not ended" if math.isnan(step.seconds) else f"{step.seconds * 1e3:.2f} ms"
    title = Text.assemble(
        (f"Step {index}", "bold"), f" of {len(schedule.steps)}   at {step.planned:.3f} s, {took}   "
    )
    title.append(f"{step.num_prompt_tokens} prompt", PROMPT)
    title.append(" + ")
    title.append(f"{step.num_tokens - step.num_prompt_tokens} output tokens", OUTPUT)
    shape = step.shape
    kind = "decode" if shape.decode_only else "mixed"
    title.append(f"   compiled for {shape.num_tokens} tokens of {shape.num_seqs}, {kind}", "dim")
    state = Text(f"{step.num_running} run, {step.num_waiting} wait   ")
    if step.preempted:
        state.append(f"preempted: {', '.join(map(str, step.preempted))}   ", LOST)
    if step.pages_out or step.pages_in:
        state.append(f"pages copied to the host: {step.pages_out}, back: {step.pages_in}", CACHE)
    cache = Table.grid(padding=(0, 1))
    cache.add_row(
        "KV cache",
        Bar(usable, 0, step.num_pages, width=40, color=CACHE),
        f"{step.num_pages} of {usable} pages",
    )
    batches = [
        _batch([row for row in rows if row.request.replica == replica], shape.num_tokens)
        for replica in range(schedule.num_replicas)
    ]
    return Group(title, state, cache, *batches, _rows(rows, height, schedule.num_replicas > 1))


def _batch(rows: list[Row], size: int, width: int = 100) -> Text:
    """The packed batch, a cell for so many tokens; what the compiled shape leaves empty is dotted."""
    text, done, drawn = Text(), 0, 0
    for number, row in enumerate(rows):
        done += row.num_tokens
        cells = round(done * width / max(size, 1)) - drawn
        drawn += cells
        style = PROMPT if row.num_prompt_tokens else OUTPUT
        text.append("█▓"[number % 2] * cells, style)
    return text.append("·" * (width - drawn), "dim")


def _rows(rows: list[Row], height: int | None, replicas: bool) -> RenderableType:
    table = Table(box=None, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("", "request", "phase", "positions", "tokens", "prompt", "output", "preempted"):
        table.add_column(name, justify="left" if name in ("request", "phase") else "right", no_wrap=True)
    if replicas:
        table.add_column("replica", justify="right", no_wrap=True)
    shown = rows if height is None or len(rows) <= height else rows[: height - 1]
    for row in shown:
        request, end = row.request, row.start + row.num_tokens
        prompt = row.num_prompt_tokens > 0
        table.add_row(
            str(request.number),
            request.request_id[:40],
            Text("prompt" if prompt else "output", PROMPT if prompt else OUTPUT),
            f"{row.start} - {end - 1}" if row.num_tokens > 1 else str(row.start),
            str(row.num_tokens),
            str(request.num_prompt_tokens),
            str(max(end - request.num_prompt_tokens, 0)),
            str(len(request.preempted) or ""),
            *([str(request.replica)] if replicas else []),
        )
    if len(shown) < len(rows):
        return Group(table, Text(f"and {len(rows) - len(shown)} more", "dim"))
    return table


def interact(schedule: Schedule, console: Console) -> None:
    """Shows step after step, as keys say; returns when somebody quits."""
    last, index, playing, asked = len(schedule.steps) - 1, 0, False, ""
    lost = [i for i, step in enumerate(schedule.steps) if step.preempted]
    moves: dict[str, Callable[[int], int]] = {
        "\x1b[C": lambda i: i + 1,
        "l": lambda i: i + 1,
        "\x1b[D": lambda i: i - 1,
        "h": lambda i: i - 1,
        "\x1b[6~": lambda i: i + 10,
        "\x1b[5~": lambda i: i - 10,
        "\x1b[H": lambda i: 0,
        "\x1b[F": lambda i: last,
        "n": lambda i: next((k for k in lost if k > i), i),
        "p": lambda i: next((k for k in reversed(lost) if k < i), i),
    }
    with _raw_keys() as read_key, Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            foot = f"go to step: {asked[1:]}_" if asked else _KEYS
            room = max(console.height - 7 - schedule.num_replicas, 3)
            live.update(
                Group(draw_step(schedule, index, height=room), Text(f"\n{foot}", "dim")), refresh=True
            )
            key = read_key(_PLAY if playing else None)
            if asked:
                if key.isdigit():
                    asked += key
                    continue
                if key == "\x7f":
                    asked = asked[:-1]
                elif key in ("\r", "\n") and asked[1:]:
                    index, asked = min(int(asked[1:]), last), ""
                else:
                    asked = ""
            elif key in ("q", "\x03", "\x04", "\x1b"):
                return
            elif key == "g":
                asked = "g"
            elif key == " ":
                playing = not playing
            elif key in moves:
                index = min(max(moves[key](index), 0), last)
            elif not key:
                index, playing = min(index + 1, last), index + 1 < last


@contextmanager
def _raw_keys() -> Iterator[Callable[[float | None], str]]:
    """A function that gives the next key, or "" where none was pressed within so many seconds."""
    descriptor = sys.stdin.fileno()
    before = termios.tcgetattr(descriptor)
    pressed: deque[str] = deque()

    def read_key(timeout: float | None) -> str:
        if not pressed:
            if not select.select([descriptor], [], [], timeout)[0]:
                return ""
            text = os.read(descriptor, 1024).decode(errors="replace")
            # Keys such as arrows come as several characters; nothing at all is the end of the input.
            pressed.extend(re.findall(r"\x1b\[[0-9;]*[A-Za-z~]|.", text, re.DOTALL) or ["q"])
        return pressed.popleft()

    tty.setcbreak(descriptor)
    try:
        yield read_key
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)

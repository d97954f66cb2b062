"""Pictures of simulations, and one HTML file with all of them that needs nothing beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jaxllm.scheduling.simulator.metrics import Summary
from jaxllm.scheduling.simulator.simulate import Simulation, StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TIMELINE_BINS = 150

Table = tuple[Sequence[str], Sequence[Sequence[str]]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One simulation: a policy at a rate, None where the arrivals are those of a trace."""

    policy: str
    rate: float | None
    summary: Summary
    simulation: Simulation

    @property
    def traffic(self) -> str:
        """The rate in words."""
        return "the trace" if self.rate is None else f"{self.rate:g} requests/s"


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture as a PNG, with what it shows."""

    name: str
    caption: str
    png: bytes


def draw(outcomes: Sequence[Outcome]) -> list[Picture]:
    """All pictures: against the rate, the distributions at each rate, and each policy's time line.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rates = list(dict.fromkeys(outcome.rate for outcome in outcomes))
    pictures = []
    if len(rates) > 1:
        caption = "Goodput, mean times and fairness against the rate of arrivals."
        pictures.append(_picture("rates", caption, _against_rate, outcomes))
    for rate in rates:
        some = [outcome for outcome in outcomes if outcome.rate == rate]
        name = "distributions" if rate is None else f"distributions-{rate:g}"
        caption = f"Of all requests, the share whose times are at most so long: {some[0].traffic}."
        pictures.append(_picture(name, caption, _distributions, some))
    for outcome in outcomes:
        if outcome.rate == rates[-1]:
            caption = (
                f"{outcome.policy}, {outcome.traffic}: tokens computed, requests, KV cache in use. "
                f"{outcome.summary.num_preemptions} preemptions, marked in red."
            )
            pictures.append(_picture(f"timeline-{_file_name(outcome.policy)}", caption, _timeline, outcome))
    return pictures


def write_pictures(directory: Path, pictures: Sequence[Picture]) -> None:
    """Writes each as a PNG of its own."""
    directory.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (directory / f"{picture.name}.png").write_bytes(picture.png)


def write_html(path: Path, title: str, tables: Sequence[Table], pictures: Sequence[Picture]) -> None:
    """Writes tables, each its columns and rows, and pictures as one file."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>\n"

    figures = "".join(
        f'<figure><img alt="{html.escape(picture.caption)}" '
        f'src="data:image/png;base64,{base64.b64encode(picture.png).decode()}">'
        f"<figcaption>{html.escape(picture.caption)}</figcaption></figure>\n"
        for picture in pictures
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    body = "".join(
        "<table>\n" + cells("th", columns) + "".join(cells("td", row) for row in rows) + "</table>\n"
        for columns, rows in tables
    )
    path.write_text(
        f"<!doctype html>\n<html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>\n"
        f"<style>{_STYLE}</style>\n<h1>{html.escape(title)}</h1>\n{body}{figures}</html>\n"
    )


_STYLE = (
    "body{font:15px system-ui,sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}"
    "h1{font-size:1.4em}table{border-collapse:collapse;font-variant-numeric:tabular-nums;display:block;"
    "overflow-x:auto}td,th{padding:.3em .7em;text-align:right;border-bottom:1px solid #ddd;"
    "white-space:nowrap}"
    "td:first-child,th:first-child{text-align:left}figure{margin:2em 0}img{max-width:100%}"
    "figcaption{color:#555}"
)


def _file_name(policy: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in policy)


def _picture(name: str, caption: str, paint: Callable[..., Figure], what: Any) -> Picture:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure = paint(what)
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    pyplot.close(figure)
    return Picture(name, caption, data.getvalue())


def _panels(rows: int, columns: int, height: float) -> tuple[Figure, Any]:
    from matplotlib import pyplot

    return pyplot.subplots(rows, columns, figsize=(11, height), layout="constrained", squeeze=False)


def _against_rate(outcomes: Sequence[Outcome]) -> Figure:
    figures: dict[str, Callable[[Summary], float]] = {
        "goodput, requests/s": lambda s: s.goodput,
        "mean TTFT, s": lambda s: s.ttft.mean,
        "mean TPOT, ms": lambda s: s.tpot.mean * 1e3,
        "fairness (Jain)": lambda s: s.fairness,
    }
    figure, axes = _panels(1, len(figures), 3.2)
    for panel, (label, value) in zip(axes[0], figures.items(), strict=True):
        for policy in dict.fromkeys(outcome.policy for outcome in outcomes):
            own = [outcome for outcome in outcomes if outcome.policy == policy]
            panel.plot([o.rate for o in own], [value(o.summary) for o in own], "o-", label=policy)
        _logarithmic(panel.xaxis)
        panel.set_xlabel("requests/s")
        panel.set_title(label, fontsize=10)
        panel.grid(alpha=0.3)
    for panel in axes[0][1:3]:
        _logarithmic(panel.yaxis)
    axes[0][3].set_ylim(0, 1.05)
    axes[0][0].legend(fontsize=8)
    return figure


def _distributions(outcomes: Sequence[Outcome]) -> Figure:
    figure, axes = _panels(1, 3, 3.4)
    for panel, label in zip(axes[0], ("TTFT, s", "TPOT, s", "latency, s"), strict=True):
        _logarithmic(panel.xaxis)
        panel.set_xlabel(label)
        panel.set_ylim(0, 1.02)
        panel.grid(alpha=0.3)
    for outcome in outcomes:
        requests = outcome.simulation.requests
        _share(axes[0][0], [record.ttft for record in requests], outcome.policy)
        _share(axes[0][1], [record.tpot for record in requests if record.tpot is not None], outcome.policy)
        _share(axes[0][2], [record.latency for record in requests], outcome.policy)
    axes[0][0].set_ylabel("share of requests")
    axes[0][0].legend(fontsize=8)
    return figure


def _logarithmic(axis: Any) -> None:
    """A logarithmic axis whose ticks are plain numbers, few enough not to touch."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _share(panel: Axes, values: Sequence[float], label: str) -> None:
    ordered = np.sort(np.asarray(values))
    panel.plot(ordered, np.arange(1, len(ordered) + 1) / max(len(ordered), 1), label=label)


def _timeline(outcome: Outcome) -> Figure:
    steps = outcome.simulation.steps
    end = max(outcome.simulation.seconds, 1e-9)
    edges = np.linspace(0, end, _TIMELINE_BINS + 1)
    start = np.array([step.start for step in steps])
    place = np.clip(np.searchsorted(edges, start, side="right") - 1, 0, _TIMELINE_BINS - 1)

    def total(of: Callable[[StepRecord], float]) -> np.ndarray:
        return np.bincount(place, [of(step) for step in steps], _TIMELINE_BINS)

    num_replicas = outcome.simulation.num_replicas
    figure, axes = _panels(4, 1, 8.0) if num_replicas > 1 else _panels(3, 1, 6.0)
    tokens, requests, cache, *more = axes[:, 0]
    width = edges[1] - edges[0]
    computed = [total(lambda s: s.num_output_tokens) / width, total(lambda s: s.num_prompt_tokens) / width]
    tokens.stackplot(edges[:-1], computed, labels=["output", "prompt"], step="post", alpha=0.8)
    tokens.set_ylabel("tokens/s")
    tokens.legend(fontsize=8, loc="upper right")
    requests.plot(start, [step.num_running for step in steps], label="running")
    requests.plot(start, [step.num_waiting for step in steps], label="waiting")
    requests.set_ylabel("requests")
    requests.legend(fontsize=8, loc="upper right")
    cache.plot(start, [100 * step.kv_cache_usage for step in steps], color="tab:green")
    lost = np.diff([0, *(step.num_preemptions for step in steps)]) > 0
    cache.plot(start[lost], np.full(int(lost.sum()), 101.0), "|", color="tab:red")
    cache.set_ylim(0, 105)
    cache.set_ylabel("KV cache, %")
    axes[-1, 0].set_xlabel("s")
    if more and steps and steps[0].replicas:
        for replica in range(num_replicas):
            running = [step.replicas[replica].num_running for step in steps]
            more[0].plot(start, running, linewidth=0.8, label=f"replica {replica}")
        more[0].set_ylabel("running, by replica")
        if num_replicas <= 8:
            more[0].legend(fontsize=8, loc="upper right", ncols=4)
    return figure

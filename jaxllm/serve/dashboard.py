"""`python -m jaxllm.serve.dashboard > jaxllm.json`: a Grafana dashboard of the server's /metrics, to import.

The panels are data; the names in them are those of `jaxllm.stats.DESCRIPTIONS`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Any

from jaxllm.stats import DESCRIPTIONS, PREFIX

_WIDTH, _HEIGHT, _COLUMNS = 8, 7, 3


@dataclass(frozen=True, slots=True)
class Panel:
    """One plot.

    Attributes:
        unit: of Grafana.
        lines: what each line is called, and its PromQL, in which `$` begins the names of metrics.
    """

    title: str
    unit: str
    lines: tuple[tuple[str, str], ...]


def _rate(name: str) -> str:
    return f"sum(rate(${name}_total[1m]))"


def _percentiles(name: str) -> tuple[tuple[str, str], ...]:
    return tuple(
        (f"p{round(100 * q)}", f"histogram_quantile({q}, sum by (le) (rate(${name}_bucket[1m])))")
        for q in (0.5, 0.9, 0.99)
    )


PANELS = (
    Panel(
        "Tokens a second",
        "short",
        (("prompt", _rate("prompt_tokens")), ("generated", _rate("generation_tokens"))),
    ),
    Panel(
        "Sequences",
        "short",
        (("running", "sum($num_requests_running)"), ("waiting", "sum($num_requests_waiting)")),
    ),
    Panel("KV cache in use", "percentunit", (("used", "avg($kv_cache_usage_perc)"),)),
    Panel("Time to first token", "s", _percentiles("time_to_first_token_seconds")),
    Panel("Time between tokens", "s", _percentiles("inter_token_latency_seconds")),
    Panel("Time of a whole request", "s", _percentiles("e2e_request_latency_seconds")),
    Panel("Time in the queue", "s", _percentiles("request_queue_time_seconds")),
    Panel("Tokens of a step", "short", _percentiles("iteration_tokens_total")),
    Panel(
        "Prefix cache hits",
        "percentunit",
        (("hits", f"{_rate('prefix_cache_hits')} / {_rate('prefix_cache_queries')}"),),
    ),
    Panel(
        "Sequences that ended",
        "reqps",
        (("{{finished_reason}}", "sum by (finished_reason) (rate($request_success_total[1m]))"),),
    ),
    Panel("Preemptions", "short", (("a second", _rate("num_preemptions")),)),
    Panel("Prompt tokens of a sequence", "short", _percentiles("request_prompt_tokens")),
)


def dashboard() -> dict[str, Any]:
    """The dashboard, as Grafana imports it; it asks for the Prometheus data source."""
    source = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
    panels = []
    for i, panel in enumerate(PANELS):
        row, column = divmod(i, _COLUMNS)
        panels.append(
            {
                "id": i + 1,
                "type": "timeseries",
                "title": panel.title,
                "description": _description(panel),
                "datasource": source,
                "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
                "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                "targets": [
                    {
                        "refId": chr(ord("A") + j),
                        "legendFormat": name,
                        "expr": expression.replace("$", PREFIX),
                    }
                    for j, (name, expression) in enumerate(panel.lines)
                ],
            }
        )
    return {
        "__inputs": [
            {"name": "DS_PROMETHEUS", "label": "Prometheus", "type": "datasource", "pluginId": "prometheus"}
        ],
        "title": "jaxllm",
        "uid": "jaxllm",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "panels": panels,
    }


def _description(panel: Panel) -> str:
    """What the metrics of a panel say of themselves."""
    expressions = " ".join(expression for _, expression in panel.lines)
    return " ".join(text for name, text in DESCRIPTIONS.items() if f"${name}" in expressions)


if __name__ == "__main__":
    json.dump(dashboard(), sys.stdout, indent=2)
    print()

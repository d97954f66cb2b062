"""GET /metrics: the engine's statistics in the text format of Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from jaxllm.async_engine import AsyncEngine
from jaxllm.stats import DESCRIPTIONS, PREFIX, Counter, Gauge, Histogram, snapshot_metrics

_FAMILIES: dict[type, type[CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily]] = {
    Counter: CounterMetricFamily,
    Gauge: GaugeMetricFamily,
    Histogram: HistogramMetricFamily,
}


class EngineCollector(Collector):
    """Reads the engine's statistics when somebody scrapes, and keeps nothing of its own."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine = engine
        self._labels = {"model_name": model_name, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        """All families, each with its samples."""
        families: dict[str, Metric] = {}
        for metric in snapshot_metrics(self._engine.stats(), self._labels):
            family = families.get(metric.name)
            if family is None:
                documentation = DESCRIPTIONS[metric.name.removeprefix(PREFIX)]
                family = _FAMILIES[type(metric)](metric.name, documentation, labels=list(metric.labels))
                families[metric.name] = family
            labels = list(metric.labels.values())
            if isinstance(metric, Histogram):
                assert isinstance(family, HistogramMetricFamily)
                family.add_metric(labels, list(metric.buckets.items()), metric.sum)
            else:
                assert isinstance(metric, Counter | Gauge)
                assert isinstance(family, CounterMetricFamily | GaugeMetricFamily)
                family.add_metric(labels, metric.value)
        yield from families.values()

    def describe(self) -> list[Metric]:
        """Nothing: the names are known, and collecting on registration would touch the engine."""
        return []


def make_registry(engine: AsyncEngine, model_name: str) -> CollectorRegistry:
    """A registry of one server's own, so that several can live in one process."""
    registry = CollectorRegistry()
    registry.register(EngineCollector(engine, model_name))
    ProcessCollector(registry=registry)
    return registry

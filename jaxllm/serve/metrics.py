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


class EngineCollector(Collector):
    """Reads the engine's statistics when somebody scrapes, and keeps nothing of its own."""

    def __init__(self, engine: AsyncEngine, model_name: str) -> None:
        self._engine = engine
        self._labels = {"model_name": model_name, "engine": "0"}

    def collect(self) -> Iterator[Metric]:
        """All families, each with its samples."""
        families: dict[str, CounterMetricFamily | GaugeMetricFamily | HistogramMetricFamily] = {}
        for metric in snapshot_metrics(self._engine.stats(), self._labels):
            names, values = list(metric.labels), list(metric.labels.values())
            documentation = DESCRIPTIONS[metric.name.removeprefix(PREFIX)]
            family = families.get(metric.name)
            if isinstance(metric, Counter):
                if family is None:
                    family = CounterMetricFamily(metric.name, documentation, labels=names)
                family.add_metric(values, metric.value)
            elif isinstance(metric, Gauge):
                if family is None:
                    family = GaugeMetricFamily(metric.name, documentation, labels=names)
                family.add_metric(values, metric.value)
            elif isinstance(metric, Histogram):
                if family is None:
                    family = HistogramMetricFamily(metric.name, documentation, labels=names)
                assert isinstance(family, HistogramMetricFamily)
                family.add_metric(values, buckets=list(metric.buckets.items()), sum_value=metric.sum)
            assert family is not None
            families[metric.name] = family
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

from __future__ import annotations

import json
import re

from prometheus_client.parser import text_string_to_metric_families

from jaxllm.serve.dashboard import dashboard
from tests.serve.conftest import Api


def test_every_plot_is_of_metrics_that_there_are(api: Api) -> None:
    api.complete()
    samples = {
        sample.name
        for family in text_string_to_metric_families(api.get("/metrics").text)
        for sample in family.samples
    }
    panels = dashboard()["panels"]
    for panel in panels:
        assert panel["description"], panel["title"]
        for target in panel["targets"]:
            names = re.findall(r"jaxllm:\w+", target["expr"])
            assert names
            assert set(names) <= samples, target["expr"]
            assert "$" not in target["expr"]


def test_plots_do_not_overlap_and_fit_the_width() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in dashboard()["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert json.dumps(dashboard())

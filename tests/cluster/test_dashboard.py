"""The Grafana dashboard asks for metrics that exist, with labels that they have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ray

from cxr.runtime import metrics
from tests.conftest import REPOSITORY

DASHBOARD: dict[str, Any] = json.loads((REPOSITORY / "cluster" / "grafana_dashboard.json").read_text())
# To these, Prometheus' format appends _total.
COUNTERS = (metrics.IMAGES, metrics.REJECTS, metrics.REASONS, metrics.STEPS)


def queries() -> list[tuple[str, str]]:
    """Each query with the legend of its lines."""
    return [(target["expr"], target["legendFormat"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]


def test_the_metrics_exist() -> None:
    ours = {f"ray_{name}{'_total' if name in COUNTERS else ''}": set(metrics._DESCRIPTIONS[name][1]) for name in
            metrics._DESCRIPTIONS}  # fmt: skip
    rays = (Path(ray.__file__).parent / "dashboard/modules/reporter/reporter_agent.py").read_text()
    asked: set[str] = set()
    for query, legend in queries():
        names = set(re.findall(r"\bray_\w+", query))
        asked |= names
        for name in names - set(ours):
            assert f'"{name.removeprefix("ray_")}"' in rays, f"neither cxr nor Ray has {name}"
        labels = {*re.findall(r"\{(\w+)=", query), *re.findall(r"\{\{(\w+)\}\}", legend)}
        labels.update(*(group.split(", ") for group in re.findall(r"\bby \(([\w, ]+)\)", query)))
        if names & set(ours):
            assert labels <= set[str]().union(*(ours[name] for name in names & set(ours))), query
    assert set(ours) <= asked, "a metric of cxr is not shown"


def test_panels_do_not_overlap() -> None:
    places = [tuple(panel["gridPos"][key] for key in "xywh") for panel in DASHBOARD["panels"]]
    assert all(x + width <= 24 for x, _, width, _ in places)
    for number, (x, y, width, height) in enumerate(places):
        for x2, y2, width2, height2 in places[:number]:
            assert x + width <= x2 or x2 + width2 <= x or y + height <= y2 or y2 + height2 <= y
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)

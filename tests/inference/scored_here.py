"""`score()` in this process: parts are read and scored one after another, without Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest

from cxr.inference.part_scorer import PartScorer
from cxr.inference.plan import plan_inputs
from cxr.inference.plan_store import PlannedPart, StoredPlan
from cxr.inference.read import part_key
from cxr.inference.score_job import Job
from cxr.runtime import cluster
from cxr.runtime.progress import Progress


def score_parts(todo: Sequence[PlannedPart], job: Job, stored: StoredPlan, number: int, progress: Progress) -> None:
    """What `score_parts.score_parts` does on a cluster."""
    plan = plan_inputs(stored.origin, job.models)
    reader = replace(plan.reader(job.options.reading.gate), identity=job.identity, deadline=job.deadline)
    scorer = PartScorer(job.panel, job.out, plan, job.options, 1, job.deadline, number)
    for part in todo:
        key = part_key(part.name, part.images, part.plan, part.row_group)
        reply = scorer(reader.planned_rows(key))
        progress.add(reply["images"][0], len(reply["errors"][0]), json.loads(reply["seconds"][0]))


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """`score()` needs no cluster."""
    monkeypatch.setattr("cxr.inference.score_parts.score_parts", score_parts)
    monkeypatch.setattr(cluster, "connect", lambda: None)
    monkeypatch.setattr(cluster, "check_shared", lambda uri: None)
    monkeypatch.setattr(cluster, "total", lambda resource: {"CPU": 2.0}.get(resource, 0.0))

"""A search whose driver is killed resumes: no trial is lost, and none is trained twice."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest

from cxr.training.run_log import read_metrics
from tests.ray.fault_jobs import Job, alone, command
from tests.ray.fault_table import record

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
TRIALS, EPOCHS = 12, 6
SMALL = {"trials": TRIALS, "epochs": EPOCHS, "grace_period": EPOCHS, "size": 48, "phantoms": 60, "stored_size": 64}


def trials(out: Path) -> dict[str, list[dict]]:
    return {path.parent.name: read_metrics(str(path.parent)) for path in out.glob("trials/*/metrics.jsonl")}


def finished(out: Path) -> dict[str, list[dict]]:
    return {trial: rows for trial, rows in trials(out).items() if len(rows) == EPOCHS}


def test_a_killed_search_resumes(tmp_path: Path) -> None:
    out = tmp_path / "search"

    def search(*more: str) -> Job:
        words = [*command("tune_align", out=out, **SMALL), *more]
        return Job(words, alone(), tmp_path / "log", lambda: len(finished(out)))

    with search() as first:
        first.wait_for(1)
        time.sleep(12)  # Tune saves a search's state every ten seconds
        first.kill()
    before = finished(out)
    with search("--resume") as second:
        recovery = second.wait_for(len(before) + 1)
        seconds = second.finish()
    with (out / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == TRIALS
    assert {row["status"] for row in rows} == {"done"}
    assert {trial: finished(out)[trial] for trial in before} == before
    record("the driver is killed", "tune", "every trial once, with --resume", recovery, seconds, None)

"""A search whose driver is killed resumes: no trial is lost, and none is trained twice."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cxr.training.run_log import read_metrics
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
TRIALS, EPOCHS = 12, 6


def command(out: Path) -> list[str]:
    options = f"--trials {TRIALS} --epochs {EPOCHS} --grace-period {EPOCHS} --size 48 --no-lungs"
    options += " --phantoms 60 --stored-size 64"
    return [sys.executable, "jobs/tune_align.py", "--out", str(out), *options.split()]


def finished(out: Path) -> dict[str, list[dict]]:
    folders = (out / "trials").glob("*") if (out / "trials").exists() else []
    rows = {folder.name: read_metrics(str(folder)) for folder in folders}
    return {trial: kept for trial, kept in rows.items() if len(kept) == EPOCHS}


def test_a_killed_search_resumes(tmp_path: Path) -> None:
    out = tmp_path / "search"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(command(out), cwd=REPOSITORY, stdout=log, stderr=log, env=environment)
        while not finished(out) and driver.poll() is None:
            time.sleep(0.2)
        time.sleep(12)  # Tune saves a search's state every ten seconds
        driver.send_signal(signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL, "the search ended before it could be killed"
    before = finished(out)
    done = subprocess.run(
        [*command(out), "--resume"], cwd=REPOSITORY, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with (out / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert len(trials) == TRIALS
    assert {trial["status"] for trial in trials} == {"done"}
    assert {trial: finished(out)[trial] for trial in before} == before

"""A machine that is lost during a run or a search, which then finishes on the remaining machines."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cxr.training.run_log import read_metrics
from tests.conftest import REPOSITORY
from tests.ray.lost_node import EPOCHS, TRIALS

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]


def lose_a_node(how: str, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
    command = [sys.executable, "-m", "tests.ray.lost_node", how, str(folder)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=environment)
    lost = [line for line in done.stdout.splitlines() if line.startswith("lost at")]
    assert done.returncode == 0, done.stderr[-3000:]
    assert lost, done.stdout[-2000:]
    assert str(EPOCHS) not in lost[0], "all was done before the machine was lost"
    return done.stdout + done.stderr


@pytest.mark.parametrize("how", ["fixed", "elastic"])
def test_a_run_survives_the_loss_of_a_node(how: str, tmp_path: Path) -> None:
    said = lose_a_node(how, tmp_path)
    rows = read_metrics(str(tmp_path / "out"))
    assert [row["epoch"] for row in rows] == [*range(1, EPOCHS + 1)], said[-3000:]
    assert rows[0]["workers"] == 2
    assert rows[-1]["workers"] == (2 if how == "fixed" else 1)


def test_a_search_runs_lost_trials_again(tmp_path: Path) -> None:
    said = lose_a_node("search", tmp_path)
    trials = [read_metrics(str(folder)) for folder in (tmp_path / "out" / "trials").iterdir()]
    assert [len(rows) for rows in trials] == [EPOCHS] * TRIALS, said[-3000:]
    assert not [*tmp_path.rglob("failed.json")]

"""Training and searches on a cluster that loses a machine, with or without notice: they finish."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cxr.training.run_log import read_metrics
from tests.made_shards import write_shards
from tests.ray.fault_jobs import Job, command, epochs, same_weights
from tests.ray.fault_table import record
from tests.ray.machines import Machines, machines

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
EPOCHS, TRIALS = 8, 2


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_shards(tmp_path_factory.mktemp("inputs") / "shards", {"train": 64, "val": 8})


@pytest.fixture
def cluster() -> Iterator[Machines]:
    """Two machines with a CPU each."""
    with machines(2) as cluster:
        yield cluster


def train(shards: str, cluster: Machines, out: Path, **options: object) -> Job:
    small = {"size": 32, "batch_size": 8, "backbone": "conv3", "epochs": EPOCHS}
    return Job(
        command("train_align", archive=shards, out=out, **small, **options),
        cluster.variables,
        out.with_suffix(".log"),
        lambda: len(read_metrics(str(out))),
    )


def test_training_on_two_workers_survives_the_loss_of_a_machine(
    shards: str, cluster: Machines, tmp_path: Path
) -> None:
    with train(shards, cluster, tmp_path / "straight", workers=2) as job:
        undisturbed = job.finish()
    with train(shards, cluster, tmp_path / "out", workers=2) as job:
        job.wait_for(2)
        cluster.lose()
        cluster.add()
        pause = job.longest_pause()
    assert epochs(tmp_path / "out") == [*range(1, EPOCHS + 1)]
    assert same_weights(tmp_path / "out", tmp_path / "straight")
    record("a machine is lost and replaced", "train, 2 workers", "the same weights", pause, job.seconds, undisturbed)


def test_elastic_training_survives_the_loss_of_a_machine(shards: str, cluster: Machines, tmp_path: Path) -> None:
    with train(shards, cluster, tmp_path / "out", workers="1:2") as job:
        job.wait_for(2)
        cluster.lose()
        pause = job.longest_pause()
    assert epochs(tmp_path / "out") == [*range(1, EPOCHS + 1)]
    assert [row["workers"] for row in read_metrics(str(tmp_path / "out"))][:: EPOCHS - 1] == [2, 1]
    record("a machine is lost", "train, 1:2 workers", "all epochs, the rest on one", pause, job.seconds, None)


def test_a_search_runs_lost_trials_again(shards: str, cluster: Machines, tmp_path: Path) -> None:
    out = tmp_path / "out"
    small = {
        "size": 32,
        "batch_size": 8,
        "backbone": "conv3",
        "epochs": EPOCHS,
        "trials": TRIALS,
        "grace_period": EPOCHS,
    }
    search = command("tune_align", archive=shards, out=out, **small)

    def done() -> list[int]:
        return [len(read_metrics(str(path.parent))) for path in out.glob("trials/*/metrics.jsonl")]

    with Job(search, cluster.variables, tmp_path / "log", lambda: sum(done())) as job:
        while len(done()) < TRIALS or min(done()) < 2:
            job.wait_for(0)
            time.sleep(0.1)
        assert EPOCHS not in done(), "a trial ended before the machine was lost"
        cluster.lose()
        pause = job.longest_pause()
    assert done() == [EPOCHS] * TRIALS
    assert not [*tmp_path.rglob("failed.json")]
    record("a machine is lost", "tune", "all trials complete", pause, job.seconds, None)


def test_training_is_saved_before_an_announced_loss(shards: str, cluster: Machines, tmp_path: Path) -> None:
    """Without --max-failures: what was announced does not count as a failure."""
    made = write_shards(tmp_path / "shards", {"train": 4000, "val": 8})
    out = tmp_path / "out"
    with train(made, cluster, out, workers=2, max_failures=0) as job:
        job.wait_for(1)
        time.sleep(2)
        cluster.announce_loss(20)
        time.sleep(20)
        cluster.lose()
        cluster.add()
        pause = job.longest_pause()
    assert epochs(out) == [*range(1, EPOCHS + 1)]
    record("a machine is announced to be lost", "train, 2 workers", "all epochs", pause, job.seconds, None)

"""Ingest and scoring on a cluster with a machine that is lost, frozen or slow: they end as if undisturbed."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from cxr.phantom.archive import write_phantom
from tests.aligners import saved_aligner
from tests.ray.fault_jobs import Job, command, rows
from tests.ray.fault_table import record
from tests.ray.machines import Machines, machines

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
IMAGES, COPIES = 300, 20
PARTS, UNFINISHED = "*/part-*.parquet", "unfinished/*.parquet"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two archives and a checkpoint."""
    folder = tmp_path_factory.mktemp("inputs")
    write_phantom(str(folder / "archive"), IMAGES, size=64)
    pictures = sorted((folder / "archive").rglob("*.png"))
    (folder / "pictures").mkdir()
    for number, picture in enumerate(pictures * COPIES):
        os.link(picture, folder / "pictures" / f"{number:05d}.png")
    saved_aligner(folder / "checkpoint")
    return folder


def ingest(folder: Path, cluster: Machines, out: Path) -> Job:
    options = {"archive": folder / "archive", "out": out, "stored_size": 1024}
    words = command("ingest_archive", **options)
    return Job(words, cluster.variables, out.with_suffix(".log"), lambda: len([*out.glob(PARTS)]))


def score(folder: Path, cluster: Machines, out: Path) -> Job:
    options = {"archive": folder / "pictures", "source": "folder", "checkpoint": folder / "checkpoint", "out": out}
    words = command("score_archive", **options)
    return Job(words, cluster.variables, out.with_suffix(".log"), lambda: len([*out.glob(UNFINISHED)]))


Work = Callable[[Path, Machines, Path], Job]
FILES: dict[Work, str] = {ingest: PARTS, score: "scores/*.parquet"}
PLANNED: dict[Work, int] = {ingest: 20, score: 24}  # results


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> Callable[[Work], tuple[Path, float]]:
    """Where the undisturbed work has written, and its duration in seconds."""

    @cache
    def result(work: Work) -> tuple[Path, float]:
        out = folder / f"undisturbed-{work.__name__}"
        with machines(2) as cluster, work(folder, cluster, out) as job:
            return out, job.finish()

    return result


def lose_one(cluster: Machines, job: Job) -> float:
    cluster.lose()
    return job.longest_pause()


def freeze_one(cluster: Machines, job: Job) -> float:
    with cluster.frozen():
        return job.longest_pause()


def slow_one_down(cluster: Machines, job: Job) -> float:
    with cluster.slow(0.1):
        return job.longest_pause()


@pytest.mark.parametrize(
    ("work", "fault", "name"),
    [
        (ingest, lose_one, "a machine is lost"),
        (ingest, freeze_one, "a machine freezes"),
        (ingest, slow_one_down, "a machine has a tenth of its speed"),
        (score, lose_one, "a machine is lost"),
        (score, slow_one_down, "a machine has a tenth of its speed"),
    ],
)
def test_work_on_an_archive_ends_with_the_same_rows(
    work: Work,
    fault: Callable[[Machines, Job], float],
    name: str,
    folder: Path,
    undisturbed: Callable[[Work], tuple[Path, float]],
    tmp_path: Path,
) -> None:
    straight, seconds = undisturbed(work)
    with machines(2) as cluster, work(folder, cluster, tmp_path / "out") as job:
        job.wait_for(1)
        assert job.results() < PLANNED[work] / 2, "too late: most of the work is done"
        pause = fault(cluster, job)
        disturbed = job.seconds
    assert rows(tmp_path / "out", FILES[work]).equals(rows(straight, FILES[work]))
    record(name, work.__name__, "the same rows", pause, disturbed, seconds)

"""A machine whose memory runs out, so that Ray kills workers: jobs end as undisturbed ones do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest

from cxr.phantom.archive import write_phantom
from cxr.training.run_log import read_metrics
from tests.aligners import saved_aligner
from tests.made_shards import write_shards
from tests.ray.fault_jobs import Job, command, epochs, rows, same_weights
from tests.ray.fault_table import record
from tests.ray.machines import Machines, machines

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
ROOM, BALLAST = 4 << 30, 6 << 30  # bytes: what the machine has left before Ray kills workers, and what then fills it
KILLED = "Selected to kill"  # in the log of Ray's raylet
FAULT = "a worker is killed for memory"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machines]:
    memory = psutil.virtual_memory()
    if memory.available < ROOM + BALLAST:
        pytest.skip("needs 10 GiB of free memory")
    monkeypatch.setenv("RAY_memory_usage_threshold", f"{1 - (memory.available - ROOM) / memory.total:.3f}")
    with machines(1, cpus=2) as cluster:
        yield cluster


def longest_pause(job: Job, cluster: Machines) -> float:
    """That of a job while memory is full until Ray has killed a worker."""
    with ThreadPoolExecutor(1) as pool:
        filled = pool.submit(fill_memory, cluster)
        pause = job.longest_pause()
        filled.result()
    return pause


def fill_memory(cluster: Machines) -> None:
    ballast = np.ones(BALLAST, np.uint8)
    end = time.monotonic() + 60
    while KILLED not in cluster.log() and time.monotonic() < end:
        time.sleep(0.2)
    del ballast
    assert KILLED in cluster.log()


@pytest.mark.parametrize("work", ["ingest", "score"])
def test_work_on_an_archive(work: str, cluster: Machines, tmp_path: Path) -> None:
    write_phantom(str(tmp_path / "archive"), 300, size=64)
    network = saved_aligner(tmp_path / "network")
    more = {"score": {"checkpoint": network, "workers": 1}, "ingest": {"stored_size": 1024}}[work]
    results = {"score": "scores/*.parquet", "ingest": "*/part-*.parquet"}[work]
    parts = {"score": "unfinished/*.parquet", "ingest": results}[work]

    def job(out: Path) -> Job:
        words = command(f"{work}_archive", archive=tmp_path / "archive", out=out, **more)
        counted = lambda: len({*out.glob(parts), *out.glob(results)})  # noqa: E731
        return Job(words, cluster.variables, tmp_path / "log", counted)

    with job(tmp_path / "straight") as undisturbed:
        seconds = undisturbed.finish()
    with job(tmp_path / "out") as disturbed:
        disturbed.wait_for(1)
        pause = longest_pause(disturbed, cluster)
        duration = disturbed.seconds
    assert rows(tmp_path / "out", results).equals(rows(tmp_path / "straight", results))
    record(FAULT, work, "the same rows", pause, duration, seconds)


def test_training(cluster: Machines, tmp_path: Path) -> None:
    """Ray also kills the process that controls training, so that the job has to be started again."""
    made = write_shards(tmp_path / "shards", {"train": 64, "val": 8})
    settings = {"archive": made, "size": 32, "batch_size": 8, "backbone": "conv3", "epochs": 20}

    def job(out: Path, *more: str) -> Job:
        words = [*command("train_align", out=out, **settings), *more]
        return Job(words, cluster.variables, tmp_path / "log", lambda: len(read_metrics(str(out))))

    with job(tmp_path / "straight") as undisturbed:
        seconds = undisturbed.finish()
    with job(tmp_path / "out") as disturbed:
        disturbed.wait_for(1)
        fill_memory(cluster)
        assert disturbed.process.wait(120)
        assert "error: the process that controls training died" in disturbed.said
        assert "Traceback" not in disturbed.said
        done = disturbed.results()
    with job(tmp_path / "out", "--resume") as again:
        recovery = again.wait_for(done + 1)
        duration = again.finish()
    assert epochs(tmp_path / "out") == [*range(1, 21)]
    assert same_weights(tmp_path / "out", tmp_path / "straight")
    record(FAULT, "train", "stops with one line, then the same weights with --resume", recovery, duration, seconds)

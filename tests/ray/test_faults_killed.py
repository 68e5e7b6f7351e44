"""Jobs whose own process is killed: the same command continues, and the result is the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from cxr import schema
from cxr.phantom.archive import write_phantom
from cxr.training.run_log import read_metrics
from tests.aligners import saved_aligner
from tests.made_shards import write_shards
from tests.ray.fault_jobs import Job, alone, command, epochs, rows, same_weights
from tests.ray.fault_table import record

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
IMAGES, EPOCHS = 300, 20
FAULT = "the driver is killed"


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("archive"))
    write_phantom(folder, IMAGES, size=64)
    return folder


@pytest.mark.parametrize("work", ["ingest", "score"])
def test_a_killed_job_ends_with_the_same_rows(work: str, archive: str, tmp_path: Path) -> None:
    network = saved_aligner(tmp_path / "network")
    more = {"score": {"checkpoint": network, "workers": 1}, "ingest": {"stored_size": 512}}[work]
    results = {"score": "scores/*.parquet", "ingest": "*/part-*.parquet"}[work]
    parts = {"score": "unfinished/*.parquet", "ingest": results}[work]
    straight, killed = tmp_path / "straight", tmp_path / "killed"

    def job(out: Path) -> Job:
        words = command(f"{work}_archive", archive=archive, out=out, **more)
        return Job(words, alone(), tmp_path / "log", lambda: len({*out.glob(parts), *out.glob(results)}))

    with job(straight) as undisturbed:
        seconds = undisturbed.finish()
    with job(killed) as first:
        first.wait_for(1)
        first.kill()
    done = [*killed.glob(parts)]
    assert not (killed / "result.json").exists()
    times = {path: path.stat().st_mtime_ns for path in done}
    with job(killed) as second:
        recovery = second.wait_for(len(done) + 1)
        continued = second.finish()
    assert {path: path.stat().st_mtime_ns for path in done if path.exists()} == (times if results == parts else {})
    assert rows(killed, results).equals(rows(straight, results))
    assert len(set(rows(killed, results)[schema.IMAGE_ID].to_pylist())) == IMAGES
    record(FAULT, work, "the same rows, by the same command", recovery, continued, seconds)


def test_killed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    made = write_shards(tmp_path / "shards", {"train": 64, "val": 8})
    settings = {"archive": made, "epochs": EPOCHS, "size": 32, "batch_size": 8, "backbone": "conv3", "ema": 0.9}
    straight, killed = tmp_path / "straight", tmp_path / "killed"

    def job(out: Path, *more: str) -> Job:
        words = [*command("train_align", out=out, **settings), *more]
        return Job(words, alone(), tmp_path / "log", lambda: len(read_metrics(str(out))))

    with job(straight) as undisturbed:
        seconds = undisturbed.finish()
    with job(killed) as first:
        first.wait_for(1)
        first.kill()
    done = len(read_metrics(str(killed)))
    assert 0 < done < EPOCHS
    with job(killed, "--resume") as second:
        recovery = second.wait_for(done + 1)
        continued = second.finish()
    assert epochs(killed) == [*range(1, EPOCHS + 1)]
    assert same_weights(straight, killed)
    record(FAULT, "train", "the same weights, with --resume", recovery, continued, seconds)

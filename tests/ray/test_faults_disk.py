"""Jobs whose disk is full: they say so in one line, and the same command continues once there is space."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cxr import schema
from cxr.families import checkpoint
from cxr.phantom.archive import write_phantom
from cxr.training.run_log import read_metrics
from tests.aligners import saved_aligner
from tests.made_shards import write_shards
from tests.ray.fault_jobs import Job, alone, command, rows, run
from tests.ray.fault_table import record

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
IMAGES = 300


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def stop_and_continue(work: str, job: list[str], disk: Path, results: Callable[[], int], log: Path) -> None:
    """Run a job whose results do not fit onto the disk, then once more, with enough space, to its end."""
    said = run(job, code=2)
    assert "No space left on device: free some space" in said
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1
    done = results()
    subprocess.run(["mount", "-o", "remount,size=100m", disk], check=True)
    again = [*job, *["--resume"] * (work == "train")]
    with Job(again, alone(), log, results) as second:
        recovery = second.wait_for(done + 1)
        seconds = second.finish()
    end = f"stops with one line, then continues{' with --resume' * (work == 'train')}"
    record("the disk is full", work, end, recovery, seconds, None)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("archive"))
    write_phantom(folder, IMAGES, size=64)
    return folder


def test_ingest(archive: str, disk: Path, tmp_path: Path) -> None:
    out = disk / "out"
    job = command("ingest_archive", archive=archive, out=out, stored_size=128)  # 5 MB
    stop_and_continue("ingest", job, disk, lambda: len([*out.glob("*/part-*.parquet")]), tmp_path / "log")
    assert len(set(rows(out, "*/part-*.parquet")[schema.IMAGE_ID].to_pylist())) == IMAGES


def test_score(archive: str, disk: Path, tmp_path: Path) -> None:
    out, network = disk / "out", saved_aligner(tmp_path / "network")
    (disk / "ballast").write_bytes(bytes(900 << 10))
    job = command("score_archive", archive=archive, checkpoint=network, out=out)
    results = lambda: len({*out.glob("unfinished/*.parquet"), *out.glob("scores/*.parquet")})  # noqa: E731
    stop_and_continue("score", job, disk, results, tmp_path / "log")
    assert len(set(rows(out, "scores/*.parquet")[schema.IMAGE_ID].to_pylist())) == IMAGES


def test_train(disk: Path, tmp_path: Path) -> None:
    out, made = disk / "out", write_shards(tmp_path / "shards", {"train": 64, "val": 8}, size=64)
    job = command("train_align", archive=made, out=out, size=64, epochs=4, max_failures=0)
    stop_and_continue("train", job, disk, lambda: len(read_metrics(str(out))), tmp_path / "log")
    assert checkpoint.load(str(out / "checkpoint")).about["metrics"]

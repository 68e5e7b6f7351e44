"""Killed jobs, and jobs whose disk is full: the same command continues, and the result is the same."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema
from cxr.families import checkpoint
from cxr.families.align import AlignRecipe
from cxr.phantom.archive import write_phantom
from cxr.training.run_log import read_metrics
from tests.conftest import REPOSITORY
from tests.made_shards import write_shards

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
IMAGES, EPOCHS = 300, 20


def command(job: str, **options: object) -> list[str]:
    given = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, f"jobs/{job}.py", *given, *["--no-lungs"] * (job == "train_align")]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def run(job: list[str], code: int = 0) -> str:
    done = subprocess.run(job, cwd=REPOSITORY, capture_output=True, text=True, env=environment())
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stderr


def kill_when(job: list[str], out: Path, pattern: str, log: Path) -> None:
    """Start a job and kill it with SIGKILL as soon as its OUT contains a file that matches `pattern`."""
    with log.open("wb") as file:
        driver = subprocess.Popen(job, cwd=REPOSITORY, stdout=file, stderr=file, env=environment())
        while not any(out.glob(pattern)) and driver.poll() is None:
            time.sleep(0.02)
        driver.send_signal(signal.SIGKILL)
        assert driver.wait() == -signal.SIGKILL, log.read_text()[-3000:]
    time.sleep(5)  # its workers end a moment after it


def rows(out: Path, pattern: str) -> pa.Table:
    files = sorted(out.glob(pattern))
    return pa.concat_tables([pq.read_table(file) for file in files]).sort_by(schema.IMAGE_ID)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("archive"))
    write_phantom(folder, IMAGES, size=64)
    return folder


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder, recipe = tmp_path_factory.mktemp("kept"), AlignRecipe(size=32, backbone="conv3", lungs=False)
    network = recipe.network(())
    checkpoint.save(folder, recipe, recipe.task(network), network.state_dict(), findings=(), metrics={})
    return str(folder)


@pytest.mark.parametrize("job", ["ingest_archive", "score_archive"])
def test_a_killed_job_ends_with_the_same_rows(job: str, archive: str, kept: str, tmp_path: Path) -> None:
    more = {"score_archive": {"checkpoint": kept, "workers": 1}, "ingest_archive": {"stored_size": 512}}[job]
    results = "scores/*.parquet" if job == "score_archive" else "*/part-*.parquet"
    parts = "unfinished/*.parquet" if job == "score_archive" else results
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(command(job, archive=archive, out=straight, **more))
    kill_when(command(job, archive=archive, out=killed, **more), killed, parts, tmp_path / "log")
    done = [*killed.glob(parts)]
    assert done
    assert not (killed / "result.json").exists()
    times = {path: path.stat().st_mtime_ns for path in done}
    run(command(job, archive=archive, out=killed, **more))
    assert {path: path.stat().st_mtime_ns for path in done if path.exists()} == (times if results == parts else {})
    assert rows(killed, results).equals(rows(straight, results))
    assert len(set(rows(killed, results)[schema.IMAGE_ID].to_pylist())) == IMAGES


def test_killed_training_ends_with_the_same_weights(tmp_path: Path) -> None:
    made = write_shards(tmp_path / "shards", {"train": 64, "val": 8})
    settings = {"archive": made, "epochs": EPOCHS, "size": 32, "batch_size": 8, "backbone": "conv3", "ema": 0.9}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    run(command("train_align", out=straight, **settings))
    kill_when(command("train_align", out=killed, **settings), killed, "metrics.jsonl", tmp_path / "log")
    assert 0 < len(read_metrics(str(killed))) < EPOCHS
    run([*command("train_align", out=killed, **settings), "--resume"])
    assert [row["epoch"] for row in read_metrics(str(killed))] == [*range(1, EPOCHS + 1)]
    one, other = (checkpoint.load(f"{out}/checkpoint").network.state_dict() for out in (straight, killed))
    assert max((one[name] - other[name]).abs().max().item() for name in one) < 1e-4


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True).returncode:
        pytest.skip("needs the right to mount a disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_is_reported_and_the_job_resumes_once_there_is_space(small_disk: Path, archive: str) -> None:
    """Of 5 MB (300 images of 128 pixels), only about one megabyte of parts fits; then the same for training."""
    out = small_disk / "out"
    ingest = command("ingest_archive", archive=archive, out=out / "shards", stored_size=128)
    train = command("train_align", archive=out / "shards", out=out / "align", size=64, epochs=2, max_failures=0)
    said = run(ingest, code=2)
    assert "No space left on device: free some space" in said
    assert "Traceback" not in said
    assert not (out / "shards" / "archive.json").exists()
    grow(small_disk, "12m")
    run(ingest)
    (small_disk / "ballast").write_bytes(bytes(5 << 20))
    said = run(train, code=2)
    assert "No space left on device: free some space" in said
    (small_disk / "ballast").unlink()
    grow(small_disk, "100m")
    run([*train, "--resume"])
    assert len(set(rows(out / "shards", "*/part-*.parquet")[schema.IMAGE_ID].to_pylist())) == IMAGES
    assert checkpoint.load(str(out / "align" / "checkpoint")).about["metrics"]


def grow(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)

"""SIGINT and SIGTERM while a job works: it ends within seconds, says how to continue, and exits with 130 or 143."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cxr.families import checkpoint
from cxr.families.align import AlignRecipe
from cxr.phantom.archive import write_phantom
from tests.conftest import REPOSITORY
from tests.made_shards import write_shards
from tests.ray.fault_jobs import alone
from tests.ray.machines import machines

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]
SECONDS = 20  # Ray is given 8 to stop; the rest is for a busy machine
SMALL = ["--size", "32", "--batch-size", "8", "--backbone", "conv3", "--no-lungs", "--epochs", "1000"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive, shards and a checkpoint, enough to work on for longer than the tests wait."""
    folder = tmp_path_factory.mktemp("inputs")
    write_phantom(str(folder / "archive"), 300, size=64)
    write_shards(folder / "shards", {"train": 256, "val": 8})
    recipe = AlignRecipe(size=32, backbone="conv3", lungs=False)
    network = recipe.network(())
    checkpoint.save(
        folder / "checkpoint", recipe, recipe.task(network), network.state_dict(), findings=(), metrics={}
    )
    return folder


@pytest.fixture(scope="module", params=["private", "joined"])
def variables(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """The environment of a job that starts a cluster, or of one that joins a cluster."""
    if request.param == "private":
        yield alone()
        return
    with machines(1, cpus=2) as joined:
        yield joined.variables


JOBS = {
    "ingest_archive": (["--archive", "{folder}/archive", "--stored-size", "1024"], "*/part-*.parquet"),
    "train_align": (["--archive", "{folder}/shards", *SMALL], "metrics.jsonl"),
    "tune_align": (
        ["--archive", "{folder}/shards", *SMALL, "--trials", "4", "--grace-period", "1000"],
        "**/metrics.jsonl",
    ),
    "score_archive": (
        ["--archive", "{folder}/archive", "--checkpoint", "{folder}/checkpoint", "--workers", "1"],
        "unfinished/*.parquet",
    ),
}


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("job", JOBS)
def test_an_interrupted_job_ends_within_seconds_with_128_plus_the_signal(
    job: str, number: signal.Signals, code: int, folder: Path, variables: dict[str, str], tmp_path: Path
) -> None:
    arguments, at_work = JOBS[job]
    arguments = [word.format(folder=folder) for word in arguments]
    out, log = tmp_path / "out", tmp_path / "log"
    command = [sys.executable, f"jobs/{job}.py", *arguments, "--out", str(out)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=file, stderr=file, env=variables)
        while not any(out.glob(at_work)) and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, log.read_text()[-3000:]
        process.send_signal(number)
        try:
            ended = process.wait(SECONDS)
        finally:
            process.kill()
    said = log.read_text()
    assert ended == code, said[-3000:]
    assert "interrupted; run the same command again to continue" in said
    for unwanted in ("Traceback", "*** SIG", "KeyboardInterrupt", "core_worker", "gcs_", "raylet", "pid="):
        assert unwanted not in said, said[-3000:]
    assert not (out / "lease.json").exists()

"""A run of `cxr score` that is killed again and again at random ends with the bytes of an undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from cxr import storage
from cxr.phantom.archive import write_phantom
from tests.aligners import saved_aligner
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]
IMAGES, DIFFERENT, KILLS = 3000, 300, 20
PARTS = 12  # of at most 256 images


def command(archive: Path, network: str, out: Path) -> list[str]:
    options = {"archive": archive, "checkpoint": network, "out": out, "source": "folder", "workers": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return [sys.executable, "jobs/score_archive.py", "--new-only", *words]


def results(out: Path) -> dict[str, bytes]:
    """The files of scores, and of plans."""
    files = [*(out / "scores").rglob("*.parquet"), *(out / "increments").rglob("*.parquet")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def ledger(out: Path) -> list[dict[str, Any]]:
    """The ledger without times."""
    generations = storage.read_json(str(out / "ledger.json"))["generations"]
    for generation in generations:
        generation.pop("began")
        for increment in generation["increments"]:
            for name in ("committed", "images_per_s", "steady_images_per_s"):
                increment.pop(name)
    return generations


def parts(out: Path) -> int:
    return len([*out.glob("unfinished/*.parquet")])


def leases(out: Path) -> list[int]:
    """When the lease was last renewed."""
    return [path.stat().st_mtime_ns for path in out.glob("lease.json")]


def test_a_run_that_is_killed_at_random_ends_with_the_same_bytes(tmp_path: Path) -> None:
    write_phantom(str(tmp_path / "phantoms"), DIFFERENT, size=64)
    archive, network = tmp_path / "archive", saved_aligner(tmp_path / "network")
    archive.mkdir()
    for number, picture in enumerate(sorted((tmp_path / "phantoms").rglob("*.png")) * (IMAGES // DIFFERENT)):
        shutil.copyfile(picture, archive / f"{number:04d}.png")
    straight, log, generator = tmp_path / "straight", tmp_path / "log", random.Random(0)

    def started(out: Path) -> subprocess.Popen[bytes]:
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        with log.open("wb") as file:
            return subprocess.Popen(
                command(archive, network, out), cwd=REPOSITORY, stdout=file, stderr=file, env=environment
            )

    assert started(straight).wait() == 0, log.read_text()[-3000:]
    kills, between, runs = 0, 0, [tmp_path / "killed-0"]
    while kills < KILLS:
        out = runs[-1]
        watched = generator.choice([leases, parts])  # kill soon after the job has begun, or has written a part
        before, process = watched(out), started(out)
        while watched(out) == before and process.poll() is None:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 2))
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGKILL)
            assert process.wait() == -signal.SIGKILL
            kills += 1
            between += 0 < parts(out) < PARTS
            for left in psutil.wait_procs(children, timeout=10)[1]:  # agents of Ray notice it only after a minute
                left.kill()
        else:
            assert process.returncode == 0, log.read_text()[-3000:]
            runs.append(tmp_path / f"killed-{len(runs)}")
    assert started(runs[-1]).wait() == 0, log.read_text()[-3000:]
    print(f"{kills} kills, {between} of them with some of the parts written, over {len(runs)} runs")
    assert between >= KILLS / 4
    for out in runs:
        assert ledger(out) == ledger(straight)
        assert ledger(out)[0]["increments"][0]["images"] == IMAGES
        assert results(out) == results(straight)

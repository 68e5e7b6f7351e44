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

import pytest

from cluster.local_head import local_head
from cxr import storage
from cxr.phantom.archive import write_phantom
from tests.conftest import REPOSITORY
from tests.ray.test_nightly import saved_aligner

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]
IMAGES, DIFFERENT, KILLS = 3000, 300, 20


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
            for name in ("committed", "images_per_s"):
                increment.pop(name)
    return generations


def test_a_run_that_is_killed_at_random_ends_with_the_same_bytes(tmp_path: Path) -> None:
    write_phantom(str(tmp_path / "phantoms"), DIFFERENT, size=64)
    archive, network = tmp_path / "archive", saved_aligner(tmp_path / "network")
    archive.mkdir()
    for number, picture in enumerate(sorted((tmp_path / "phantoms").rglob("*.png")) * (IMAGES // DIFFERENT)):
        shutil.copyfile(picture, archive / f"{number:04d}.png")
    straight, killed, log = tmp_path / "straight", tmp_path / "killed", tmp_path / "log"
    generator = random.Random(0)
    with local_head(tmp_path / "head.log") as joined:
        environment = os.environ | joined
        start = time.monotonic()
        subprocess.run(command(archive, network, straight), cwd=REPOSITORY, env=environment, check=True)
        longest = time.monotonic() - start
        finished = 0
        for _ in range(KILLS):
            with log.open("wb") as file:
                process = subprocess.Popen(
                    command(archive, network, killed), cwd=REPOSITORY, stdout=file, stderr=file, env=environment
                )
                try:
                    finished += process.wait(generator.uniform(0.2, 0.8) * longest) == 0
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    assert process.wait() == -signal.SIGKILL
        assert finished < KILLS / 2, "most runs ended before they were killed"
        subprocess.run(command(archive, network, killed), cwd=REPOSITORY, env=environment, check=True)
    assert ledger(killed) == ledger(straight)
    assert ledger(killed)[0]["increments"][0]["images"] == IMAGES
    assert results(killed) == results(straight)

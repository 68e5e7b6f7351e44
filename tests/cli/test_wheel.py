"""The wheel works without the source tree: installed into an environment of its own, `cxr` scores X-rays."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from cxr.families import checkpoint
from cxr.families.align import AlignRecipe
from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(600)]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "cxr")


def run(*command: str | Path, folder: Path) -> str:
    """The standard output of a command in an environment that knows nothing of the source tree."""
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "RAY_ADDRESS"))
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def scripts(tmp_path: Path) -> Path:
    """The folder of programs of an environment with the wheel, and with the other packages of this environment."""
    source, wheels, environment = tmp_path / "source", tmp_path / "wheels", tmp_path / "environment"
    source.mkdir()
    for name in BUILT_FROM:
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, source / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, source, folder=tmp_path)
    run(sys.executable, "-m", "venv", "--without-pip", environment, folder=tmp_path)
    (wheel,) = wheels.glob("cxr-*.whl")
    run(*pip, "--python", environment / "bin/python", "install", "--no-deps", wheel, folder=tmp_path)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return environment / "bin"


def test_the_wheel_makes_and_scores_x_rays_in_an_empty_folder(scripts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    where = run(scripts / "python", "-c", "import cxr; print(cxr.__file__)", folder=folder)
    assert where.startswith(str(scripts.parent))
    recipe = AlignRecipe(size=32, backbone="conv3", lungs=False)
    task = recipe.task(recipe.network(()))
    checkpoint.save(tmp_path / "checkpoint", recipe, task, task.network.state_dict(), findings=(), metrics={})
    run(scripts / "cxr", "phantom", "--count", "3", "--size", "64", "--out", "phantom", folder=folder)
    arguments = ["--archive", "phantom", "--checkpoint", str(tmp_path / "checkpoint"), "--out", "scores"]
    lines = run(scripts / "cxr", "score", *arguments, folder=folder).splitlines()
    assert lines[-1] == str(folder / "scores/result.json")
    result = json.loads(Path(lines[-1]).read_text())
    assert result["job"] == "score"
    assert (result["images"], result["rejects"]) == (3, 0)

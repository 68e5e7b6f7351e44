"""The command line of a job answers quickly: heavy packages are imported only after the options are parsed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
JOBS = sorted(path.stem for path in (REPOSITORY / "jobs").glob("*.py"))
LIGHT = (
    "ingest_archive",
    "inspect_archive",
    "make_phantom",
    "report_run",
    "score_archive",
    "submit_siim",
    "submit_vinbigdata",
)
# A recipe's module holds its networks and losses, so the options of a training job import torch.
WITH_TORCH = [name for name in JOBS if name.startswith(("train_", "tune_", "study_"))]
PARSE_ALL = """
import importlib, sys
from cxr.runtime.job import parse

for name in sys.argv[2:]:
    parse(importlib.import_module(f"jobs.{name}").Options, [])
print(*(package for package in sys.argv[1].split(",") if package in sys.modules))
"""


@pytest.mark.parametrize(
    ("jobs", "heavy"),
    [
        (LIGHT, "torch,ray,matplotlib,optuna,pydicom,ultralytics,torchvision"),
        (WITH_TORCH, "ray,matplotlib,pydicom,ultralytics,torchvision"),
    ],
    ids=["without a recipe", "with a recipe"],
)
def test_parsing_options_imports_no_heavy_package(jobs: list[str], heavy: str) -> None:
    command = [sys.executable, "-c", PARSE_ALL, heavy, *jobs]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_mistakes_in_scoring_and_reports_are_reported_before_torch_is_imported(tmp_path: Path) -> None:
    wrong = (
        f'[("score_archive", ["--archive", "{tmp_path}/none"]), ("score_archive", ["--checkpoint", "{tmp_path}"]), '
        f'("ingest_archive", ["--archive", "{tmp_path}/none"]), '
        f'("inspect_archive", ["--archive", "{tmp_path}/none"]), ("report_run", ["--run", "{tmp_path}"]), '
        f'("submit_siim", ["--run", "{tmp_path}"]), ("submit_vinbigdata", ["--run", "{tmp_path}"])]'
    )
    script = f"""
import importlib, sys
from cxr.errors import UserError
from cxr.runtime.job import parse

for name, arguments in {wrong}:
    job = importlib.import_module(f"jobs.{{name}}")
    try:
        job.main(parse(job.Options, [*arguments, "--out", "{tmp_path}/out"]).job)
    except UserError as error:
        print(error)
print(*(package for package in ("torch", "ray", "matplotlib") if package in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8
    assert done.stdout.splitlines()[-1] == ""

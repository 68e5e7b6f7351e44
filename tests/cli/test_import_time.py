"""The command line answers quickly: heavy packages are imported only after the options are parsed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cxr.cli.commands import COMMANDS, FamilyCommand

REPOSITORY = Path(__file__).parents[2]
# A recipe's module holds its networks and losses, so the options of these import torch.
WITH_TORCH = [
    name
    for name, command in COMMANDS.items()
    if isinstance(command, FamilyCommand) or command.script.startswith("study_")
]
LIGHT = [name for name in COMMANDS if name not in WITH_TORCH and not name.startswith("benchmark ")]
PARSE_ALL = """
import sys
from cxr.cli.commands import COMMANDS

for name in sys.argv[2:]:
    COMMANDS[name].load().parse([])
print(*(package for package in sys.argv[1].split(",") if package in sys.modules))
"""
FIND = """
import sys
from cxr.cli import main

for words in (["--help"], ["train", "--help"], ["scroe"], ["train", "algin"]):
    sys.argv[1:] = words
    try:
        main.main()
    except SystemExit:
        pass
print(*(package for package in ("torch", "ray", "matplotlib", "tyro", "pyarrow", "numpy") if package in sys.modules))
"""


def test_help_and_mistyped_commands_import_no_command() -> None:
    done = subprocess.run([sys.executable, "-c", FIND], cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, ""), done.stderr


def test_processes_that_read_for_scoring_import_no_torch() -> None:
    code = "import sys, cxr.inference.read; print(*{'torch', 'ray'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


@pytest.mark.parametrize(
    ("names", "heavy"),
    [
        (LIGHT, "torch,ray,matplotlib,optuna,pydicom,ultralytics,torchvision"),
        pytest.param(WITH_TORCH, "ray,matplotlib,pydicom,ultralytics,torchvision", marks=pytest.mark.slow),
    ],
    ids=["without a recipe", "with a recipe"],
)
def test_parsing_options_imports_no_heavy_package(names: list[str], heavy: str) -> None:
    command = [sys.executable, "-c", PARSE_ALL, heavy, *names]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr


def test_mistakes_in_scoring_and_reports_are_reported_before_torch_is_imported(tmp_path: Path) -> None:
    wrong = (
        f'[("score", ["--archive", "{tmp_path}/none"]), ("score", ["--checkpoint", "{tmp_path}"]), '
        f'("ingest", ["--archive", "{tmp_path}/none"]), ("inspect", ["--archive", "{tmp_path}/none"]), '
        f'("report", ["--run", "{tmp_path}"]), ("export kaggle-siim", ["--run", "{tmp_path}"]), '
        f'("export kaggle-vinbigdata", ["--run", "{tmp_path}"])]'
    )
    script = f"""
import sys
from cxr.cli.commands import COMMANDS
from cxr.errors import UserError

for name, arguments in {wrong}:
    job = COMMANDS[name].load()
    try:
        job.main(job.parse([*arguments, "--out", "{tmp_path}/out"]).job)
    except UserError as error:
        print(error)
print(*(package for package in ("torch", "ray", "matplotlib") if package in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 8
    assert done.stdout.splitlines()[-1] == ""

"""README.md is true: its map lists the files that exist, its commands name jobs and options that exist."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from cxr.job import parse

REPOSITORY = Path(__file__).parents[1]
FOLDERS = ("cxr", "jobs", "cluster")
README = (REPOSITORY / "README.md").read_text()


def mapped() -> dict[str, str]:
    """Path -> its line in the map; a line that is indented belongs to the folder above it."""
    lines = README.partition("## Map")[2].split("```")[1].splitlines()
    folder, found = "", {}
    for line in filter(None, lines):
        name, _, text = line.strip().partition(" ")
        folder = folder if line.startswith(" ") else name if name.endswith("/") else ""
        found[name if name == folder else folder + name] = text.strip()
    return found


def test_map_lists_what_exists() -> None:
    files = (path for folder in FOLDERS for path in (REPOSITORY / folder).rglob("*") if path.is_file())
    named = {str(path.relative_to(REPOSITORY)) for path in files if "__pycache__" not in path.parts}
    named -= {name for name in named if name.endswith("__init__.py")}
    listed = {name for name in mapped() if name.startswith(FOLDERS) and not name.endswith("/")}
    assert listed - {"cluster.yaml"} == named


def test_every_file_of_the_map_has_its_line() -> None:
    assert [name for name, text in mapped().items() if not name.endswith("/") and not text] == []


def commands() -> list[str]:
    """`python jobs/….py …` of README's code blocks, continued lines joined, comments dropped."""
    blocks = "\n".join(README.split("```")[1::2]).replace("\\\n", " ")
    return [match.partition(" #")[0] for match in re.findall(r"python (jobs/\S+\.py.*)", blocks)]


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command: str) -> None:
    script, *arguments = shlex.split(command)
    job = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    assert parse(job.Options, arguments).job.out in arguments

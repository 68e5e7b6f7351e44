"""The commands in README, docs and job docstrings, and a check that a job's own parser accepts one."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from cxr.cli.options import TuneOptions
from cxr.runtime.job import parse
from cxr.training.search import objectives_of, searched

REPOSITORY = Path(__file__).parents[1]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
JOBS = sorted((REPOSITORY / "jobs").glob("*.py"))


def texts() -> dict[str, str]:
    """Every page, and the docstring of every job, by path."""
    pages = {str(path.relative_to(REPOSITORY)): path.read_text() for path in PAGES}
    return pages | {f"jobs/{path.name}": ast.get_docstring(ast.parse(path.read_text())) or "" for path in JOBS}


def commands() -> list[tuple[str, str]]:
    """`python jobs/NAME.py …` in code blocks, in `inline code` and in docstrings, with its location.

    Continued lines are joined, comments dropped. Names in capitals (OUT, ARCHIVE) stand for a value.
    """
    found = []
    for place, text in texts().items():
        joined = re.sub(r"\\\s*\n\s*", " ", text)
        inline = re.findall(r"`(python jobs/[^`]+)`", joined)
        lines = re.findall(r"^(?!.*`python jobs/).*?(python jobs/\S+\.py.*)$", joined, re.MULTILINE)
        found += [(place, command.partition(" #")[0]) for command in (*inline, *lines)]
    return [(place, command) for place, command in found if "NAME.py" not in command]


def check(command: str, scratch: Path) -> None:
    """Parse a command with the options of its job; fails if it is not accepted."""
    script, *arguments = shlex.split(command.removeprefix("python "))
    job = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    if "--recipe" in arguments:  # the file is the reader's own
        recipe = scratch / "recipe.yaml"
        recipe.write_text(f"family: {script.rpartition('_')[2].removesuffix('.py')}\n")
        arguments[arguments.index("--recipe") + 1] = str(recipe)
    if "--help" in arguments:
        with pytest.raises(SystemExit) as ended:
            parse(job.Options, arguments)
        assert ended.value.code == 0
        return
    options = parse(job.Options, arguments).job
    if isinstance(options, TuneOptions):  # else mistakes in these names end the job later
        objectives_of(options.recipe, options.search)
        searched(options.recipe, options.search)
    if "--out" in arguments:
        assert options.out == arguments[arguments.index("--out") + 1]

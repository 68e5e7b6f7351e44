"""The commands in README, docs and docstrings, and a check that the command's own parser accepts one."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest

from cxr.cli.commands import COMMANDS, GROUPS, FamilyCommand
from cxr.cli.main import find
from cxr.cli.options import TuneOptions
from cxr.data import embeddings
from cxr.families.checkpoint_files import read_about
from cxr.families.classify import ClassifyRecipe
from cxr.training.search import objectives_of, searched
from tests.saved_checkpoint import save_untrained

REPOSITORY = Path(__file__).parents[1]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
]
JOBS = sorted((REPOSITORY / "jobs").glob("*.py"))
_BY_SCRIPT = {f"jobs/{command.script}.py": command for command in COMMANDS.values() if command.script}
# `cxr score …` at the start of a line, after `ray job submit … --`, or as the image and arguments of `docker run`.
_CXR = re.compile(r"^\s*(?:\$ |ray job submit (?:.* )?-- |docker run .* )?(cxr [a-z].*)$", re.MULTILINE)


def texts() -> dict[str, str]:
    """Every page, the docstring of every job and the examples of every command, by path or name."""
    pages = {str(path.relative_to(REPOSITORY)): path.read_text() for path in PAGES}
    pages |= {f"jobs/{path.name}": ast.get_docstring(ast.parse(path.read_text())) or "" for path in JOBS}
    for path in sorted((REPOSITORY / "cxr/cli/commands").glob("[!_]*.py")):
        pages[str(path.relative_to(REPOSITORY))] = ast.get_docstring(ast.parse(path.read_text())) or ""
    families = [command for command in COMMANDS.values() if isinstance(command, FamilyCommand)]
    return pages | {f"cxr {command.name} --help": "\n".join(command.examples) for command in families}


def commands() -> list[tuple[str, str]]:
    """`cxr …` and `python jobs/NAME.py …` in code blocks, in `inline code` and in docstrings, with their location.

    Continued lines are joined, comments dropped. Names in capitals (OUT, ARCHIVE) stand for a value.
    """
    found = []
    for place, text in texts().items():
        joined = re.sub(r"\\\s*\n\s*", " ", text)
        inline = re.findall(r"`((?:python jobs/|cxr [a-z])[^`]+)`", joined)
        lines = re.findall(r"^(?!.*`python jobs/).*?(python jobs/\S+\.py.*)$", joined, re.MULTILINE)
        lines += _CXR.findall(_code(joined) if place.endswith(".md") else joined)
        found += [(place, re.split(r"\s#", command)[0]) for command in (*inline, *lines)]
    return [(place, command) for place, command in found if not re.search(r"NAME\.py|^cxr \w+ [A-Z]+\b", command)]


def _code(page: str) -> str:
    """The lines of a page's code blocks: fenced, or indented by four spaces."""
    fenced = re.findall(r"^```\w*\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    return "\n".join([*fenced, *re.findall(r"^    .*$", page, re.MULTILINE)])


def _no_embeddings(scratch: Path) -> str:
    """A scoring run with the embeddings of no image."""
    (scratch / embeddings.FOLDER).mkdir()
    network = save_untrained(scratch / "network", ClassifyRecipe(size=32))
    about = {"checkpoint": network, "sha256": read_about(network)["sha256"], "archives": []}
    embeddings.finish(str(scratch / embeddings.FOLDER), [], about)
    return str(scratch)


def check(text: str, scratch: Path) -> None:
    """Parse a command line with the options of its command; fails if it is not accepted."""
    program, *arguments = shlex.split(text)
    if program == "python":
        command, arguments = _BY_SCRIPT[arguments[0]], arguments[1:]
    elif arguments[0] in GROUPS and arguments[1:] in ([], ["--help"]):
        return
    else:
        command, arguments = find(arguments)
    job = command.load()
    if command.name == "submit" and "--" in arguments:
        submitted = job.parse(arguments).job.command
        return check(shlex.join(["cxr", *submitted]), scratch)
    if "--recipe" in arguments:  # the file is the reader's own
        recipe = scratch / "recipe.yaml"
        recipe.write_text(f"family: {command.name.partition(' ')[2]}\n")
        arguments[arguments.index("--recipe") + 1] = str(recipe)
    if "--embeddings" in arguments:  # these, too
        arguments[arguments.index("--embeddings") + 1] = _no_embeddings(scratch)
    if "--help" in arguments:
        with pytest.raises(SystemExit) as ended:
            job.parse(arguments)
        assert ended.value.code == 0
        return
    options = job.parse(arguments).job
    if (
        isinstance(options, TuneOptions) and "--embeddings" not in arguments
    ):  # else mistakes in these names end the job later
        objectives_of(options.recipe, options.search)
        searched(options.recipe, options.search)
    if "--out" in arguments:
        assert options.out == arguments[arguments.index("--out") + 1]

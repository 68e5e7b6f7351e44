"""Commands in docs and docstrings name commands and options that exist; links and paths lead to files."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from cxr.cli.commands import COMMANDS
from tests.doc_commands import JOBS, PAGES, REPOSITORY, check, commands, texts


def different_commands() -> list[Any]:
    """All commands but the README's; those with the same words and options as an earlier one are marked slow."""
    found: dict[object, list[str]] = {}
    for command in dict.fromkeys(command for place, command in commands() if place != "README.md"):
        words = command.split()
        options = frozenset(word for word in words if word.startswith("--"))
        found.setdefault((*words[:3], options), []).append(command)
    repeated = [pytest.param(command, marks=pytest.mark.slow) for _, *others in found.values() for command in others]
    return [*(first for first, *_ in found.values()), *repeated]


@pytest.mark.parametrize("command", different_commands())
def test_commands_are_accepted(command: str, tmp_path: Path) -> None:
    check(command, tmp_path)


def test_enough_commands_are_found() -> None:
    places = {place for place, _ in commands()}
    assert {
        "README.md",
        "docs/how-to/aecnn.md",
        "docs/how-to/recipes.md",
        "jobs/train_localize.py",
        "cxr/cli/commands/score.py",
    } <= places
    assert len(commands()) > 100


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert [link for link in links if "://" not in link and not (page.parent / link).exists()] == []


def test_paths_of_code_exist() -> None:
    missing = []
    for place, text in texts().items():
        named = re.findall(r"`((?:cxr|jobs|tests|docs|cluster)/[\w/.-]+\.\w+)`", text)
        missing += [
            f"{place} names {path}" for path in named if "FAMILY" not in path and not (REPOSITORY / path).exists()
        ]
    assert missing == []


def test_the_site_lists_every_page() -> None:
    def pages(entry: object) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        values = entry.values() if isinstance(entry, dict) else entry
        return [page for value in values for page in pages(value)]  # pyright: ignore[reportGeneralTypeIssues]

    listed = set(pages(yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text())["nav"]))
    docs = REPOSITORY / "docs"
    files = [*docs.rglob("*.md"), *(docs / "tutorials").glob("*.py")]
    assert listed == {str(path.relative_to(docs).with_suffix(".md")) for path in files}


def test_every_command_is_in_the_reference() -> None:
    reference = (REPOSITORY / "docs/reference/cli.md").read_text()
    listed = re.findall(r"^\| `cxr ([a-z -]+)` \| (?:`(\w+)\.py`)? *\| (.*) \|$", reference, re.MULTILINE)
    assert sorted(listed) == sorted((c.name, c.script, c.summary) for c in COMMANDS.values())


def test_every_script_runs_the_command_that_names_it() -> None:
    run = {path.stem: re.findall(r'^    run\("(.+)"\)$', path.read_text(), re.MULTILINE) for path in JOBS}
    assert run == {c.script: [c.name] for c in COMMANDS.values() if c.script}


def test_messages_and_pages_install_extras_that_exist_in_one_form() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = {*project["optional-dependencies"], "EXTRA"}
    sources = [*PAGES, *(REPOSITORY / "cxr").rglob("*.py")]
    named = [(path, *one) for path in sources for one in re.findall(r"'(cxr|\.)\[([\w,-]+)\]'", path.read_text())]
    assert {path.suffix for path, *_ in named} == {".md", ".py"}
    assert [name for _, _, names in named for name in names.split(",") if name not in extras] == []
    downloads = {path.name for path, package, _ in named if package == "."}  # before cxr is installed
    assert downloads == {"offline.md", "README.md"}

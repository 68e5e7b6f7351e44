"""README is short, and its commands name jobs and options that exist."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.doc_commands import REPOSITORY, check, commands


@pytest.mark.parametrize("command", [command for place, command in commands() if place == "README.md"])
def test_commands_are_accepted(command: str, tmp_path: Path) -> None:
    check(command, tmp_path)


def test_readme_is_short() -> None:
    assert 120 <= len((REPOSITORY / "README.md").read_text().splitlines()) <= 200

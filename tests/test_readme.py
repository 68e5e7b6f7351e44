"""The commands in README.md name jobs and options that exist."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path

import pytest

from cxr.runtime.job import parse

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()


def commands() -> list[str]:
    """`python jobs/….py …` of README's code blocks, continued lines joined, comments dropped."""
    blocks = "\n".join(README.split("```")[1::2]).replace("\\\n", " ")
    return [match.partition(" #")[0] for match in re.findall(r"python (jobs/\S+\.py.*)", blocks)]


@pytest.mark.parametrize("command", commands())
def test_commands_are_understood(command: str) -> None:
    script, *arguments = shlex.split(command)
    job = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    assert parse(job.Options, arguments).job.out in arguments

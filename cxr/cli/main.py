"""The program `cxr`: finds the command that its first words name, and only then imports that command's module."""

from __future__ import annotations

import difflib
import itertools
import os
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import NoReturn

import cxr
from cxr.cli.commands import COMMANDS, GROUPS, Command
from cxr.errors import UserError
from cxr.runtime import console

COMPLETION = ("--tyro-print-completion", "--tyro-write-completion")
_HELP = ("-h", "--help")


def main() -> None:
    """Run the command line of `cxr`."""
    words = sys.argv[1:]
    try:
        _main(words)
        sys.stdout.flush()
    except UserError as mistake:
        console.reject(mistake, words)
    except BrokenPipeError:  # `cxr score --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes again when it ends
        sys.exit(1)


def _main(words: list[str]) -> None:
    if words and (option := words[0].replace("_", "-")) in COMPLETION:
        from cxr.cli.completion import write_completion

        write_completion([option, *words[1:]])
    elif not words or words[0] in _HELP:
        print(_overview())
    elif words == ["--version"]:
        print(cxr.__version__)
    elif words[0] in GROUPS and words[1:2] and words[1] in _HELP:
        print(_group(words[0]))
    else:
        command, arguments = find(words)
        command.run(arguments, f"cxr {command.name}")


def run(name: str) -> NoReturn:
    """Run a command from its script in jobs/, with the script's arguments."""
    COMMANDS[name].run(sys.argv[1:])


def find(words: Sequence[str]) -> tuple[Command, list[str]]:
    """The command that these words begin with, and the words that are left.

    Raises:
        UserError: there is no such command; the message names the nearest one.
    """
    for count in (1, 2):
        if command := COMMANDS.get(" ".join(words[:count])):
            return command, list(words[count:])
    given = " ".join(itertools.takewhile(lambda word: not word.startswith("-"), words[:2])) or words[0]
    if words[0] in GROUPS:
        placeholder, names = GROUPS[words[0]][0], _of_group(words[0])
        expected = f"expected `cxr {words[0]} {placeholder}` with {placeholder} one of {', '.join(names)}"
    else:
        expected = f"expected a command: {', '.join(dict.fromkeys(name.partition(' ')[0] for name in COMMANDS))}"
    known = [*COMMANDS, *GROUPS, "--help", "--version"]
    near = difflib.get_close_matches(given.lower(), known, n=1)
    near = near or difflib.get_close_matches(words[0].lower(), known, n=1)
    hint = f" Did you mean `cxr {near[0]}`?" if near and near[0] != words[0] else ""
    raise UserError(f"{expected}; got `cxr {given}`.{hint}")


def _of_group(first: str) -> list[str]:
    return [name.partition(" ")[2] for name in COMMANDS if name.startswith(f"{first} ")]


def _overview() -> str:
    rows = {}
    for name, command in COMMANDS.items():
        first = name.partition(" ")[0]
        if first in GROUPS:
            placeholder, summary = GROUPS[first]
            rows[f"{first} {placeholder}"] = f"{summary} {placeholder}: {', '.join(_of_group(first))}."
        else:
            rows[name] = command.summary
    return (
        "usage: cxr COMMAND [OPTIONS]\n\n"
        "Train chest X-ray models on a Ray cluster and score whole hospital archives with them.\n\n"
        f"{_columns(rows)}\n\n"
        "`cxr COMMAND --help` explains the options of a command, `cxr train --help` lists what can be trained,\n"
        "and `cxr --version` prints the version."
    )


def _group(first: str) -> str:
    placeholder, summary = GROUPS[first]
    rows = {name: COMMANDS[f"{first} {name}"].summary for name in _of_group(first)}
    return (
        f"usage: cxr {first} {placeholder} [OPTIONS]\n\n{summary}\n\n{_columns(rows)}\n\n"
        f"`cxr {first} {placeholder} --help` explains the options."
    )


def _columns(rows: Mapping[str, str]) -> str:
    """Names on the left, and what they mean, wrapped, on the right."""
    indent = max(map(len, rows)) + 4
    width = min(shutil.get_terminal_size((110, 24)).columns, 118)
    return "\n".join(
        textwrap.fill(
            text,
            max(width, indent + 20),
            initial_indent=f"  {name}".ljust(indent),
            subsequent_indent=" " * indent,
            break_on_hyphens=False,
        )
        for name, text in rows.items()
    )


if __name__ == "__main__":
    main()

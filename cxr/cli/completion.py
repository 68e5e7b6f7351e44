"""Shell completion of `cxr`, as tyro writes it: `cxr --tyro-write-completion bash FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, Union

import tyro

from cxr.cli.commands import COMMANDS, GROUPS
from cxr.errors import UserError
from cxr.runtime.job import Command

_WRITE = "--tyro-write-completion"
_SHELLS = ("bash", "zsh", "tcsh", "fish")


def write_completion(arguments: Sequence[str]) -> None:
    """Let tyro write the completion script of all commands, whose modules this imports.

    Args:
        arguments: `--tyro-write-completion SHELL FILE` or `--tyro-print-completion SHELL`.

    Raises:
        UserError: the arguments are others.
    """
    option, *values = arguments
    usage = f"cxr {option} SHELL{' FILE' * (option == _WRITE)}"
    if len(values) != 1 + (option == _WRITE) or values[0] not in _SHELLS:
        raise UserError(f"expected `{usage}` with SHELL one of {', '.join(_SHELLS)}, got `cxr {' '.join(arguments)}`")
    if option == _WRITE:
        Path(values[1]).parent.mkdir(parents=True, exist_ok=True)
    single = {name: _options(name) for name in COMMANDS if " " not in name}
    groups = {
        first: _group(
            first, {name.partition(" ")[2]: _options(name) for name in COMMANDS if name.startswith(f"{first} ")}
        )
        for first in GROUPS
    }
    tyro.cli(_either(single | groups), prog="cxr", args=list(arguments), config=(tyro.conf.OmitArgPrefixes,))


def _options(name: str) -> Any:
    """A command's options as an annotated type."""
    options, word = COMMANDS[name].load().options, name.rpartition(" ")[2]
    parsed: Any = Command[type(options)]
    return Annotated[parsed, tyro.conf.subcommand(word, default=Command(job=options))]


def _group(first: str, choices: dict[str, Any]) -> Any:
    choice = tyro.conf.OmitSubcommandPrefixes[_either(choices)]
    return Annotated[make_dataclass(first, [("command", choice, field())]), tyro.conf.subcommand(first)]


def _either(choices: dict[str, Any]) -> Any:
    return Union[tuple(choices.values())]  # noqa: UP007  # of a tuple

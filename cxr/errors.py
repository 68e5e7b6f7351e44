"""Exceptions for the user, and checks that raise them.

Every message says what was expected, what was found and what to do.
"""

from __future__ import annotations

from pathlib import Path


class UserError(ValueError):
    """The user's input cannot be used. Jobs print only the message and exit with code 2."""


class ImageRejectedError(ValueError):
    """An image cannot be used; the message is recorded in the `error` column of its row."""


class ClusterError(RuntimeError):
    """Ray or a machine failed, independently of the input. Jobs print only the message and exit with code 1."""


def check_least(settings: object, **least: int) -> None:
    """Raise UserError if a setting is smaller than its least value. None, for a default, passes."""
    for name, value in least.items():
        given = getattr(settings, name)
        if given is not None and given < value:
            raise UserError(f"{name}: expected {value} or more, got {given}")


def check_fraction(settings: object, name: str) -> None:
    """Raise UserError unless a setting is a fraction from 0 to 1."""
    given = getattr(settings, name)
    if not 0 <= given <= 1:
        raise UserError(f"{name}: expected a fraction from 0 to 1, got {given:g}")


def raised_at(error: BaseException) -> str:
    """Where an exception was raised, as " in file.py:12"; unlike its message, this contains no patient data."""
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    if traceback is None:
        return ""
    return f" in {Path(traceback.tb_frame.f_code.co_filename).name}:{traceback.tb_lineno}"

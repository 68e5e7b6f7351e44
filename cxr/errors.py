"""Exceptions for the user. Every message says what was expected, what was found and what to do."""

from __future__ import annotations

from pathlib import Path


class UserError(ValueError):
    """The user's input cannot be used. Jobs print only the message and exit with code 2."""


class ImageRejectedError(ValueError):
    """An image cannot be used; the message is recorded in the `error` column of its row."""


class ClusterError(RuntimeError):
    """Ray or a machine failed, independently of the input. Jobs print only the message and exit with code 1."""


def raised_at(error: BaseException) -> str:
    """Where an exception was raised, as " in file.py:12"; unlike its message, this contains no patient data."""
    traceback = error.__traceback__
    while traceback and traceback.tb_next:
        traceback = traceback.tb_next
    if traceback is None:
        return ""
    return f" in {Path(traceback.tb_frame.f_code.co_filename).name}:{traceback.tb_lineno}"

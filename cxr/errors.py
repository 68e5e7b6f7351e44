"""The errors that a user can cause and mend; every message says what was given, what was wanted, what to do."""

from __future__ import annotations

from pathlib import Path


class UserError(ValueError):
    """Something given by the user cannot be used. Jobs print the message alone and exit with 2."""


class ImageRejectedError(ValueError):
    """One image cannot be used; the message is the reason recorded in its row."""


class ClusterError(RuntimeError):
    """Ray or the machines failed, whatever was given. Jobs print the message alone and exit with 1."""


def place_of(error: BaseException) -> str:
    """Where an error was raised, as " in file.py:12"; unlike its message, this quotes nothing of a patient."""
    place = error.__traceback__
    while place and place.tb_next:
        place = place.tb_next
    return f" in {Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}" if place else ""

"""Short paths to the folders in which Ray and Python put sockets: Linux allows socket paths of 107 bytes."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from cxr.errors import UserError

MOST_BYTES = 107  # of a socket's path: man 7 unix
# Ray's longest path of a socket below TMPDIR: dashboard/modules/task_events has the longest name.
LONGEST = f"ray/session_2026-01-01_00-00-00_000000_{2**22}/sockets/dash_TaskEventsHead"
FOLDER_BYTES = MOST_BYTES - len(f"/{LONGEST}")  # of the folder's path, 32
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def shorten_temporary_folders(before_removal: Callable[[], None]) -> None:
    """Replace TMPDIR and RAY_TMPDIR by links to the same folders where sockets in them would have too long paths.

    Batch systems such as Slurm give jobs long ones. Ray's processes take both from the environment of this one.

    Args:
        before_removal: called when this process exits, before the links are removed: ends what uses them.

    Raises:
        UserError: there is no place for a link.
    """
    for variable in ("TMPDIR", "RAY_TMPDIR"):
        folder = os.environ.get(variable, "")
        if len(os.fsencode(folder)) > FOLDER_BYTES:
            link = _link_to(folder, variable)
            os.environ[variable] = str(link)
            atexit.register(shutil.rmtree, link.parent, ignore_errors=True)
            atexit.register(before_removal)  # what is registered last is called first


def _link_to(folder: str, variable: str) -> Path:
    for short in SHORT_FOLDERS:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            link = Path(tempfile.mkdtemp(prefix="cxr-", dir=short), "t")  # in a folder of this user alone
            link.symlink_to(Path(folder).absolute(), target_is_directory=True)
            return link
        except OSError:
            continue
    raise UserError(
        f"{variable}={folder} is too long for the paths of Ray's sockets, and no link to it can be made in "
        f"{', '.join(SHORT_FOLDERS)}: set {variable} to a folder whose path has at most {FOLDER_BYTES} characters"
    )

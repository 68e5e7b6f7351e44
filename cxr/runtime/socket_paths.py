"""Short paths for the folders in which Ray and Python create sockets: Linux limits socket paths to 107 bytes."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from cxr.errors import UserError

MOST_BYTES = 107  # of a socket's path: man 7 unix
# Ray's longest socket path below TMPDIR; dashboard/modules/task_events has the longest name.
LONGEST = f"ray/session_2026-01-01_00-00-00_000000_{2**22}/sockets/dash_TaskEventsHead"
FOLDER_BYTES = MOST_BYTES - len(f"/{LONGEST}")  # of the folder's path, 32
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")


def shorten_temporary_folders(before_removal: Callable[[], None]) -> None:
    """Replace TMPDIR and RAY_TMPDIR by links to the same folders if sockets in them would have too long paths.

    Batch systems such as Slurm give jobs long ones. Ray's processes inherit both variables from this process.

    Args:
        before_removal: called when this process exits, before the links are removed, to stop what uses them.

    Raises:
        UserError: no link can be created.
    """
    for variable in ("TMPDIR", "RAY_TMPDIR"):
        folder = os.environ.get(variable, "")
        if len(os.fsencode(folder)) > FOLDER_BYTES:
            link = _link_to(folder, variable)
            os.environ[variable] = str(link)
            atexit.register(shutil.rmtree, link.parent, ignore_errors=True)
            atexit.register(before_removal)  # functions registered last are called first


def _link_to(folder: str, variable: str) -> Path:
    for short in SHORT_FOLDERS:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            link = Path(tempfile.mkdtemp(prefix="cxr-", dir=short), "t")  # in a folder that only this user can read
            link.symlink_to(Path(folder).absolute(), target_is_directory=True)
            return link
        except OSError:
            continue
    raise UserError(
        f"{variable}={folder} is too long for the paths of Ray's sockets, and no link to it can be created in "
        f"{', '.join(SHORT_FOLDERS)}: set {variable} to a folder whose path has at most {FOLDER_BYTES} characters"
    )

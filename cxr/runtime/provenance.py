"""What produced a result: versions and the commit."""

from __future__ import annotations

import os
import platform
import subprocess
from contextlib import suppress
from functools import lru_cache
from importlib import metadata
from pathlib import Path

import cxr

_PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "optuna", "numpy", "pydicom")


def versions() -> dict[str, str]:
    """Version of cxr, Python and the packages that results depend on."""
    found = {"cxr": cxr.__version__, "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in _PACKAGES}
    with suppress(metadata.PackageNotFoundError):
        found["imagecodecs"] = metadata.version("imagecodecs")  # of the extra `dicom`
    return found


@lru_cache
def commit() -> str:
    """The commit of this checkout, followed by "+changes" if files were edited; elsewhere CXR_COMMIT or "".

    A submitted job gets the working directory without its history: set CXR_COMMIT in its runtime environment.
    """
    here = Path(cxr.__file__).parents[1]
    if "CXR_COMMIT" in os.environ or not (here / ".git").exists():
        return os.environ.get("CXR_COMMIT", "")
    git = ["git", "-C", str(here)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        edits = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return head.stdout.strip() + ("+changes" if edits.stdout.strip() else "")

"""How an archive is read. This module imports only `cxr.errors`, so that `--help` is quick."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How to read an archive, and which of its images."""

    source: str = "auto"
    """Layout of the archive: the name of a source, or auto to detect it."""

    def describe(self) -> dict[str, Any]:
        """The settings that decide which images are read and differ from their defaults."""
        return {}


ALL_IMAGES = ReadOptions()
"""Every image of an archive whose layout is detected."""

"""ZIP and TAR files for tests, made of a dict from member names to contents."""

from __future__ import annotations

import io
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

SUFFIXES = ("zip", "tar", "tar.gz", "tgz")


def container(files: Mapping[str, bytes], suffix: str, modified: Mapping[str, float] | None = None) -> bytes:
    """The bytes of a container of this kind; `modified` are the modification times of files in a TAR file."""
    return zipped(files) if suffix == "zip" else tarred(files, gzipped=suffix != "tar", modified=modified)


def zipped(files: Mapping[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as file:
        for name, data in files.items():
            file.writestr(name, data)
    return stream.getvalue()


def tarred(
    files: Mapping[str, bytes], *, gzipped: bool = False, modified: Mapping[str, float] | None = None
) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz" if gzipped else "w") as file:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = (modified or {}).get(name, 0)
            file.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def saved(path: Path, data: bytes) -> str:
    """Write a file and return its path as text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return str(path)

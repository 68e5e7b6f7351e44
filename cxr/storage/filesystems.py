"""pyarrow's file system for each kind of URI, configured from the environment, one per process; kinds of files."""

from __future__ import annotations

import errno
import os
import stat
from datetime import timedelta
from functools import lru_cache

from pyarrow import fs

from cxr.storage.s3 import S3Files
from cxr.storage.uri import UnreadableError, check_utf8, is_anonymous, normalize

_SPECIAL = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's file system for a URI, and the path within it.

    Raises:
        UnreadableError: the path is not valid UTF-8.
    """
    check_utf8(normalize(uri))
    scheme, mark, path = normalize(uri).partition("://")
    if not mark:
        return fs.LocalFileSystem(), scheme
    if scheme == "gs":
        return _gcs(is_anonymous(path.partition("/")[0])), path
    return fs.PyFileSystem(S3Files()), path


def file_info(uri: str) -> fs.FileInfo:
    """Type and size of the file or folder at the URI; the type is NotFound if there is none."""
    filesystem_, path = filesystem(uri)
    info = filesystem_.get_file_info(path)
    assert isinstance(info, fs.FileInfo)
    return info


@lru_cache(maxsize=2)
def _gcs(anonymous: bool) -> fs.GcsFileSystem:
    return fs.GcsFileSystem(anonymous=anonymous, retry_time_limit=timedelta(seconds=15))


def check_regular(path: str) -> None:
    """Raise UnreadableError if a local path is a pipe, socket or device: opening one may block forever.

    Raises OSError if the path does not exist.
    """
    if kind := special_kind(os.stat(path).st_mode):  # noqa: PTH116
        raise UnreadableError(f"expected a file, got {path}, a {kind}: write its contents to a file") from OSError(
            errno.EINVAL, f"a {kind}, not a file"
        )


def special_kind(mode: int) -> str:
    """ "pipe", "socket" or "device"; empty for files and folders."""
    return "" if stat.S_ISREG(mode) or stat.S_ISDIR(mode) else _SPECIAL.get(stat.S_IFMT(mode), "device")

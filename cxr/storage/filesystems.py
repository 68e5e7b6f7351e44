"""pyarrow's file system for each kind of URI, configured from the environment, one per process."""

from __future__ import annotations

from datetime import timedelta
from functools import lru_cache

from pyarrow import fs

from cxr.storage.s3 import S3Files
from cxr.storage.uri import is_anonymous, normalize


def filesystem(uri: str) -> tuple[fs.FileSystem, str]:
    """pyarrow's file system for a URI, and the path within it."""
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

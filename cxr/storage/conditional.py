"""Compare-and-swap for small files."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from cxr.storage import s3
from cxr.storage.files import read_bytes, write_bytes, write_new
from cxr.storage.retries import retried
from cxr.storage.uri import NotFoundError, is_local, normalize

_CONFLICT = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
_UNSUPPORTED = {"NotImplemented", "InvalidArgument", "InvalidRequest", "501"}  # servers without conditional writes


def replace_if(uri: str, data: bytes, previous: bytes | None, *, private: bool = False) -> bool:
    """Write a small file if its content is still `previous` (None: absent); return whether it was written.

    This is atomic on local disks with file locks or, where `previous` is None, with hard links, and on S3 servers
    with conditional writes. Elsewhere, Google Cloud Storage included, another process may write between the
    comparison and the replacement.

    Args:
        private: only the owner may read a local file.
    """
    if uri.startswith("s3://"):
        return retried(uri, lambda: _replace_s3(uri, data, previous))
    with _locked(Path(normalize(uri)).parent) if is_local(uri) else _unlocked():
        current = _content(uri)
        if current is None and previous is None and is_local(uri):
            return write_new(uri, data, private=private) or _content(uri) == data
        if current == previous:
            write_bytes(uri, data, private=private)
        return current in (previous, data)


def _content(uri: str) -> bytes | None:
    try:
        return read_bytes(uri)
    except NotFoundError:
        return None


def _replace_s3(uri: str, data: bytes, previous: bytes | None) -> bool:
    """Safe to retry after a lost response: if the object already equals `data`, this call wrote it."""
    bucket, key = s3.split(normalize(uri).removeprefix("s3://"))
    client = s3.client(bucket)
    current, etag = _content_and_etag(client, bucket, key)
    if current != previous:
        return current == data
    condition = {"IfMatch": etag} if etag else {"IfNoneMatch": "*"}
    try:
        client.put_object(Bucket=bucket, Key=key, Body=data, **condition)
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in _UNSUPPORTED:
            client.put_object(Bucket=bucket, Key=key, Body=data)
        elif code in _CONFLICT:
            return _content_and_etag(client, bucket, key)[0] == data
        else:
            raise
    return True


def _content_and_etag(client: Any, bucket: str, key: str) -> tuple[bytes | None, str]:
    """Content and ETag of an object; None and "" if it does not exist."""
    try:
        response = client.get_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] != "NoSuchKey":
            raise
        return None, ""
    return response["Body"].read(), response["ETag"]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an exclusive lock on the folder, if its file system supports locks."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _unlocked() -> Iterator[None]:
    yield

"""Replacing a file only if nobody else has done so in the meantime."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from cxr.storage import s3
from cxr.storage.files import read_bytes, write_bytes
from cxr.storage.retries import retried
from cxr.storage.uri import NotFoundError, is_local, normalize

_REFUSED = {"PreconditionFailed", "ConditionalRequestConflict", "412", "409"}
_UNKNOWN = {"NotImplemented", "InvalidArgument", "InvalidRequest", "501"}  # servers without conditional writes


def replace_if(uri: str, data: bytes, previous: bytes | None) -> bool:
    """Write a small file if its content still is `previous` (None: it is absent); returns whether it was written.

    Local disks with file locks and S3 servers with conditional writes do this in one step. Google Cloud Storage and
    other servers and disks do it in two, between which another process may write.
    """
    if uri.startswith("s3://"):
        return retried(uri, lambda: _replace_s3(uri, data, previous))
    with _locked(Path(normalize(uri)).parent) if is_local(uri) else _unlocked():
        found = _content(uri)
        if found == previous:
            write_bytes(uri, data)
        return found in (previous, data)


def _content(uri: str) -> bytes | None:
    try:
        return read_bytes(uri)
    except NotFoundError:
        return None


def _replace_s3(uri: str, data: bytes, previous: bytes | None) -> bool:
    """May be tried again after an answer was lost: data that is there already is this call's own."""
    bucket, key = s3.split(normalize(uri).removeprefix("s3://"))
    client = s3.client(bucket)
    found, tag = _with_tag(client, bucket, key)
    if found != previous:
        return found == data
    condition = {"IfMatch": tag} if tag else {"IfNoneMatch": "*"}
    try:
        client.put_object(Bucket=bucket, Key=key, Body=data, **condition)
    except ClientError as error:
        code = error.response["Error"]["Code"]
        if code in _UNKNOWN:
            client.put_object(Bucket=bucket, Key=key, Body=data)
        elif code in _REFUSED:
            return _with_tag(client, bucket, key)[0] == data
        else:
            raise
    return True


def _with_tag(client: Any, bucket: str, key: str) -> tuple[bytes | None, str]:
    """An object's content and the tag that stands for it; None and "" where there is none."""
    try:
        found = client.get_object(Bucket=bucket, Key=key)
    except ClientError as error:
        if error.response["Error"]["Code"] != "NoSuchKey":
            raise
        return None, ""
    return found["Body"].read(), found["ETag"]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Alone among the processes that lock this folder, where its disk has locks."""
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

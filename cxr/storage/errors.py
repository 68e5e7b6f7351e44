"""Translate errors of files, disks and buckets into messages for the user; classify transient errors."""

from __future__ import annotations

import errno
import re
import tempfile
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError
from pyarrow import fs

from cxr.storage import s3
from cxr.storage.filesystems import file_info
from cxr.storage.uri import NotFoundError, StorageError, UnreadableError, is_anonymous, is_local, normalize

# pyarrow and boto3 give the kind of an error only in its text: SLOW_DOWN, SlowDown.
_NO_BUCKET = re.compile(r"no_?such_?bucket|bucket does not exist", re.I)
_CREDENTIALS = re.compile(r"access_?key|signature|token|credentials|unauthenticated", re.I)
_DENIED = re.compile(r"access_?denied|forbidden|permission_denied|\(403\)|status 403", re.I)
_UNTRUSTED = re.compile(r"certificate_?.?verify|ssl validation", re.I)
_EXPIRED = re.compile(r"expired_?token|token (has|is) expired", re.I)
_FROZEN = re.compile(r"invalid_?object_?state", re.I)  # moved to an archive class such as Glacier
_TRANSIENT = re.compile(
    r"slow_?down|throttl|too_?many_?requests|request_?limit|internal_?(failure|error)|unavailable|connection|curlcode"
    r"|incomplete_?body|incomplete_?read|time_?out|timed out|(status |\()(429|5\d\d)\b",
    re.I,
)
_TRANSIENT_ERRNO = {errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EAGAIN}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Errors of a mount, a disk or this process: any other file would fail in the same way.
_WHOLE_DISK = _TRANSIENT_ERRNO | _FULL | {errno.EIO, errno.ENODEV, errno.ENXIO, errno.EROFS}
_WHOLE_DISK |= {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EKEYEXPIRED, errno.EKEYREVOKED, errno.ENOKEY}
_PROBED = 4  # neighboring objects to try before access to the whole bucket is considered denied


def is_transient(error: Exception, *, local: bool = False) -> bool:
    """Whether the same request may succeed later: throttling, 5xx, lost connections, an unavailable network share."""
    if local:
        return getattr(error, "errno", None) in _TRANSIENT_ERRNO
    text = f"{type(error).__name__} {error}"
    is_permanent = isinstance(error, FileNotFoundError) or any(
        p.search(text) for p in (_NO_BUCKET, _DENIED, _UNTRUSTED)
    )
    return not is_permanent and _TRANSIENT.search(text) is not None


def has_expired(error: Exception) -> bool:
    """Whether the server rejected expired credentials; the credential files may contain new ones by now."""
    return isinstance(error, ClientError) and _EXPIRED.search(str(error)) is not None


def storage_error(uri: str, error: Exception) -> StorageError:
    """Translate an error for the user: which URI, what is wrong, what to do.

    `NotFoundError` and `UnreadableError` concern this file only; other StorageErrors the whole disk or bucket.
    """
    if isinstance(error, FileNotFoundError) and (is_local(uri) or _bucket_exists(uri)):
        return NotFoundError(f"{uri} does not exist: correct the URI, or write it first")
    if is_local(uri):
        return _local_error(uri, error)
    if getattr(error, "errno", None) in _FULL:
        return _local_error(f"{tempfile.gettempdir()}, while transferring {uri}", error)
    server, bucket = _server(uri), _bucket(uri)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, FileNotFoundError) or _NO_BUCKET.search(text):
        return StorageError(f"{uri}: there is no bucket {bucket!r} on {server}: create it, or correct the URI")
    if _FROZEN.search(text):
        return UnreadableError(f"{uri} is in an archive storage class of {server}: restore it first ({text})")
    if _UNTRUSTED.search(text):
        return StorageError(f"{uri}: {server} presented an untrusted certificate: set AWS_CA_BUNDLE ({text})")
    if is_transient(error):
        return StorageError(
            f"{uri}: {server} keeps failing: check the server and the network, or try again later ({text})"
        )
    if isinstance(error, BotoCoreError) and not isinstance(error, NoCredentialsError):
        return StorageError(f"{uri}: the request cannot be made: correct the URI or the AWS settings ({text})")
    if _DENIED.search(text) or _CREDENTIALS.search(text):
        return _access_denied(uri, server, text)
    return StorageError(f"{uri}: {server} responded: {text}")


def _local_error(uri: str, error: Exception) -> StorageError:
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or error
    if number in _FULL:
        return StorageError(
            f"{uri}: {reason}: free some space or choose another folder, then run the same command again"
        )
    if number in _WHOLE_DISK:
        return StorageError(
            f"{uri}: {reason}: check the disk and whether the network share is mounted, then run the same command "
            f"again"
        )
    return UnreadableError(f"{uri}: {reason}: check its permissions and the disk")


def _access_denied(uri: str, server: str, text: str) -> StorageError:
    """The error for a 403: it concerns only the object if its neighbors are readable, else the credentials."""
    try:
        if not _CREDENTIALS.search(text) and uri.startswith("s3://") and _can_read_neighbors(uri):
            return UnreadableError(
                f"{uri}: {server} denied access (403) to this object but not to its neighbors: check its permissions"
            )
    except (
        BotoCoreError,
        ClientError,
    ) as listing_error:  # more informative than the response to a HEAD, which has no body
        text = f"{text}; {listing_error}"
    return StorageError(f"{uri}: {server} {_denial(uri, text)} ({text})")


def _can_read_neighbors(uri: str) -> bool:
    bucket, _, key = normalize(uri).removeprefix("s3://").partition("/")
    folder = key.partition("/")[0] + "/" if "/" in key else ""
    for start in (key, folder):
        start_after = {"StartAfter": start} if start else {}
        page = s3.client(bucket).list_objects_v2(Bucket=bucket, Prefix=folder, MaxKeys=_PROBED, **start_after)
        neighbors = [item for item in page.get("Contents", ()) if item["Key"] != key and item["Size"]]
        if any(_can_read(bucket, item) for item in neighbors):
            return True
    return False


def _can_read(bucket: str, item: dict[str, Any]) -> bool:
    try:
        s3.client(bucket).get_object(Bucket=bucket, Key=item["Key"], Range="bytes=0-0")["Body"].close()
    except (BotoCoreError, ClientError):
        return False
    return True


def _denial(uri: str, text: str) -> str:
    if is_anonymous(_bucket(uri)):
        return "denied access without credentials: the bucket is not public, so omit --anonymous"
    if uri.startswith("gs://"):
        return "denied access: set GOOGLE_APPLICATION_CREDENTIALS, log in with gcloud, or use --anonymous"
    keys = s3.credentials_from()
    if keys is None:
        set_keys = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        return f"needs credentials and none were found: {set_keys}, or use --anonymous for a public bucket"
    if _EXPIRED.search(text):
        return f"reports expired credentials: renew {keys}, then run the same command again"
    if _CREDENTIALS.search(text):
        return f"rejected the credentials: check {keys} (and AWS_SESSION_TOKEN)"
    return f"denied access (403): check {keys} and their permissions for this bucket, or use --requester-pays"


def _server(uri: str) -> str:
    return "Google Cloud Storage" if uri.startswith("gs://") else s3.server(_bucket(uri))


def _bucket(uri: str) -> str:
    return normalize(uri).split("/")[2]


def _bucket_exists(uri: str) -> bool:
    try:
        return file_info("/".join(normalize(uri).split("/")[:3])).type != fs.FileType.NotFound
    except OSError:
        return True  # unknown; the key is missing in any case

"""What went wrong with a file or its place, in the user's terms, and whether it may pass."""

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

# pyarrow and boto3 name the kind of an error in its text alone: SLOW_DOWN, SlowDown.
_NO_BUCKET = re.compile(r"no_?such_?bucket|bucket does not exist", re.I)
_CREDENTIALS = re.compile(r"access_?key|signature|token|credentials|unauthenticated", re.I)
_DENIED = re.compile(r"access_?denied|forbidden|permission_denied|\(403\)|status 403", re.I)
_UNTRUSTED = re.compile(r"certificate_?.?verify|ssl validation", re.I)
_EXPIRED = re.compile(r"expired_?token|token (has|is) expired", re.I)
_FROZEN = re.compile(r"invalid_?object_?state", re.I)  # moved to an archive class such as Glacier
_PASSING = re.compile(
    r"slow_?down|throttl|too_?many_?requests|request_?limit|internal_?(failure|error)|unavailable|connection|curlcode"
    r"|incomplete_?body|incomplete_?read|time_?out|timed out|(status |\()(429|5\d\d)\b",
    re.I,
)
_MAY_RETURN = {errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.EAGAIN}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Errors of a mount, a disk or this process, which any other file would meet as well.
_PLACE = _MAY_RETURN | _FULL | {errno.EIO, errno.ENODEV, errno.ENXIO, errno.EROFS}
_PLACE |= {errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EKEYEXPIRED, errno.EKEYREVOKED, errno.ENOKEY}
_PROBED = 4  # neighbors asked for before a refusal is taken for the bucket's


def may_pass(error: Exception, *, local: bool = False) -> bool:
    """Whether the same request may succeed later: throttling, 5xx, lost connections, a share that went away."""
    if local:
        return getattr(error, "errno", None) in _MAY_RETURN
    text = f"{type(error).__name__} {error}"
    lasting = isinstance(error, FileNotFoundError) or any(p.search(text) for p in (_NO_BUCKET, _DENIED, _UNTRUSTED))
    return not lasting and _PASSING.search(text) is not None


def has_expired(error: Exception) -> bool:
    """Whether the server says that the credentials have expired: files may hold new ones by now."""
    return isinstance(error, ClientError) and _EXPIRED.search(str(error)) is not None


def explained(uri: str, error: Exception) -> StorageError:
    """The error in the user's terms: what was asked for, what is wrong, what to do.

    `NotFoundError` and `UnreadableError` concern this one file; any other StorageError its whole place.
    """
    if isinstance(error, FileNotFoundError) and (is_local(uri) or _bucket_exists(uri)):
        return NotFoundError(f"{uri} does not exist: correct the URI, or write it first")
    if is_local(uri):
        return _explained_local(uri, error)
    if getattr(error, "errno", None) in _FULL:
        return _explained_local(f"{tempfile.gettempdir()}, on the way to or from {uri}", error)
    server, bucket = _server(uri), _bucket(uri)
    text = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, FileNotFoundError) or _NO_BUCKET.search(text):
        return StorageError(f"{uri}: there is no bucket {bucket!r} on {server}: create it, or correct the URI")
    if _FROZEN.search(text):
        return UnreadableError(f"{uri} lies in an archive class of {server}: restore it first ({text})")
    if _UNTRUSTED.search(text):
        return StorageError(f"{uri}: {server} shows a certificate that is not trusted: set AWS_CA_BUNDLE ({text})")
    if may_pass(error):
        return StorageError(f"{uri}: {server} keeps failing: check it and the network, or try later ({text})")
    if isinstance(error, BotoCoreError) and not isinstance(error, NoCredentialsError):
        return StorageError(f"{uri}: the request cannot be made: correct the URI or the AWS settings ({text})")
    if _DENIED.search(text) or _CREDENTIALS.search(text):
        return _refused(uri, server, text)
    return StorageError(f"{uri}: {server} answered: {text}")


def _explained_local(uri: str, error: Exception) -> StorageError:
    number, reason = getattr(error, "errno", None), getattr(error, "strerror", None) or error
    if number in _FULL:
        return StorageError(f"{uri}: {reason}: make room, or give another place; then run the same command again")
    if number in _PLACE:
        return StorageError(f"{uri}: {reason}: check the disk, or whether its share is mounted; then run again")
    return UnreadableError(f"{uri}: {reason}: check its rights and the disk")


def _refused(uri: str, server: str, text: str) -> StorageError:
    """A 403 of one object is its own where the server gives others beside it, else the credentials'."""
    try:
        if not _CREDENTIALS.search(text) and uri.startswith("s3://") and _gives_others(uri):
            return UnreadableError(
                f"{uri}: {server} refused access (403) to this object, though not to others: check it"
            )
    except (BotoCoreError, ClientError) as again:  # says more than the answer to a HEAD, which has no body
        text = f"{text}; {again}"
    return StorageError(f"{uri}: {server} {_refusal(uri, text)} ({text})")


def _gives_others(uri: str) -> bool:
    bucket, _, key = normalize(uri).removeprefix("s3://").partition("/")
    folder = key.partition("/")[0] + "/" if "/" in key else ""
    for start in (key, folder):
        after = {"StartAfter": start} if start else {}
        page = s3.client(bucket).list_objects_v2(Bucket=bucket, Prefix=folder, MaxKeys=_PROBED, **after)
        others = [item for item in page.get("Contents", ()) if item["Key"] != key and item["Size"]]
        if any(_given(bucket, item) for item in others):
            return True
    return False


def _given(bucket: str, item: dict[str, Any]) -> bool:
    try:
        s3.client(bucket).get_object(Bucket=bucket, Key=item["Key"], Range="bytes=0-0")["Body"].close()
    except (BotoCoreError, ClientError):
        return False
    return True


def _refusal(uri: str, text: str) -> str:
    if is_anonymous(_bucket(uri)):
        return "refused access without credentials: the bucket is not public, so leave --anonymous out"
    if uri.startswith("gs://"):
        return "refused access: set GOOGLE_APPLICATION_CREDENTIALS, or log in with gcloud, or give --anonymous"
    keys = s3.credentials_from()
    if keys is None:
        set_keys = "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
        return f"needs credentials and none were found: {set_keys}, or give --anonymous for a public bucket"
    if _EXPIRED.search(text):
        return f"says that the credentials have expired: renew {keys}, then run the same command again"
    if _CREDENTIALS.search(text):
        return f"does not accept the credentials: check {keys} (and AWS_SESSION_TOKEN)"
    return f"refused access (403): check {keys} and what they may do in this bucket, or give --requester-pays"


def _server(uri: str) -> str:
    return "Google Cloud Storage" if uri.startswith("gs://") else s3.server(_bucket(uri))


def _bucket(uri: str) -> str:
    return normalize(uri).split("/")[2]


def _bucket_exists(uri: str) -> bool:
    try:
        return file_info("/".join(normalize(uri).split("/")[:3])).type != fs.FileType.NotFound
    except OSError:
        return True  # not ours to judge: the key is missing at any rate

"""Trying again while a trouble may pass, and telling what went wrong when it does not."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from typing import TypeVar

from boto3.session import Session
from botocore.exceptions import BotoCoreError, ClientError
from pyarrow import fs

from cxr.storage.filesystems import file_info, s3_endpoint
from cxr.storage.uri import NotFound, StorageError, is_local, normalise

T = TypeVar("T")

# pyarrow tells S3's and Google's errors in the text alone (SLOW_DOWN), boto3 in text too (SlowDown).
_NO_BUCKET = re.compile(r"no_?such_?bucket|bucket does not exist", re.I)
_CREDENTIALS = re.compile(r"access_?key|signature|token|credentials|unauthenticated", re.I)
_DENIED = re.compile(r"access_?denied|forbidden|permission_denied|\(403\)|status 403", re.I)
_PASSING = re.compile(
    r"slow_?down|throttl|too_?many_?requests|request_?limit|internal_?(failure|error)|unavailable|connection|curlcode"
    r"|time_?out|timed out|(status |\()(429|5\d\d)\b",
    re.I,
)


def retried(uri: str, operation: Callable[[], T]) -> T:
    """The operation's value. A passing trouble of a remote URI is tried again with growing, jittered pauses.

    Raises:
        StorageError: it failed for good, or for longer than CXR_STORAGE_PATIENCE_S seconds.
    """
    patience_s = float(os.environ.get("CXR_STORAGE_PATIENCE_S", "60"))
    deadline, pause_s = time.monotonic() + patience_s, 0.25
    while True:
        try:
            return operation()
        except (OSError, BotoCoreError, ClientError) as error:
            if is_local(uri) or not may_pass(error) or time.monotonic() + pause_s > deadline:
                raise explained(uri, error) from error
        time.sleep(pause_s * random.uniform(0.5, 1))
        pause_s = min(2 * pause_s, 8)


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: throttling, 5xx and lost connections."""
    text = f"{type(error).__name__} {error}"
    lasting = isinstance(error, FileNotFoundError) or any(p.search(text) for p in (_NO_BUCKET, _DENIED))
    return not lasting and _PASSING.search(text) is not None


def explained(uri: str, error: Exception) -> StorageError:
    """The error in the user's terms: what was asked for, what is wrong, what to do."""
    if isinstance(error, FileNotFoundError) and (is_local(uri) or _bucket_exists(uri)):
        return NotFound(f"{uri} does not exist: correct the URI, or write it first")
    if is_local(uri):
        return StorageError(f"{uri}: {getattr(error, 'strerror', None) or error}: check its rights and the disk")
    server, bucket = _server(uri), normalise(uri).split("/")[2]
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, FileNotFoundError) or _NO_BUCKET.search(text):
        return NotFound(f"{uri}: there is no bucket {bucket!r} on {server}: create it, or correct the URI")
    if may_pass(error):
        return StorageError(f"{uri}: {server} keeps failing: check it and the network, or try later ({text})")
    if _DENIED.search(text) or _CREDENTIALS.search(text):
        return StorageError(f"{uri}: {server} {_refusal(uri, text)} ({text})")
    return StorageError(f"{uri}: {server} answered: {text}")


def _refusal(uri: str, text: str) -> str:
    keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
    if uri.startswith("gs://"):
        return "refused access: set GOOGLE_APPLICATION_CREDENTIALS, or log in with gcloud"
    if Session().get_credentials() is None:
        return f"needs credentials and none were found: set {keys}, or AWS_PROFILE"
    if _CREDENTIALS.search(text):
        return f"does not accept the credentials: check {keys} (and AWS_SESSION_TOKEN)"
    return f"refused access (403): check {keys} and what they may do in this bucket"


def _server(uri: str) -> str:
    return "Google Cloud Storage" if uri.startswith("gs://") else s3_endpoint() or "Amazon S3"


def _bucket_exists(uri: str) -> bool:
    try:
        return file_info("/".join(normalise(uri).split("/")[:3])).type != fs.FileType.NotFound
    except OSError:
        return True  # not ours to judge: the key is missing at any rate

"""Retry operations that fail with a transient error."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from botocore.exceptions import BotoCoreError, ClientError

from cxr.storage.errors import has_expired, is_transient, storage_error
from cxr.storage.s3 import forget_clients
from cxr.storage.uri import StorageError, is_local

T = TypeVar("T")
_PATIENCE = "CXR_STORAGE_PATIENCE_S"


def retried(uri: str, operation: Callable[[], T]) -> T:
    """Run an operation and return its value; retry transient errors with exponential backoff and jitter.

    Raises:
        StorageError: the error is permanent, or lasted longer than CXR_STORAGE_PATIENCE_S seconds.
    """
    patience_s = _patience_s()
    reloaded = False  # the credential files, after the credentials expired
    deadline, pause_s = time.monotonic() + patience_s, 0.25
    while True:
        try:
            return operation()
        except (OSError, BotoCoreError, ClientError) as error:
            if has_expired(error) and not reloaded:
                reloaded = True
                forget_clients()
                continue
            if not is_transient(error, local=is_local(uri)) or time.monotonic() + pause_s > deadline:
                raise storage_error(uri, error) from error
        time.sleep(pause_s * random.uniform(0.5, 1))
        pause_s = min(2 * pause_s, 8)


def _patience_s() -> float:
    """Seconds from CXR_STORAGE_PATIENCE_S, if it is set."""
    text = os.environ.get(_PATIENCE) or "60"
    with suppress(ValueError):
        if float(text) >= 0:
            return float(text)
    raise StorageError(f"expected {_PATIENCE} to be a number of seconds, got {text}: set it to a number, or unset it")

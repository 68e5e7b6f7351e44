"""Trying again while a trouble may pass."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from botocore.exceptions import BotoCoreError, ClientError

from cxr.storage.errors import explained, has_expired, may_pass
from cxr.storage.s3 import forget_clients
from cxr.storage.uri import is_local

T = TypeVar("T")


def retried(uri: str, operation: Callable[[], T]) -> T:
    """The operation's value. A passing trouble is tried again with growing, jittered pauses.

    Raises:
        StorageError: it failed for good, or for longer than CXR_STORAGE_PATIENCE_S seconds.
    """
    patience_s = float(os.environ.get("CXR_STORAGE_PATIENCE_S", "60"))
    looked_again = False  # for credentials that take the place of expired ones
    deadline, pause_s = time.monotonic() + patience_s, 0.25
    while True:
        try:
            return operation()
        except (OSError, BotoCoreError, ClientError) as error:
            if has_expired(error) and not looked_again:
                looked_again = True
                forget_clients()
                continue
            if not may_pass(error, local=is_local(uri)) or time.monotonic() + pause_s > deadline:
                raise explained(uri, error) from error
        time.sleep(pause_s * random.uniform(0.5, 1))
        pause_s = min(2 * pause_s, 8)

"""Finds the user's mistake in an exception that Ray has brought from another process."""

from __future__ import annotations

import errno
from typing import Any

from ray.exceptions import NodeDiedError, OutOfMemoryError, RayActorError, RayTaskError, WorkerCrashedError

from cxr import storage
from cxr.errors import UserError
from cxr.runtime import ray_private

PROCESS_DEATHS = (WorkerCrashedError, RayActorError, OutOfMemoryError, NodeDiedError)
"""What Ray raises where a process of the cluster died, instead of raising an exception itself."""


def is_death(failure: Any) -> bool:
    """Whether this is the death of a process, also as Ray Train reports it of a worker."""
    return isinstance(getattr(failure, "health_check_failure", failure), PROCESS_DEATHS)


def user_error_in(error: Any) -> UserError | None:
    """The UserError, or one about the full disk, in an exception that Ray has wrapped, often twice; else None.

    Ray Data appends several lines of advice to the arguments of exceptions, which makes them the file name of an
    OSError that had none.
    """
    while error is not None:
        if isinstance(error, RayTaskError):  # it also has the type of its cause, but its text is a traceback
            error = error.cause
        if isinstance(error, UserError):
            return error
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            name = str(error.filename or "")
            return storage.storage_error("a disk" if "\n" in name or not name else name, error)
        error = ray_private.wrapped_error(error) or getattr(error, "cause", None) or error.__cause__
    return None

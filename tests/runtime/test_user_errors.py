"""The user's mistake in an exception from another process, however it is wrapped."""

from __future__ import annotations

import errno

import pytest
from ray.exceptions import RayTaskError

from cxr.errors import UserError
from cxr.runtime.user_errors import user_error_in

MISTAKE = UserError("expected 2, got 3: correct it")


def caused_by(cause: BaseException) -> RuntimeError:
    error = RuntimeError("the run failed")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MISTAKE,
        RayTaskError("task", "a traceback", MISTAKE),
        RayTaskError("task", "a traceback", MISTAKE).as_instanceof_cause(),
        caused_by(RayTaskError("outer", "a traceback", caused_by(RayTaskError("inner", "a traceback", MISTAKE)))),
    ],
    ids=["bare", "in_a_task", "as_its_cause", "wrapped_twice"],
)
def test_a_mistake_keeps_its_message(error: Exception) -> None:
    assert str(user_error_in(error)) == str(MISTAKE)


def test_a_full_disk_is_reported_with_its_path_and_what_to_do() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "/data/part-00001.parquet")
    message = str(user_error_in(RayTaskError("task", "a traceback", full)))
    assert message.startswith("/data/part-00001.parquet: No space left on device: free some space")


def test_what_ray_data_appends_is_not_taken_for_a_file_name() -> None:
    full = OSError(errno.ENOSPC, "No space left on device", "Failed to apply UDF transform.\nTo change this, …")
    assert str(user_error_in(full)).startswith("a disk: No space left on device: free some space")


@pytest.mark.parametrize("error", [ValueError("wrong"), OSError(errno.EPERM, "Operation not permitted"), None])
def test_other_failures_are_not_user_errors(error: Exception | None) -> None:
    assert user_error_in(caused_by(error) if error else None) is None

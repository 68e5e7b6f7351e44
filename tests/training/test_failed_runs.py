"""What a training says when its workers fail, and when they failed too often."""

from __future__ import annotations

from typing import Any

import pytest
from ray.exceptions import ActorDiedError
from ray.train import TrainingFailedError

from cxr.errors import ClusterError, UserError
from cxr.training import fit
from cxr.training.options import RunOptions
from cxr.training.restarts import RestartNotes


class DiedError(RuntimeError):
    """As Ray Train wraps the death of a worker."""

    health_check_failure = ActorDiedError()


class FailedRun:
    """A trainer whose workers fail for these reasons."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = failures

    def fit(self) -> Any:
        error = TrainingFailedError("the run failed")
        error.worker_failures = dict(enumerate(self.failures))  # pyright: ignore[reportAttributeAccessIssue]
        raise error


@pytest.mark.parametrize("failures", [[ActorDiedError()], [RuntimeError("connection closed by peer"), DiedError()]])
def test_dead_processes_are_the_clusters_fault(failures: list[Exception]) -> None:
    with pytest.raises(ClusterError, match=r"more often than the 3 times that --max-fail.* again to continue"):
        fit._result(FailedRun(*failures), RunOptions())  # pyright: ignore[reportArgumentType]


def test_a_mistake_of_the_user_keeps_its_message() -> None:
    with pytest.raises(UserError, match=r"expected 2, got 3: correct it\. Finished epochs are saved"):
        fit._result(FailedRun(DiedError(), UserError("expected 2, got 3: correct it")), RunOptions())  # pyright: ignore[reportArgumentType]


def test_other_exceptions_are_passed_on() -> None:
    with pytest.raises(TrainingFailedError):
        fit._result(FailedRun(ValueError("wrong")), RunOptions())  # pyright: ignore[reportArgumentType]


def test_restarts_after_deaths_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    notes = RestartNotes("train")
    notes.after_exception(None, {0: RuntimeError("connection closed by peer"), 1: DiedError()})
    assert capsys.readouterr().out.startswith(
        "note: train: 1 of the workers died. Training continues from the last checkpoint"
    )
    notes.after_exception(None, {0: ValueError("wrong")})
    assert not capsys.readouterr().out

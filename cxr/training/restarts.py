"""Notes on workers that died or failed, so that a run that waits for machines says why."""

from __future__ import annotations

from typing import Any

from ray.train import UserCallback

from cxr.runtime import console
from cxr.runtime.user_errors import is_death


class RestartNotes(UserCallback):
    """Says that workers were lost, in the process that controls the run.

    Args:
        name: of the run, with which its lines start.
    """

    def __init__(self, name: str) -> None:
        self.name = name

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        died = sum(map(is_death, worker_exceptions.values()))
        if died:
            console.note(
                f"{self.name}: {died} of the workers died. Training continues from the last checkpoint as "
                f"soon as the cluster has room for enough workers, unless --max-failures is exceeded"
            )

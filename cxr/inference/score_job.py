"""What a scoring run scores, with what, and where its results go. Without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from cxr import storage
from cxr.data.identity import Identity
from cxr.data.run_ledger import INCREMENTS, RunLedger
from cxr.families.checkpoint import Checkpoint
from cxr.inference.options import ScoreOptions
from cxr.inference.panel import Panel
from cxr.inference.plan_store import PlanStore


@dataclass(frozen=True)
class Job:
    """What is scored, with what, and where the results go."""

    archives: list[str]
    panel: Panel
    models: dict[str, Checkpoint]
    out: str
    options: ScoreOptions
    settings: dict[str, Any]
    """Everything that scores depend on."""
    deadline: float | None
    """Seconds since 1970."""
    identity: Identity | None
    """Replaces ids and paths; None keeps them."""
    named: list[pa.Table]
    """Gets the ids and paths of the images as soon as they are known."""
    on_start: Callable[[int], object]
    """Called with the number of images that are left, before the first one."""
    files: dict[str, str] = field(default_factory=dict)
    """SHA-256 of each file of scores that this run has committed, by its path in OUT."""

    def plans(self, run: RunLedger) -> PlanStore:
        """The stored plans of the run. With pseudonyms, they are beside the crosswalk."""
        if self.identity is None:
            return PlanStore(self.out, storage.join(self.out, INCREMENTS))
        return PlanStore(self.out, storage.join(self.identity.private_folder, INCREMENTS, run.id), self.identity)

    def show_notes(self, notes: Iterable[str], rows: Iterable[pa.Table]) -> None:
        """Print notes on an archive whose images have these ids and paths."""
        rows = [*rows]
        self.named.extend(rows)
        for line in notes:
            print(f"note: {self.identity.hide(line, rows) if self.identity else line}", flush=True)

    def connect(self) -> None:
        """Join or start the cluster that scores.

        Raises:
            UserError: results or the crosswalk lie on a disk that its machines do not share.
        """
        from cxr.runtime import cluster  # imports Ray, which a run without anything to score does without

        cluster.connect()
        for uri in (self.out, self.identity.crosswalk) if self.identity else (self.out,):
            cluster.check_shared(uri)


def now() -> str:
    """The local time, as the ledger records it."""
    return time.strftime("%Y-%m-%d %H:%M:%S %z")

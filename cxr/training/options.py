"""Options of training runs and of searches over them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cxr import storage
from cxr.errors import UserError

CHECKPOINT_SCORE = "checkpoint_score"  # reported metric by which Ray Train keeps checkpoints; not logged

SEARCH = "search"  # folder in OUT with the state of a search
# Of a worker's CPUs, how many Ray is asked for: what is left carries the processes that look after runs.
CPU_SHARE = 0.98


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run is laid out on a cluster.

    With several workers a step still shows `batch_size` images; losses, gradients and metrics are those of all of
    them, and an image is combined or compared with others from as many as with one worker. These depend on the number
    of workers: random draws, whose seeds differ by worker; which images share a step, where a split does not fit in a
    worker's cache; and on CPUs batch norm, where each worker has statistics of its own images (a note says so).
    """

    workers: int = 1
    """Training processes; with GPUs, one GPU each."""
    min_workers: int | None = None
    """Go on with as few as this many workers when machines leave, and grow again; unset for a fixed number."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train; auto takes GPUs if the cluster has any."""
    cpus_per_worker: float = 1
    """CPUs that Ray sets aside for each worker; also its number of threads on a CPU."""
    compile: bool = False
    """Compile the network with torch.compile."""
    keep: int = 2
    """Best checkpoints to keep, besides the last."""
    average: int = 0
    """Networks of so many best epochs to average at the end; the average is kept if it is better. 0 for none."""
    max_failures: int = 3
    """How often to start again from the last checkpoint after a worker or machine died."""
    resume: bool = False
    """Go on with the run that --out already holds, be it killed or finished (then with more --epochs)."""

    def __post_init__(self) -> None:
        if self.workers < 1 or not 1 <= (self.min_workers or 1) <= self.workers:
            raise UserError(
                f"workers={self.workers}, min_workers={self.min_workers}: wanted 1 ≤ min_workers ≤ workers"
            )
        if self.keep < 1 or self.cpus_per_worker <= 0:
            raise UserError(f"keep={self.keep}, cpus_per_worker={self.cpus_per_worker}: wanted positive numbers")
        if self.average < 0 or self.average == 1:
            raise UserError(f"average={self.average}: wanted 0 for none, or at least 2 epochs to average")

    @property
    def num_to_keep(self) -> int:
        """Best checkpoints that Ray Train keeps: enough to average, and room for the average itself."""
        return max(self.keep, self.average + 1) if self.average else self.keep

    @property
    def resources_per_worker(self) -> dict[str, float]:
        """What Ray sets aside for a worker, its GPU apart."""
        return {"CPU": self.cpus_per_worker * CPU_SHARE}


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How the search goes about."""

    trials: int = 8
    """Settings to try."""
    fixed: tuple[str, ...] = ()
    """Settings to leave as the recipe has them rather than to search, e.g. backbone."""
    search_seed: int = 0
    """Seed of the sampler (TPE)."""
    objectives: tuple[str, ...] = ()
    """Metrics to weigh against each other, e.g. mean_auroc psnr; empty for the recipe's monitor alone."""
    grace: int = 0
    """Epochs of its last stage that every trial gets before it may be stopped early; 0 for a quarter of them."""
    at_once: int | None = None
    """Trials to run at the same time; unset for as many as the cluster has room for."""


def check_resume(run: str, resume: bool) -> None:
    """Raise UserError if a run would overwrite the one in folder `run`, or if there is none to resume."""
    if storage.exists(run) and not resume:
        raise UserError(f"{run} contains a run already: give --resume to continue it, or another --out")
    if resume and not storage.exists(run):
        raise UserError(f"{run} contains no run to resume: give the --out of the run, or leave --resume out")

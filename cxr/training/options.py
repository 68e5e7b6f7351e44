"""Options of training runs and of searches over them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from cxr import storage
from cxr.errors import UserError, check_least

CHECKPOINT_SCORE = "checkpoint_score"  # reported metric by which Ray Train keeps checkpoints; not logged

SEARCH = "search"  # folder in OUT with the state of a search
ShardReader = Literal["own", "ray"]
CPU_SHARE = 0.98  # of a worker's CPUs, requested from Ray; the rest is for the processes that supervise runs


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How training uses the cluster.

    With several workers, a step still has `batch_size` images in total. Losses, gradients and metrics are those of
    all these images, and mixup, mosaic and similar steps choose partners from as many images as on one worker. The
    number of workers affects only three things: random numbers, whose seeds differ by worker; which images share a
    step, if a split does not fit into a worker's cache; and batch norm on CPUs, where each worker uses the statistics
    of its own images (a note says so).
    """

    workers: Annotated[int | str, tyro.conf.arg(metavar="N|MIN:MAX")] = 1
    """Number of training processes. If there are GPUs, each process takes one. 2:8: from 2 to 8 processes; training
    continues with fewer when machines leave, and with more when machines are added."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    """Device to train on. auto: GPUs if the cluster has any."""
    cpus_per_worker: float = 1
    """Number of CPUs reserved for each process. It is also the number of threads of training on CPUs."""
    shard_reader: ShardReader = "own"
    """Reader of shards. own: each process reads its row groups itself, in an order that does not depend on the number
    of processes. ray: Ray Data reads them on all machines of the cluster, which must have a free CPU; the order
    depends on the number of processes, and folds are not available."""
    compile: bool = False
    """Compile the network with torch.compile."""
    keep_checkpoints: int = 2
    """Number of best checkpoints to keep, in addition to the last one."""
    average_checkpoints: int = 0
    """Number of best checkpoints whose weights are averaged after training; the average replaces the best one if it
    validates better. 0: no average."""
    checkpoint_every: str = "10m"
    """Time between checkpoints within an epoch, such as 90s, 10m or 2h. Training resumes exactly at such a
    checkpoint. 0: write checkpoints only at the end of each epoch."""
    max_failures: int = 3
    """Number of times that training restarts from the last checkpoint after a process or a machine has died."""
    max_preemption_failures: int = -1
    """Number of times that training restarts after the cluster has lost a machine with notice, such as a preempted
    spot instance; a checkpoint is written upon notice. -1: no limit."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\d+(:\d+)?", str(self.workers)) or not 1 <= self.min_workers <= self.max_workers:
            raise UserError(
                f"workers: expected a number from 1, or two such as 2:8, the smaller one first, got {self.workers}"
            )
        _ = self.checkpoint_seconds  # raises
        if self.max_preemption_failures < -1:
            raise UserError(
                f"max_preemption_failures: expected 0 or more, or -1 for no limit, got {self.max_preemption_failures}"
            )
        check_least(self, keep_checkpoints=1, max_failures=0)
        if self.cpus_per_worker <= 0:
            raise UserError(f"cpus_per_worker: expected a positive number, got {self.cpus_per_worker:g}")
        if self.average_checkpoints < 0 or self.average_checkpoints == 1:
            raise UserError(
                f"average_checkpoints: expected 0 for no average, or 2 or more, got {self.average_checkpoints}"
            )

    @property
    def min_workers(self) -> int:
        """Smallest number of processes that training starts or continues with."""
        return int(str(self.workers).partition(":")[0])

    @property
    def max_workers(self) -> int:
        """Number of processes that training uses if the cluster has room for them."""
        return int(str(self.workers).rpartition(":")[2])

    @property
    def is_elastic(self) -> bool:
        """Whether the number of processes may change during training."""
        return self.min_workers < self.max_workers

    @property
    def checkpoint_seconds(self) -> float:
        """Seconds between checkpoints within an epoch; 0 for none."""
        parts = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", self.checkpoint_every)
        if parts is None or not (parts[2] or not float(parts[1])):
            raise UserError(
                f"checkpoint_every: expected a time such as 90s, 10m or 2h, or 0 for never, got "
                f"{self.checkpoint_every}"
            )
        return float(parts[1]) * {"": 0, "s": 1, "m": 60, "h": 3600}[parts[2]]

    @property
    def num_to_keep(self) -> int:
        """Best checkpoints that Ray Train keeps: enough to average, and room for the average itself."""
        average = self.average_checkpoints
        return max(self.keep_checkpoints, average + 1) if average else self.keep_checkpoints

    @property
    def resources_per_worker(self) -> dict[str, float]:
        """What Ray reserves for a worker, apart from its GPU."""
        return {"CPU": self.cpus_per_worker * CPU_SHARE}


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """How to search hyperparameters."""

    trials: int = 8
    """Number of trials, each with different settings."""
    frozen_params: tuple[str, ...] = ()
    """Settings to exclude from the search, for example backbone. They keep the recipe's values."""
    search_seed: int = 0
    """Seed of the sampler (TPE)."""
    objectives: tuple[str, ...] = ()
    """Metrics to optimize together, for example mean_auroc psnr_pooled. Default: only the recipe's monitored
    metric."""
    grace_period: int = 0
    """Number of epochs of the last stage that every trial completes before it may be stopped early. 0: a quarter of
    that stage's epochs."""
    max_concurrent_trials: int | None = None
    """Maximum number of trials at the same time. Default: as many as the cluster has room for."""

    def __post_init__(self) -> None:
        check_least(self, trials=1, grace_period=0, max_concurrent_trials=1)


def check_resume(run: str, resume: bool) -> None:
    """Raise UserError if a run would overwrite the one in folder `run`, or if there is none to resume."""
    if storage.exists(run) and not resume:
        raise UserError(f"{run} already contains a run: use --resume to continue it, or another --out")
    if resume and not storage.exists(run):
        raise UserError(f"{run} contains no run to resume: use the --out of the run, or omit --resume")

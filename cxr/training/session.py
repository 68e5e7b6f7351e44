"""The interface between a training worker and its environment: Ray Train's worker group, or its own process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import ray.train
from ray.data import DataIterator
from ray.train import Checkpoint, UserCallback

from cxr import storage
from cxr.training.run_log import is_within_epoch, read_in_progress, read_metrics


@dataclass(frozen=True)
class Reported:
    """A checkpoint that is still stored, and the metrics reported with it."""

    checkpoint: Checkpoint
    metrics: dict[str, Any]


class Session(Protocol):
    """The surroundings of one worker of a run."""

    def latest(self) -> Checkpoint | None:
        """The checkpoint to resume from; None at the beginning of a run."""
        ...

    def report(self, metrics: dict[str, Any], folder: str | None, name: str) -> None:
        """Hand over the metrics of an epoch and, from rank 0, a local folder to store as the checkpoint `name`."""
        ...

    def reported(self) -> list[Reported]:
        """The stored checkpoints of this run, alike on every worker."""
        ...

    def stream(self, split: str) -> DataIterator | None:
        """This worker's share of a split that Ray Data reads."""
        ...

    def machines_to_be_lost(self) -> frozenset[str]:
        """Ids of the run's machines whose loss is announced, alike on every worker; all workers ask equally often."""
        ...


class RayTrainSession:
    """The session of a worker in Ray Train's worker group."""

    def latest(self) -> Checkpoint | None:
        return ray.train.get_checkpoint()

    def report(self, metrics: dict[str, Any], folder: str | None, name: str) -> None:
        checkpoint = ray.train.Checkpoint.from_directory(folder) if folder else None
        ray.train.report(metrics, checkpoint, checkpoint_dir_name=name)

    def reported(self) -> list[Reported]:
        return [Reported(saved.checkpoint, saved.metrics) for saved in ray.train.get_all_reported_checkpoints()]

    def stream(self, split: str) -> DataIterator | None:
        return ray.train.get_dataset_shard(split)

    def machines_to_be_lost(self) -> frozenset[str]:
        announced = ray.train.get_preemption_info()
        return frozenset(announced.preempted_node_ids if announced else ())


@dataclass
class InProcessSession:
    """The session of a run's only worker, without the controller and the worker process that Ray Train would start.

    The files are those of Ray Train: OUT/NAME holds the best checkpoints and the last one. OUT/metrics.jsonl, which
    the first callback writes, decides which checkpoints there are.

    Args:
        keep: how many of the best checkpoints by `monitor` to keep, besides the last.
        callbacks: are given each report.
        datasets: for data that Ray Data reads, a function for each split that makes its dataset.
    """

    out: str
    name: str
    monitor: str
    mode: Literal["min", "max"]
    keep: int
    callbacks: Sequence[UserCallback]
    datasets: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rows = [*read_metrics(self.out), *filter(None, [read_in_progress(self.out)])]
        folders = [(row, storage.join(self.out, self.name, row["checkpoint"])) for row in rows]
        self._reported = [Reported(_checkpoint(uri), row) for row, uri in folders if storage.exists(uri)]

    def latest(self) -> Checkpoint | None:
        return self._reported[-1].checkpoint if self._reported else None

    def report(self, metrics: dict[str, Any], folder: str | None, name: str) -> None:
        assert folder, "the only worker has rank 0, which saves checkpoints"
        uri = storage.join(self.out, self.name, name)
        storage.upload_folder(Path(folder), uri)
        reported = Reported(_checkpoint(uri), metrics)
        others = [saved for saved in self._reported if storage.name(saved.checkpoint.path) != name]
        self._reported = [*others, reported]
        log, *callbacks = self.callbacks
        log.after_report(None, [metrics], reported.checkpoint)  # pyright: ignore[reportArgumentType]
        self._delete_all_but_the_best()  # not before it is in the log, from whose last row a killed run resumes
        for callback in callbacks:
            callback.after_report(None, [metrics], reported.checkpoint)  # pyright: ignore[reportArgumentType]

    def reported(self) -> list[Reported]:
        return list(self._reported)

    def stream(self, split: str) -> DataIterator | None:
        return self.datasets[split]().iterator()

    def machines_to_be_lost(self) -> frozenset[str]:
        return frozenset()

    def _delete_all_but_the_best(self) -> None:
        """Keep the last checkpoint, from which a run resumes, and the best ones, the latest of equals first."""
        sign = 1 if self.mode == "max" else -1

        def rank(number: int) -> tuple[bool, float, int]:
            metrics = self._reported[number].metrics
            return metrics["rankable"], sign * metrics[self.monitor] if metrics["rankable"] else 0.0, number

        whole = [number for number, saved in enumerate(self._reported) if not is_within_epoch(saved.metrics)]
        best = sorted(whole, key=rank, reverse=True)[: self.keep]
        stays = {*best, len(self._reported) - 1}
        for number, saved in enumerate(self._reported):
            if number not in stays:
                storage.delete(storage.join(self.out, self.name, storage.name(saved.checkpoint.path)))
        self._reported = [saved for number, saved in enumerate(self._reported) if number in stays]


def _checkpoint(uri: str) -> Checkpoint:
    path, files = storage.ray_storage(uri)
    return Checkpoint(path, files)

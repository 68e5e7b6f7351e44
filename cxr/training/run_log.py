"""The record of a run: every metric to metrics.jsonl and TensorBoard, and a line per epoch for the reader."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray.train import Checkpoint, UserCallback
from torch.utils.tensorboard import SummaryWriter

from cxr import storage
from cxr.families.base import Recipe
from cxr.runtime import console
from cxr.runtime.metrics import record_epoch
from cxr.training.options import CHECKPOINT_SCORE

METRICS_FILE, TENSORBOARD = "metrics.jsonl", "tensorboard"
IN_PROGRESS = "in_progress.json"  # in OUT: the last checkpoint within an epoch that has not ended
TIME, PARTS = "time/", ("data", "compute", "gradients", "validation")  # of an epoch's duration, fractions
GPU_SHARE = "time/gpu"  # fraction of the time of an epoch's steps in which the GPU computed
AVERAGE = "average"  # the stage of a row about an average of epochs


class RunLog(UserCallback):
    """Writes what workers report, from the process that controls the run.

    Object stores cannot append, so there the whole file is written anew each epoch: a few kilobytes.
    """

    def __init__(self, out: str, name: str, monitor: str, *, show: bool = True, by_ray: bool = False) -> None:
        self.show, self.by_ray, self._advised = show, by_ray, False
        self.out, self.name, self.monitor = out, name, monitor
        self._lines: list[str] | None = None
        self._board: Board | None = None

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        row = combine(metrics)
        if checkpoint is not None:
            row["checkpoint"] = storage.name(checkpoint.path)
        if is_within_epoch(row):
            storage.write_json(storage.join(self.out, IN_PROGRESS), row)
            text = f"{self.name} {row['epoch'] + 1}/{row['epochs']}: saved after step {row['step']} of {row['steps']}"
            console.event("checkpoint", text, shown=self.show, run=self.out, **row)
            return
        self._append(row)
        if storage.exists(in_progress := storage.join(self.out, IN_PROGRESS)):
            storage.delete(in_progress)  # the epoch has ended
        if "images_per_s" in row:
            shares = {part: row[TIME + part] for part in PARTS if TIME + part in row}
            record_epoch(self.out, row["images_per_s"], row["epoch"], shares, row.get(GPU_SHARE))
        if row.get("stage") != AVERAGE:  # it would be a second value at the last epoch
            self._board = self._board or Board(storage.join(self.out, TENSORBOARD))
            self._board.write(row)
        console.event("epoch", self.line(row), shown=self.show, run=self.out, **row)
        if self.show and not self._advised and (advice := self.advice(row)):
            self._advised = True
            console.note(advice)

    def _append(self, row: dict[str, Any]) -> None:
        """Add a row; rows of epochs that a restart repeats give way to the new ones. Averages follow their epoch."""
        if self._lines is None:
            self._lines = [json.dumps(old) for old in read_metrics(self.out)]
        self._lines = [line for line in self._lines if _order(json.loads(line)) < _order(row)]
        self._lines.append(json.dumps(row))
        storage.write_text(storage.join(self.out, METRICS_FILE), "\n".join(self._lines) + "\n")

    def line(self, row: dict[str, Any]) -> str:
        """E.g. `train 3/20  loss 0.412  correlation 0.8123  310 images/s  0:42 left`."""
        if row.get("stage") == AVERAGE:
            return f"{self.name} average of epochs {row['averaged']}  {self.monitor} {row[self.monitor]:.4f}"
        left = round(row["seconds"] / row["epoch"] * (row["epochs"] - row["epoch"]))
        value = row.get(self.monitor, math.nan)  # a stage may not measure it
        shares = [f"{row[TIME + part]:.0%} {part}" for part in PARTS if row.get(TIME + part, 0) >= 0.005]
        parts = [
            f"{self.name} {row['epoch']}/{row['epochs']}",
            row.get("stage", ""),
            f"loss {row['train/loss']:.4g}",
            f"{self.monitor} {value:.4f}" if math.isfinite(value) else "",
            f"{row['images_per_s']:.0f} images/s",
            f"time: {', '.join(shares)}" if shares else "",
            f"GPU busy {row[GPU_SHARE]:.0%}" if GPU_SHARE in row else "",
            f"{left // 60}:{left % 60:02d} left",
            f"degenerate: {row['degenerate']}" if "degenerate" in row else "",
        ]
        return "  ".join(filter(None, parts))

    def advice(self, row: Mapping[str, Any]) -> str:
        """What to do if this epoch was mostly spent waiting for data; "" otherwise, and for a short first epoch,
        which fills caches."""
        waited = row.get(TIME + "data", 0.0)
        if waited <= 0.5 or (row["epoch"] == 1 and row["seconds"] < 60):
            return ""
        remedy = (
            "add CPU machines, or train from shards that each process reads (omit --stream and --shard-reader)"
            if self.by_ray
            else "store fewer pixels (--stored-size), or put the shards on faster storage near the workers"
        )
        return f"{waited:.0%} of epoch {row['epoch']} was spent waiting for data: {remedy}"


def _order(row: dict[str, Any]) -> tuple[int, bool]:
    return row["epoch"], row.get("stage") == AVERAGE


class Board:
    """TensorBoard event files at any URI: written locally, then copied to an object store."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.folder = Path(uri) if storage.is_local(uri) else Path(tempfile.mkdtemp(prefix="cxr-tensorboard-"))
        self.writer = SummaryWriter(str(self.folder))

    def write(self, row: dict[str, Any]) -> None:
        for name, value in scalars(row).items():
            self.writer.add_scalar(name, value, row["epoch"])
        self.writer.flush()
        if not storage.is_local(self.uri):
            self._upload()

    def _upload(self) -> None:
        try:
            storage.upload_folder(self.folder, self.uri)
        except storage.StorageError as error:  # the next epoch brings these too: no reason to stop training
            console.note(f"TensorBoard's files were not copied: {error}")


def combine(metrics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row to log of what each worker reported, which differs only in speed."""
    row = {key: value for key, value in metrics[0].items() if key not in ("applied", CHECKPOINT_SCORE)}
    for name in row:
        if name == "images_per_s" or name.startswith(TIME):
            row[name] = sum(worker[name] for worker in metrics) / len(metrics)
    return row


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row, for software that draws curves over epochs."""
    return {
        name: float(value)
        for name, value in row.items()
        if isinstance(value, (int, float)) and math.isfinite(value) and name != "epoch"
    }


def best_row(rows: Sequence[dict[str, Any]], recipe: Recipe) -> dict[str, Any] | None:
    """The best rankable epoch by the recipe's monitor, the latest of equals as in Ray Train; None if there is
    none."""
    sign = 1 if recipe.mode == "max" else -1
    rankable = [row for row in rows if row["rankable"]]
    return max(reversed(rankable), key=lambda row: sign * row[recipe.monitor], default=None)


def is_within_epoch(row: Mapping[str, Any]) -> bool:
    """Whether this was reported with a checkpoint within an epoch, so that it has no metrics."""
    return "step" in row


def read_in_progress(out: str) -> dict[str, Any] | None:
    """What was reported with the last checkpoint within an epoch, unless that epoch has ended since."""
    uri = storage.join(out, IN_PROGRESS)
    row = storage.read_json(uri) if storage.exists(uri) else None
    ended = [row["epoch"] for row in read_metrics(out)]
    return row if row and row["epoch"] >= max(ended, default=0) else None


def read_metrics(out: str) -> list[dict[str, Any]]:
    """Rows of a run's metrics.jsonl, one an epoch and one an average of epochs; empty where there is none yet."""
    uri = storage.join(out, METRICS_FILE)
    return [json.loads(line) for line in storage.read_text(uri).splitlines()] if storage.exists(uri) else []

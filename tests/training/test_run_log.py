"""The record of a run: the best epoch, rows that a restart repeats, a board that cannot be copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cxr.families.align import AlignRecipe
from cxr.training.run_log import RunLog, best_row, read_metrics

NAN = float("nan")


def row(epoch: int, value: float) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "epochs": 3,
        "pairwise_lung_iou": value,
        "rankable": value == value,
        "images_per_s": 10.0,
        "seconds": 1.0,
        "train/loss": 0.5,
    }


def test_the_best_epoch_is_the_latest_of_equals_and_never_nan() -> None:
    recipe = AlignRecipe()
    rows = [row(1, NAN), row(2, 0.5), row(3, 0.7), row(4, 0.7), row(5, 0.1)]
    assert best_row(rows, recipe) == rows[3]
    assert best_row(rows[:1], recipe) is None


def test_a_repeated_epoch_replaces_the_old_row(tmp_path: Path) -> None:
    log = RunLog(str(tmp_path), "train", "pairwise_lung_iou")
    for epoch, value in ((1, 0.1), (2, 0.2)):
        log.after_report(None, [row(epoch, value)], None)
    resumed = RunLog(str(tmp_path), "train", "pairwise_lung_iou")
    resumed.after_report(None, [row(2, 0.3) | {"applied": {"lr": 1}}], None)
    assert [(r["epoch"], r["pairwise_lung_iou"]) for r in read_metrics(str(tmp_path))] == [(1, 0.1), (2, 0.3)]
    assert "applied" not in read_metrics(str(tmp_path))[1]
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_the_line_shows_progress_and_speed() -> None:
    line = RunLog("out", "train", "pairwise_lung_iou").line(row(1, 0.25))
    assert line == "train 1/3  loss 0.5  pairwise_lung_iou 0.2500  10 images/s  0:02 left"

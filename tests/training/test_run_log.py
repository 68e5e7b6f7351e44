"""The record of a run: the best epoch, rows that a restart repeats, a board that cannot be copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cxr.families.align import AlignRecipe
from cxr.training.engine import EpochSoFar
from cxr.training.run_log import RunLog, best_row, read_metrics
from cxr.training.worker import shares_of_time

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


def test_the_line_shows_how_busy_gpus_were() -> None:
    line = RunLog("out", "train", "pairwise_lung_iou").line(row(1, 0.25) | {"time/gpu": 0.834})
    assert "10 images/s  GPU busy 83%  0:02 left" in line


def with_times(epoch: int, seconds: float, **shares: float) -> dict[str, Any]:
    return row(epoch, 0.25) | {"seconds": seconds} | {f"time/{name}": share for name, share in shares.items()}


def test_the_line_says_what_the_time_was_spent_on(tmp_path: Path) -> None:
    log = RunLog(str(tmp_path), "train", "pairwise_lung_iou")
    workers = [
        with_times(1, 1.0, data=share, compute=0.9 - share, gradients=0.0, validation=0.1) for share in (0, 0.4)
    ]
    log.after_report(None, workers, None)
    (stored,) = read_metrics(str(tmp_path))
    assert (stored["time/data"], stored["time/compute"]) == (0.2, 0.7)
    assert "  time: 20% data, 70% compute, 10% validation  " in log.line(stored)


def test_advice_is_given_once_where_data_is_what_training_waits_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(str(tmp_path), "train", "pairwise_lung_iou", by_ray=True)
    for epoch, share in ((1, 0.9), (2, 0.4), (3, 0.8), (4, 0.8)):
        log.after_report(None, [with_times(epoch, 10.0, data=share, compute=1 - share)], None)
    advice = "80% of epoch 3 was spent waiting for data: add CPU machines, or train from shards"
    assert capsys.readouterr().out.count("spent waiting for data") == 1
    assert log.advice(with_times(3, 10.0, data=0.8)).startswith(advice)
    assert log.advice(with_times(1, 90.0, data=0.8)), "a long first epoch"
    stored = RunLog("out", "train", "pairwise_lung_iou").advice(with_times(3, 10.0, data=0.8))
    assert "--stored-size" in stored


def test_the_shares_of_an_epoch_add_up() -> None:
    so_far = EpochSoFar(steps=10, seconds=8.0, waited=2.0)
    shares = shares_of_time(so_far, validated=2.0, exchange_s=0.1)
    assert shares == pytest.approx(
        {"time/data": 0.2, "time/compute": 0.5, "time/gradients": 0.1, "time/validation": 0.2}
    )
    assert shares_of_time(so_far, 2.0, 9.0)["time/gradients"] == pytest.approx(0.6), "no more than there is"

"""A run's only worker keeps the checkpoints that Ray Train would keep, and resumes from the last one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from cxr.training.run_log import RunLog
from cxr.training.session import InProcessSession


class KilledError(Exception):
    pass


def session(
    out: Path, reports: list[str] | None = None, mode: str = "max", killed_in: int | None = None
) -> InProcessSession:
    class Seen(RunLog):
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            if metrics[0]["epoch"] == killed_in:
                raise KilledError
            super().after_report(run_context, metrics, checkpoint)
            if reports is not None:
                reports.append(checkpoint.path)

    log = Seen(str(out), "train", "agreement", show=False)
    return InProcessSession(str(out), "train", "agreement", mode, 2, [log])  # pyright: ignore[reportArgumentType]


def report(run: InProcessSession, folder: Path, epoch: int, value: float) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "weights").write_text(str(epoch))
    row = {"epoch": epoch, "epochs": 9, "stage": "", "seconds": 1.0, "images_per_s": 1.0, "train/loss": 1.0}
    run.report(row | {"agreement": value, "rankable": not math.isnan(value)}, str(folder), f"epoch_{epoch:04d}")


def stored(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "train").iterdir())


def test_the_best_and_the_last_checkpoints_are_kept(tmp_path: Path) -> None:
    out, reports = tmp_path / "out", []
    run = session(out, reports)
    assert run.latest() is None
    for epoch, value in enumerate([0.5, 0.9, math.nan, 0.9, 0.1], 1):
        report(run, tmp_path / "made", epoch, value)
    assert stored(out) == ["epoch_0002", "epoch_0004", "epoch_0005"]
    assert [one.metrics["epoch"] for one in run.reported()] == [2, 4, 5]
    assert [Path(path).name for path in reports] == [f"epoch_{epoch:04d}" for epoch in range(1, 6)]


def test_the_smallest_is_best_where_less_is_better(tmp_path: Path) -> None:
    run = session(tmp_path / "out", mode="min")
    for epoch, value in enumerate([0.5, 0.1, 0.9, 0.2, 0.8], 1):
        report(run, tmp_path / "made", epoch, value)
    assert stored(tmp_path / "out") == ["epoch_0002", "epoch_0004", "epoch_0005"]


def test_a_killed_run_resumes_from_its_last_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = session(out)
    report(run, tmp_path / "made", 1, 0.5)
    report(run, tmp_path / "made", 2, 0.4)
    torn = out / "train" / "epoch_0003"  # written when the process died, but not yet in metrics.jsonl
    torn.mkdir()
    again = session(out)
    latest = again.latest()
    assert latest is not None
    with latest.as_directory() as folder:
        assert (Path(folder) / "weights").read_text() == "2"
    report(again, tmp_path / "made", 3, 0.6)
    assert (torn / "weights").read_text() == "3"
    assert [one.metrics["epoch"] for one in again.reported()] == [1, 3]


def test_a_run_that_is_killed_before_a_checkpoint_is_logged_loses_only_that_epoch(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = session(out, killed_in=5)
    for epoch, value in enumerate([0.9, 0.8, 0.7, 0.6], 1):
        report(run, tmp_path / "made", epoch, value)
    with pytest.raises(KilledError):
        report(run, tmp_path / "made", 5, 0.5)
    latest = session(out).latest()
    assert latest is not None
    assert Path(latest.path).name == "epoch_0004"

"""Which epochs a worker calls rankable, and how patience counts them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from cxr import schema
from cxr.families.aecnn import AecnnRecipe
from cxr.families.align import AlignRecipe
from cxr.families.base import SingleProcess
from cxr.training.engine import Engine
from cxr.training.run_log import best_row
from cxr.training.worker import TrainingProgress, Worker
from tests.families.test_recipes import some_batches

RECIPE = AlignRecipe(size=32, backbone="conv3", batch_size=4, epochs=3, lungs=False)


class Pass:
    """A stream that gives the same batches in every epoch."""

    steps = 2

    def train(self, epoch: int, skipped: int = 0) -> Any:
        return some_batches()

    def every(self) -> Any:
        return some_batches()


def test_a_degenerate_epoch_is_not_rankable_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts = iter(["", "drifted: far away", ""])
    monkeypatch.setattr(AlignRecipe, "degenerate_reason", lambda self, metrics: next(verdicts))
    rows: list[Mapping[str, Any]] = []
    monkeypatch.setattr(Worker, "_report", lambda self, engine, metrics, report: rows.append(report))
    task = RECIPE.task(RECIPE.network(schema.FINDINGS))
    task.begin(some_batches, SingleProcess())
    engine = Engine(task, RECIPE, SingleProcess(), steps_per_epoch=2, device=torch.device("cpu"))
    worker = Worker(RECIPE, {}, SingleProcess(), torch.device("cpu"))
    for _ in range(3):
        worker._epoch(engine, Pass(), Pass())  # pyright: ignore[reportArgumentType]
    assert [row.get("degenerate") for row in rows] == [None, "drifted: far away", None]
    assert [row["rankable"] for row in rows] == [True, False, True]
    assert all(math.isfinite(row[RECIPE.monitor]) for row in rows), "the log shows what was measured"
    assert [math.isnan(row["checkpoint_score"]) for row in rows] == [False, True, False]
    assert best_row([dict(row) for row in rows], RECIPE)["epoch"] in (1, 3)  # pyright: ignore[reportOptionalSubscript]
    assert worker.progress.best == max(rows[0][RECIPE.monitor], rows[2][RECIPE.monitor])


def test_only_the_last_stage_is_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = []
    monkeypatch.setattr(Worker, "_report", lambda self, engine, metrics, report: rows.append(dict(report)))
    monkeypatch.setattr("cxr.training.worker.open_streams", lambda *args: (Pass(), Pass()))
    monkeypatch.setattr("ray.train.get_checkpoint", lambda: None)
    small = {"size": 32, "patch": 16, "width": 8, "backbone": "resnet18", "stem_stride": 1, "batch_size": 4}
    recipe = AecnnRecipe(**small, classifier_epochs=1, autoencoder_epochs=1, epochs=2)
    config = {"data": {}, "findings": schema.FINDINGS, "compile": False}
    done = Worker(recipe, config, SingleProcess(), torch.device("cpu")).run()
    assert done["epochs"] == 4
    assert [row["stage"] for row in rows] == ["classifier", "autoencoder", "joint", "joint"]
    assert not any(row["rankable"] for row in rows[:2])
    assert "mean_auroc" in rows[0]
    assert "mean_auroc" not in rows[1], "the autoencoder's stage does not classify"
    assert "psnr_pooled" in rows[1]
    assert rows[1]["lr"] < rows[0]["lr"] + 1e-3  # each stage ends its own schedule
    assert best_row(rows, recipe) is None or best_row(rows, recipe)["epoch"] > 2  # pyright: ignore


@pytest.mark.parametrize(("values", "since_best"), [((0.5, None), 1), ((None, 0.1), 0), ((None, 0.5, 0.4, None), 2)])
def test_patience_counts_epochs_that_cannot_be_ranked(values: tuple[float | None, ...], since_best: int) -> None:
    progress = TrainingProgress()
    for value in values:
        progress.update(value, "max")
    assert progress.since_best == since_best
    assert progress.best == max(value for value in values if value is not None)

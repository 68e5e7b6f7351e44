"""The mean of the best epochs' networks: selection, averaging, reporting, and that it is done once."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch
from torch import nn

from cxr import schema
from cxr.errors import UserError
from cxr.families import checkpoint, checkpoint_files
from cxr.families.align import AlignRecipe
from cxr.families.base import SingleProcess
from cxr.training.checkpoint_average import best_kept
from cxr.training.engine import Engine
from cxr.training.options import RunOptions
from cxr.training.run_log import RunLog, best_row, read_metrics
from cxr.training.session import RayTrainSession
from cxr.training.worker import TrainingProgress, Worker
from tests.families.test_recipes import some_batches

RECIPE = AlignRecipe(size=32, backbone="conv3", batch_size=4, epochs=4, lungs=False)


def reported(value: float, epoch: int, stage: str = "", folder: Path | None = None, rankable: bool = True) -> Any:
    metrics = {RECIPE.monitor: value, "epoch": epoch, "stage": stage, "rankable": rankable}
    return SimpleNamespace(metrics=metrics, checkpoint=folder and ray.train.Checkpoint(str(folder)))


def keep(monkeypatch: pytest.MonkeyPatch, *kept: Any) -> None:
    monkeypatch.setattr("ray.train.get_all_reported_checkpoints", lambda: list(kept))


def test_a_mean_of_floats_batch_norm_s_included_and_the_first_s_integers() -> None:
    norms = [nn.BatchNorm1d(2) for _ in range(3)]
    for number, norm in enumerate(norms):
        norm(torch.randn(8, 2) + 3 * number)
        norm.running_var[1] = torch.tensor(math.nan if number == 1 else 1.0)  # pyright: ignore
        norm.num_batches_tracked.fill_(7 - number)  # pyright: ignore[reportCallIssue, reportOptionalMemberAccess]
    states = [norm.state_dict() for norm in norms]
    mean = checkpoint.averaged(states)
    expected = torch.stack([state["running_mean"] for state in states]).mean(0)
    torch.testing.assert_close(mean["running_mean"], expected)
    assert mean["running_var"].isnan().tolist() == [False, True]
    assert mean["num_batches_tracked"] == 7
    norms[0].load_state_dict(mean)
    assert checkpoint.averaged([{"x": torch.tensor([1e38, 0.1])}] * 5)["x"].tolist() == pytest.approx([1e38, 0.1])


def test_the_best_ranked_epochs_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    keep(
        monkeypatch,
        reported(0.8, 1, rankable=False),
        reported(0.5, 2),
        reported(0.7, 3),
        reported(0.7, 4),
        reported(0.9, 4, "average"),
    )
    assert [one.metrics["epoch"] for one in best_kept(RECIPE, 3, RayTrainSession().reported())] == [4, 3, 2]
    assert [one.metrics["epoch"] for one in best_kept(RECIPE, 2, RayTrainSession().reported())] == [4, 3]


def trained(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Worker, Engine, list[dict[str, Any]]]:
    """A worker at the end of two epochs, whose checkpoints are kept in `folder`."""
    torch.manual_seed(0)
    task = RECIPE.task(RECIPE.network(schema.FINDINGS))
    task.begin(some_batches, SingleProcess())
    engine = Engine(task, RECIPE, SingleProcess(), steps_per_epoch=2, device=torch.device("cpu"))
    worker = Worker(
        RECIPE, {"average": 2, "findings": ()}, SingleProcess(), torch.device("cpu"), TrainingProgress(epoch=2)
    )
    for epoch in (1, 2):
        engine.epoch(some_batches())
        weights = engine.shipped().state_dict()
        checkpoint.save(folder / str(epoch), RECIPE, task, weights, findings=(), metrics={})
    keep(monkeypatch, *(reported(0.1 * epoch, epoch, folder=folder / str(epoch)) for epoch in (1, 2)))
    reports: list[dict[str, Any]] = []

    def report(metrics: dict[str, Any], given: ray.train.Checkpoint, checkpoint_dir_name: str) -> None:
        reports.append(metrics | {"checkpoint": checkpoint_dir_name})
        (folder / checkpoint_dir_name).mkdir()
        given.to_directory(folder / checkpoint_dir_name)

    monkeypatch.setattr("ray.train.report", report)
    return worker, engine, reports


def test_the_average_is_reported_once_and_training_can_resume_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, engine, reports = trained(tmp_path, monkeypatch)
    before = {name: value.clone() for name, value in engine.shipped().state_dict().items()}
    stream: Any = SimpleNamespace(every=some_batches)
    worker._average(engine, stream)
    worker._average(engine, stream)
    (report,) = reports
    assert (report["stage"], report["averaged"], report["epoch"]) == ("average", [1, 2], 2)
    assert RECIPE.monitor in report
    made = checkpoint.load(str(tmp_path / report["checkpoint"])).network.state_dict()
    first, second = (checkpoint.load(str(tmp_path / str(epoch))).network.state_dict() for epoch in (1, 2))
    assert any(not torch.equal(first[name], second[name]) for name in made)
    for name, value in made.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (first[name] + second[name]) / 2)
    resume = torch.load(tmp_path / report["checkpoint"] / checkpoint_files.RESUME, weights_only=True)
    assert all(torch.equal(value, before[name]) for name, value in resume["engine"]["network"].items())
    again = Worker(RECIPE, worker.config, SingleProcess(), worker.device, TrainingProgress(**resume["progress"]))
    again._average(engine, stream)
    assert len(reports) == 1
    again.config["average"] = 3
    again._average(engine, stream)
    assert [report["checkpoint"] for report in reports] == ["average_0002_of_2", "average_0002_of_3"]


def test_a_single_checkpoint_is_not_averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, engine, reports = trained(tmp_path, monkeypatch)
    keep(monkeypatch, reported(0.1, 1), reported(0.2, 2, rankable=False))
    worker._average(engine, SimpleNamespace(every=some_batches))  # pyright: ignore[reportArgumentType]
    assert reports == []


def row(epoch: int, value: float, **more: Any) -> dict[str, Any]:
    common = {"epoch": epoch, "epochs": 3, RECIPE.monitor: value, "images_per_s": 10.0, "seconds": 1.0}
    return {**common, "train/loss": 0.5, "stage": "", "rankable": True, **more}


def test_the_log_has_an_average_in_addition_to_its_epoch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(str(tmp_path), "train", RECIPE.monitor)
    of = {"epoch": 2, "stage": "average", "averaged": [1, 2], "seconds": 1.0, "epochs": 3, "rankable": True}
    for one in (row(1, 0.1), row(2, 0.3), {**of, RECIPE.monitor: 0.2}, {**of, RECIPE.monitor: 0.4}, row(3, 0.2)):
        log.after_report(None, [one], None)
    rows = read_metrics(str(tmp_path))
    assert [(one["epoch"], one["stage"]) for one in rows] == [(1, ""), (2, ""), (2, "average"), (3, "")]
    assert best_row(rows, RECIPE) == rows[2]
    assert f"train average of epochs [1, 2]  {RECIPE.monitor} 0.4000" in capsys.readouterr().out
    log.after_report(None, [row(2, 0.1)], None)  # a restart repeats it
    assert [one["epoch"] for one in read_metrics(str(tmp_path))] == [1, 2]


def test_enough_checkpoints_are_kept() -> None:
    assert RunOptions(keep_checkpoints=2).num_to_keep == 2
    assert RunOptions(keep_checkpoints=2, average_checkpoints=3).num_to_keep == 4
    assert RunOptions(keep_checkpoints=6, average_checkpoints=3).num_to_keep == 6
    with pytest.raises(UserError, match="average_checkpoints: expected 0 for no average, or 2 or more, got 1"):
        RunOptions(average_checkpoints=1)

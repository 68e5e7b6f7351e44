"""What MLflow has of a search and of a run in Ray Train's worker group, which continues when it is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from optuna.distributions import FloatDistribution

from cxr import storage
from cxr.families.align import AlignRecipe
from cxr.training.fit import fit
from cxr.training.mlflow_log import EXPERIMENT, FILE, TRACKING_URI
from cxr.training.options import SearchOptions
from cxr.training.run_log import read_metrics
from cxr.training.search import search
from tests.made_shards import write_shards

mlflow = pytest.importorskip("mlflow")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
RECIPE = AlignRecipe(size=32, epochs=1, batch_size=8, backbone="conv3", lungs=False)


def run_of(client: Any, out: str) -> Any:
    return client.get_run(storage.read_json(storage.join(out, FILE))["run_id"])


def test_a_run_and_a_search_are_tracked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv(TRACKING_URI, database)
    monkeypatch.setenv(EXPERIMENT, "tests")
    client = mlflow.MlflowClient(database)
    client.create_experiment("tests", artifact_location=(tmp_path / "artifacts").as_uri())
    made, out = write_shards(tmp_path / "shards", {"train": 32, "val": 9}, size=32), str(tmp_path / "run")

    fitted = fit(RECIPE, made, out)
    run = run_of(client, out)
    assert run.info.status == "FINISHED"
    assert run.data.params["batch_size"] == "8"
    assert run.data.metrics[f"best/{RECIPE.monitor}"] == pytest.approx(fitted.metrics[RECIPE.monitor])
    fit(RECIPE.replace(epochs=2), made, out, resume=True)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(value.step, value.value) for value in history] == [
        (row["epoch"], pytest.approx(row["train/loss"])) for row in read_metrics(out)
    ]
    assert run_of(client, out).info.run_id == run.info.run_id

    out = str(tmp_path / "search")
    trials = search(RECIPE, made, out, SearchOptions(trials=2), space={"lr": FloatDistribution(1e-4, 1e-2, log=True)})
    parent = run_of(client, out)
    assert parent.info.status == "FINISHED"
    nested = client.search_runs(parent.info.experiment_id, f"tags.mlflow.parentRunId = '{parent.info.run_id}'")
    assert {run.info.run_name: float(run.data.params["lr"]) for run in nested} == {
        trial.trial: trial.sampled["lr"] for trial in trials
    }
    assert {run.info.status for run in nested} == {"FINISHED"}
    assert parent.data.tags["checkpoint"] == trials[0].checkpoint

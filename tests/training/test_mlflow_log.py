"""Runs in MLflow, in a real SQLite database: settings, metrics, resuming, trials, pictures, a server that is down."""

from __future__ import annotations

import json
import pickle
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from cxr import storage
from cxr.errors import UserError
from cxr.families import checkpoint_files
from cxr.families.align import AlignRecipe
from cxr.training import mlflow_log
from cxr.training.mlflow_log import EXPERIMENT, SEND_PICTURES, TRACKING_URI, MlflowLog, check_installed
from cxr.training.options import CHECKPOINT_SCORE
from cxr.training.run_log import AVERAGE

mlflow = pytest.importorskip("mlflow")
RECIPE = AlignRecipe(epochs=2, lr=0.01)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Creating its tables takes seconds, so that the tests share one."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"


@pytest.fixture
def client(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client of the database that runs are sent to, with an experiment for each test."""
    monkeypatch.setenv(TRACKING_URI, database)
    monkeypatch.setenv(EXPERIMENT, tmp_path.name)
    client = mlflow.MlflowClient(database)
    client.create_experiment(tmp_path.name, artifact_location=(tmp_path / "artifacts").as_uri())
    return client


def row(epoch: int, value: float, **more: Any) -> dict[str, Any]:
    metrics = {
        "epoch": epoch,
        "images_per_s": 10.0,
        "iou (left)": value,
        "degenerate": "flat",
        CHECKPOINT_SCORE: value,
    }
    return metrics | {"applied": {"lr": 0.01}} | more


def write_checkpoint(folder: Path) -> str:
    folder.mkdir()
    about = {
        "kind": checkpoint_files.KIND,
        "version": checkpoint_files.VERSION,
        "findings": ["Edema"],
        "reading": {"select": "patient_id != 'P7'"},
    }
    (folder / "checkpoint.json").write_text(json.dumps(about))
    (folder / "README.md").write_text("A model card.")
    (folder / "weights.safetensors").write_bytes(b"weights")
    return str(folder)


def test_settings_metrics_and_the_checkpoint_without_weights_are_sent(client: Any, tmp_path: Path) -> None:
    with MlflowLog.begin(str(tmp_path / "run"), RECIPE, {"workers": 2}) as log:
        log.after_report(None, [row(1, 0.5), row(1, 0.5, images_per_s=30.0)], None)
        log.after_report(None, [row(2, float("nan"))], None)
        log.after_report(None, [row(2, 0.75, stage=AVERAGE)], None)
        log.send_best({"iou": 0.75}, write_checkpoint(tmp_path / "checkpoint"))
    run = client.get_run(log.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["lr"] == "0.01"
    assert run.data.params["workers"] == "2"
    assert run.data.tags["checkpoint"] == str(tmp_path / "checkpoint")
    metrics = run.data.metrics
    assert metrics == {"iou _left_": 0.5, "images_per_s": 10.0, f"{AVERAGE}/iou _left_": 0.75, "best/iou": 0.75} | {
        f"{AVERAGE}/images_per_s": 10.0
    }
    history = client.get_metric_history(log.run_id, "images_per_s")
    assert [(value.step, value.value) for value in history] == [(1, 20.0), (2, 10.0)]
    sent = sorted(file.path for file in client.list_artifacts(log.run_id, "checkpoint"))
    assert sent == ["checkpoint/README.md", "checkpoint/checkpoint.json"]
    about = Path(client.download_artifacts(log.run_id, "checkpoint/checkpoint.json", str(tmp_path))).read_text()
    assert json.loads(about)["findings"] == ["Edema"]
    assert "P7" not in about


def test_a_resumed_run_continues_its_mlflow_run(client: Any, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), MlflowLog.begin(str(tmp_path), RECIPE, {}) as first:
        raise RuntimeError
    assert client.get_run(first.run_id).info.status == "FAILED"
    again = MlflowLog.begin(str(tmp_path), RECIPE.replace(epochs=5), {"workers": 1})
    assert again.run_id == first.run_id
    run = client.get_run(first.run_id)
    assert run.info.status == "RUNNING"
    assert (run.data.params["epochs"], run.data.tags["resumed.epochs"], run.data.params["workers"]) == ("2", "5", "1")
    assert "resumed.lr" not in run.data.tags


def test_a_run_that_another_server_has_is_begun_anew(client: Any, tmp_path: Path) -> None:
    storage.write_json(str(tmp_path / mlflow_log.FILE), {"run_id": "0" * 32})
    log = MlflowLog.begin(str(tmp_path), RECIPE, {})
    assert client.get_run(log.run_id).data.params["lr"] == "0.01"


def test_trials_are_nested_under_their_search(client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = MlflowLog.begin(str(tmp_path / "search"), RECIPE, {})
    monkeypatch.delenv(TRACKING_URI)  # as on a worker that does not have the job's variables
    trial = MlflowLog.begin(str(tmp_path / "trial"), RECIPE, {}, pickle.loads(pickle.dumps(search)))
    run = client.get_run(trial.run_id)
    assert run.data.tags["mlflow.parentRunId"] == search.run_id
    assert run.info.experiment_id == client.get_run(search.run_id).info.experiment_id
    search.active = False
    assert not MlflowLog.begin(str(tmp_path / "untracked"), RECIPE, {}, search).active


def test_pictures_of_x_rays_go_to_a_server_only_if_that_is_asked_for(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "maps.png").write_bytes(b"pixels")
    local = MlflowLog.begin(str(tmp_path / "local"), RECIPE, {})
    local.send_pictures([str(tmp_path / "maps.png")])
    assert [file.path for file in client.list_artifacts(local.run_id, "pictures")] == ["pictures/maps.png"]

    client.create_experiment(f"{tmp_path.name}-server", artifact_location="s3://bucket/mlflow")
    monkeypatch.setenv(EXPERIMENT, f"{tmp_path.name}-server")
    sent: list[str] = []
    monkeypatch.setattr(
        mlflow.MlflowClient, "log_artifact", lambda self, run_id, path, folder: sent.append(f"{folder}/{path}")
    )
    server = MlflowLog.begin(str(tmp_path / "server"), RECIPE, {})
    server.send_pictures([str(tmp_path / "maps.png")])
    assert sent == []
    monkeypatch.setenv(SEND_PICTURES, "1")
    server.send_pictures([str(tmp_path / "maps.png")])
    assert [Path(path).name for path in sent] == ["maps.png"]


def test_a_server_that_is_down_is_noted_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        monkeypatch.setenv(TRACKING_URI, f"http://user:secret@127.0.0.1:{probe.getsockname()[1]}")
    start = time.monotonic()
    with MlflowLog.begin(str(tmp_path), RECIPE, {}) as log:
        log.after_report(None, [row(1, 0.5)], None)
        pickle.loads(pickle.dumps(log)).after_report(None, [row(2, 0.5)], None)
    MlflowLog.of(str(tmp_path)).send_files([str(tmp_path / "absent.csv")])
    printed = capsys.readouterr().out
    assert printed.count("MLflow failed; the run continues without it") == 1
    assert "secret" not in printed
    assert time.monotonic() - start < 30


def test_a_server_that_goes_down_is_noted_once_by_all_processes(
    client: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = MlflowLog.begin(str(tmp_path), RECIPE, {})
    controller = pickle.loads(pickle.dumps(log))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("connection refused")

    with monkeypatch.context() as down:
        down.setattr(mlflow.MlflowClient, "log_batch", fail)
        down.setattr(mlflow.MlflowClient, "set_terminated", fail)
        for epoch in (1, 2):
            controller.after_report(None, [row(epoch, 0.5)], None)
        log.end()
    assert capsys.readouterr().out.count("connection refused") == 1
    resumed = MlflowLog.begin(str(tmp_path), RECIPE, {})
    assert resumed.run_id == log.run_id
    assert resumed.active


def test_nothing_is_done_without_the_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(TRACKING_URI, raising=False)
    monkeypatch.setattr(mlflow_log, "_client", lambda uri: pytest.fail("MLflow's client was made"))
    with MlflowLog.begin(str(tmp_path), RECIPE, {}) as log:
        log.after_report(None, [row(1, 0.5)], None)
        log.send_best({"iou": 0.5}, write_checkpoint(tmp_path / "checkpoint"))
        MlflowLog.of(str(tmp_path)).send_pictures(["absent.png"])
    assert not (tmp_path / mlflow_log.FILE).exists()


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.delenv(TRACKING_URI, raising=False)
    check_installed()
    monkeypatch.setenv(TRACKING_URI, "sqlite:///mlflow.db")
    with pytest.raises(UserError, match=r"pip install 'cxr\[mlflow\]'"):
        MlflowLog.begin(str(tmp_path), RECIPE, {})

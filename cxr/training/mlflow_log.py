"""The record of a run in MLflow, if MLFLOW_TRACKING_URI is set: settings, metrics per epoch, checkpoint, pictures.

Nothing is sent if the variable is not set. Images, their ids and patients are never sent, except in pictures, for
which see `MlflowLog.send_pictures`. A tracking server that does not answer never stops a run: its first failure is
noted, and nothing more is sent from that process.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from ray.train import Checkpoint, UserCallback

from cxr import storage
from cxr.errors import UserError
from cxr.families import checkpoint_files
from cxr.families.base import Recipe
from cxr.runtime import console, provenance
from cxr.training.run_log import AVERAGE, combine, is_within_epoch, scalars

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

TRACKING_URI, EXPERIMENT, SEND_PICTURES = "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "CXR_MLFLOW_PICTURES"
FILE = "mlflow.json"  # in OUT: the id of its MLflow run, which a resumed training continues
PARAMS_PER_REQUEST = 100  # the limit of MLflow's REST API
CONNECTION = {  # for one server that is down, MLflow's own defaults add up to minutes
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
}


def check_installed() -> None:
    """Raise UserError if MLFLOW_TRACKING_URI is set but MLflow is not installed."""
    if os.environ.get(TRACKING_URI) and importlib.util.find_spec("mlflow") is None:
        raise UserError(
            f"{TRACKING_URI} is set, but MLflow is not installed: run pip install 'cxr[mlflow]', or unset the "
            f"variable"
        )


def create_experiment() -> None:
    """Create the experiment before several runs start at the same time, which would each create it."""
    MlflowLog("").send(_experiment)


class MlflowLog(UserCallback):
    """The MLflow run of the training or search in `out`. It does nothing if MLFLOW_TRACKING_URI is not set.

    A context manager: the MLflow run fails if its body raises an exception, and is finished otherwise.
    """

    def __init__(self, out: str, run_id: str = "", uri: str = "") -> None:
        self.out, self.run_id = out, run_id
        self.uri = uri or os.environ.get(TRACKING_URI, "")
        self.active = bool(self.uri)

    @classmethod
    def begin(cls, out: str, recipe: Recipe, settings: Mapping[str, Any], search: MlflowLog | None = None) -> Self:
        """Continue the MLflow run whose id is in OUT, or create one with these settings.

        Args:
            settings: options beside the recipe.
            search: the log of the search that this is a trial of.

        Raises:
            UserError: MLflow is not installed.
        """
        check_installed()
        log = cls(out, uri=search.uri if search else "")
        log.active &= search is None or search.active
        params = {name: _text(value) for name, value in {**recipe.to_dict(), **settings}.items()}
        tags = {"out": out, "monitor": recipe.monitor, "commit": provenance.commit(), **provenance.versions()}
        log.send(lambda client: log._begin(client, params, tags, search))
        return log

    @classmethod
    def of(cls, out: str) -> Self:
        """The log of the run that began in OUT."""
        about = storage.join(out, FILE)
        log = cls(out, storage.read_json(about).get("run_id", "") if storage.exists(about) else "")
        log.active &= bool(log.run_id)
        return log

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None or issubclass(kind, Exception):  # other exceptions end the process, which may be restarted
            self.end(failed=kind is not None)

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Checkpoint | None) -> None:
        row = combine(metrics)
        if is_within_epoch(row):
            return
        averaged = row.get("stage") == AVERAGE  # its metrics would be second values of the last epoch
        self._send_metrics(scalars(row), f"{AVERAGE}/" if averaged else "", row["epoch"])

    def send_best(self, metrics: Mapping[str, float], checkpoint: str) -> None:
        """Send the best epoch's metrics, as best/NAME, and its checkpoint's URI and descriptions, without weights."""
        if not self.active:
            return
        self._send_metrics(metrics, "best/")
        self.send(lambda client: client.set_tag(self.run_id, "checkpoint", checkpoint))
        about = checkpoint_files.read_about(checkpoint)
        about.pop("reading", None)  # a selection may name patients
        self.send(lambda client: client.log_dict(self.run_id, about, f"checkpoint/{checkpoint_files.ABOUT}"))
        card = storage.join(checkpoint, checkpoint_files.CARD)
        if storage.exists(card):
            text = storage.read_text(card)
            self.send(lambda client: client.log_text(self.run_id, text, f"checkpoint/{checkpoint_files.CARD}"))

    def send_files(self, uris: Sequence[str], folder: str = "") -> None:
        """Send files as artifacts; for files without images or ids."""
        self.send(lambda client: self._send_files(client, uris, folder))

    def send_pictures(self, uris: Sequence[str]) -> None:
        """Send pictures that show X-rays and their ids, if MLflow stores artifacts in a folder, which is not on a
        server, or if CXR_MLFLOW_PICTURES is 1."""

        def send(client: MlflowClient) -> None:
            folder = storage.is_local(client.get_run(self.run_id).info.artifact_uri or "")
            if folder or os.environ.get(SEND_PICTURES) == "1":
                self._send_files(client, uris, "pictures")

        self.send(send)

    def end(self, *, failed: bool = False, outcome: str = "") -> None:
        """End the MLflow run. A run that Tune stopped early, or whose process died, cannot do so itself."""
        if outcome:
            self.send(lambda client: client.set_tag(self.run_id, "outcome", outcome))
        self.send(lambda client: client.set_terminated(self.run_id, "FAILED" if failed else "FINISHED"))

    def send(self, action: Callable[[MlflowClient], object]) -> None:
        """Call `action` with MLflow's client. If it fails, stop sending, with a note unless this run has had one."""
        if not self.active:
            return
        try:
            action(_client(self.uri))
        except Exception as error:  # MLflow raises exceptions of many libraries
            self.active = False
            self._note(error)

    def _begin(
        self, client: MlflowClient, params: dict[str, str], tags: dict[str, str], search: MlflowLog | None
    ) -> None:
        from mlflow.entities import Param, RunTag

        about = storage.join(self.out, FILE)
        before = storage.read_json(about).get("run_id") if storage.exists(about) else None
        before = _existing(client, before) if before else None
        if before:
            self.run_id, already = before.info.run_id, before.data.params
            client.update_run(self.run_id, status="RUNNING")
        else:
            experiment = client.get_run(search.run_id).info.experiment_id if search else _experiment(client)
            tags |= {"mlflow.parentRunId": search.run_id} if search else {}
            run = client.create_run(experiment, tags=tags, run_name=storage.name(self.out))
            self.run_id, already = run.info.run_id, {}
        storage.write_json(about, {"run_id": self.run_id})
        new = [Param(name, value) for name, value in params.items() if name not in already]
        for first in range(0, len(new), PARAMS_PER_REQUEST):
            client.log_batch(self.run_id, params=new[first : first + PARAMS_PER_REQUEST])
        # MLflow's params cannot change, but a resumed run may have, for example, more epochs.
        changed = {name: value for name, value in params.items() if already.get(name, value) != value}
        client.log_batch(self.run_id, tags=[RunTag(f"resumed.{name}", value) for name, value in changed.items()])

    def _send_metrics(self, metrics: Mapping[str, float], prefix: str, step: int = 0) -> None:
        def send(client: MlflowClient) -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000)
            client.log_batch(
                self.run_id,
                metrics=[Metric(_name(prefix + name), value, now, step) for name, value in scalars(metrics).items()],
            )

        self.send(send)

    def _send_files(self, client: MlflowClient, uris: Sequence[str], folder: str) -> None:
        with tempfile.TemporaryDirectory() as local:
            for uri in uris:
                copy = Path(local, storage.name(uri))
                copy.write_bytes(storage.read_bytes(uri))
                client.log_artifact(self.run_id, str(copy), folder or None)

    def _note(self, error: Exception) -> None:
        """Show one note for all processes of a run; `begin` removes the mark."""
        about = storage.join(self.out, FILE)
        known = storage.read_json(about) if self.out and storage.exists(about) else {}
        if not known.get("failed"):
            reason = re.sub(r"//[^/@\s]*@", "//", f"{error}".strip().partition("\n")[0])[:200]
            console.note(f"MLflow failed; the run continues without it: {reason or type(error).__name__}")
        if self.out:
            storage.write_json(about, known | {"failed": True})


@functools.cache
def _client(uri: str) -> MlflowClient:
    """This process's client of a tracking server."""
    for name, value in CONNECTION.items():
        os.environ.setdefault(name, value)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"  # MLflow would send usage statistics to its makers
    from mlflow import MlflowClient

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    return MlflowClient(uri)


def _experiment(client: MlflowClient) -> str:
    name = os.environ.get(EXPERIMENT) or "cxr"
    experiment = client.get_experiment_by_name(name)
    return experiment.experiment_id if experiment else client.create_experiment(name)


def _existing(client: MlflowClient, run_id: str) -> Run | None:
    """The run, or None if this server does not have it."""
    from mlflow.exceptions import MlflowException

    try:
        return client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _name(metric: str) -> str:
    """The same, without characters that MLflow does not accept."""
    return re.sub(r"[^\w\-. /:]", "_", metric)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)

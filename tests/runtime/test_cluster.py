"""Starting a private cluster on a busy machine, and what a job on a shared one knows of its machines."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import ray
import requests
import yaml

from cxr.errors import ClusterError
from cxr.runtime import cluster, ray_private


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What each start is to meet: an error, or None; taken from the front."""
    planned: list[object] = []

    def start(**settings: object) -> None:
        met = planned.pop(0)
        if isinstance(met, Exception):
            raise met

    monkeypatch.setattr(cluster.ray_private, "show_worker_lines_with", lambda show: None)
    monkeypatch.setattr(cluster.ray_private, "keep_signal_handlers", lambda: None)
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", start)
    monkeypatch.setattr(cluster.ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    monkeypatch.setenv(cluster.HIDES_GPUS, "")
    return planned


def test_access_to_buckets_reaches_the_workers_of_a_joined_cluster(
    starts: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, object] = {}
    monkeypatch.setattr(cluster.ray, "init", settings.update)
    monkeypatch.setattr(cluster.socket, "create_connection", lambda *_, **__: io.BytesIO())
    monkeypatch.setenv("RAY_OVERRIDE_JOB_RUNTIME_ENV", "0")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    cluster.connect()
    assert settings == {"address": "auto", "runtime_env": {"env_vars": {cluster.HIDES_GPUS: "1"}}}
    monkeypatch.setenv("CXR_ANONYMOUS_BUCKETS", "*")
    monkeypatch.setenv("CXR_REQUESTER_PAYS", "1")
    cluster.connect()
    passed_on = {cluster.HIDES_GPUS: "1", "CXR_ANONYMOUS_BUCKETS": "*", "CXR_REQUESTER_PAYS": "1"}
    assert settings["runtime_env"] == {"env_vars": passed_on}


BUSY = [
    Exception("The current node timed out during startup. This could happen because ..."),
    Exception("\n2026 INFO head.py:1 -- starting\n2026 ERROR head.py:2 -- the dashboard did not answer\n"),
    ValueError("Failed to bind to 127.0.0.1:8265 because it's already occupied."),
    TimeoutError("no port file after 30 s"),
]


@pytest.mark.parametrize("error", BUSY, ids=["node", "dashboard", "port", "port file"])
def test_a_start_that_a_busy_machine_spoils_is_tried_again(
    error: Exception, starts: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    starts += [error, error, None]
    cluster.connect()
    assert not starts
    assert capsys.readouterr().out.count("trying again") == 2


def test_failed_starts_end_in_one_message_with_the_last_reason(starts: list[object]) -> None:
    starts += BUSY[:2] + BUSY[1:2]
    with pytest.raises(ClusterError, match=r"in 3 attempts, .* head.py:2 -- the dashboard did not answer\."):
        cluster.connect()
    assert not starts


def test_a_failed_start_leaves_no_process_behind(starts: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[subprocess.Popen[bytes]] = []

    def start(**settings: object) -> None:
        if not left:
            left.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
            raise BUSY[0]

    monkeypatch.setattr(cluster.ray, "init", start)
    cluster.connect()
    assert not psutil.pid_exists(left[0].pid)


def test_joining_and_leaving_machines_are_noted(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["======== Autoscaler status ========", ":event_summary:Adding 2 node(s) of type train."]
    cluster._show_worker_lines({"lines": lines, "pid": "autoscaler"})
    assert capsys.readouterr().out == "note: Adding 2 node(s) of type train.\n"


UP = """
head_node_type: head
available_node_types:
  head: {resources: {CPU: 4, GPU: 0}, max_workers: 0}
  data: {resources: {CPU: 16, GPU: 0}, max_workers: 3}
  train: {resources: {CPU: 8, GPU: 1}, max_workers: 2}
"""


def test_a_job_on_the_head_tells_which_machines_may_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: dict[str, dict[str, object]] = {}
    monkeypatch.setattr(ray_private, "report_node_types", lambda types, head: stored.update({head: types}))
    monkeypatch.setattr(cluster, "RAY_UP_CONFIG", tmp_path / "config.yaml")
    monkeypatch.setattr(cluster, "KUBERNETES_TOKEN", tmp_path / "token")
    cluster._report_node_types()
    assert not stored, "this is not the head of a cluster"
    (tmp_path / "config.yaml").write_text(UP)
    cluster._report_node_types()
    assert stored == {"head": yaml.safe_load(UP)["available_node_types"]}


def test_a_head_on_kubernetes_asks_for_the_groups_of_its_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = {"headgroup": {"resources": {"CPU": 4}, "max_workers": 0}, "train": {"resources": {"GPU": 1}}}
    stored: dict[str, dict[str, object]] = {}
    monkeypatch.setattr(ray_private, "report_node_types", lambda types, head: stored.update({head: types}))
    monkeypatch.setattr(ray_private, "kubernetes_node_types", lambda: groups)
    monkeypatch.setattr(cluster, "RAY_UP_CONFIG", tmp_path / "config.yaml")
    monkeypatch.setattr(cluster, "KUBERNETES_TOKEN", tmp_path / "token")
    (tmp_path / "token").touch()
    cluster._report_node_types()
    assert not stored, "this is not a pod of KubeRay"
    monkeypatch.setenv("RAY_CLUSTER_NAME", "cxr")
    cluster._report_node_types()
    assert stored == {"headgroup": groups}

    def forbidden() -> None:
        raise requests.HTTPError("403 Forbidden")

    monkeypatch.setattr(ray_private, "kubernetes_node_types", forbidden)
    cluster._report_node_types()
    assert "note: cannot read from Kubernetes which machines this cluster may start (403 Forbidden)" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([{}, {}], {}),
        ([{cluster.POOL: "head"}, {}], {cluster.POOL: "data"}),
    ],
)
def test_data_tasks_stay_off_other_pools_where_machines_have_one(
    labels: list[dict[str, str]], expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Labels": each} for each in labels])
    assert cluster.data_machines() == expected

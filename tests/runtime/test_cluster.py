"""Starting a private cluster on a busy machine."""

from __future__ import annotations

import io
import subprocess
import sys

import psutil
import pytest

from cxr.errors import ClusterError
from cxr.runtime import cluster


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
    assert settings == {"address": "auto", "runtime_env": {}}
    monkeypatch.setenv("CXR_ANONYMOUS_BUCKETS", "*")
    monkeypatch.setenv("CXR_REQUESTER_PAYS", "1")
    cluster.connect()
    assert settings["runtime_env"] == {"env_vars": {"CXR_ANONYMOUS_BUCKETS": "*", "CXR_REQUESTER_PAYS": "1"}}


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

"""Starting a private cluster on a busy machine."""

from __future__ import annotations

import io

import pytest

from cxr import cluster

TIMED_OUT = Exception(f"The current node {cluster.SLOW}. This could happen because ...")


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """What each start is to meet: an error, or None; taken from the front."""
    planned: list[object] = []

    def start(**settings: object) -> None:
        met = planned.pop(0)
        if isinstance(met, Exception):
            raise met

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


def test_a_start_that_takes_too_long_is_tried_again(starts: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    starts += [TIMED_OUT, TIMED_OUT, None]
    cluster.connect()
    assert not starts
    assert capsys.readouterr().out.count("trying again") == 2


def test_it_is_given_up_after_some_times(starts: list[object]) -> None:
    starts += [TIMED_OUT] * cluster.STARTS
    with pytest.raises(Exception, match=cluster.SLOW):
        cluster.connect()
    assert not starts


def test_other_errors_are_not_met_by_trying_again(starts: list[object]) -> None:
    starts += [ValueError("no such resource"), None]
    with pytest.raises(ValueError, match="resource"):
        cluster.connect()
    assert len(starts) == 1

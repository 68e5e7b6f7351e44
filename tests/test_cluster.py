"""Starting a private cluster on a busy machine."""

from __future__ import annotations

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

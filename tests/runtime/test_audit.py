"""The audit log: a start and an end of every run, also of failed ones, added to what is there."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import boto3
import pytest

from cxr import storage
from cxr.errors import UserError
from cxr.runtime import audit
from tests.servers import faulty


def run(out: str) -> None:
    with audit.recorded(out, {"job": "score", "members": [{"sha256": "ab"}]}) as result:
        result["counts"] = {"images": 3, "accuracy": float("nan")}


def fail(out: str, error: BaseException, before: Callable[[], None] = lambda: None) -> None:
    with audit.recorded(out, {}) as result:
        result["images"] = 2
        before()
        raise error


def check(entries: list[dict]) -> None:
    start, end = entries
    assert (start["event"], end["event"], end["status"]) == ("start", "end", "done")
    assert start["run"] == end["run"]
    assert start["time"] <= end["time"]
    assert start["time"].endswith("+00:00")
    assert start["user"]
    assert start["host"]
    assert {"cxr", "torch", "ray"} <= set(start["versions"])
    assert start["members"] == [{"sha256": "ab"}]
    assert end["counts"] == {"images": 3, "accuracy": None}
    assert end["seconds"] >= 0


def test_a_run_adds_a_start_and_an_end(tmp_path: Path) -> None:
    run(str(tmp_path / "out"))
    before = (tmp_path / "out" / "audit.jsonl").read_bytes()
    run(str(tmp_path / "out"))
    after = (tmp_path / "out" / "audit.jsonl").read_bytes()
    assert after.startswith(before)
    assert len(after.splitlines()) == 4
    check(audit.read(str(tmp_path / "out"))[:2])
    check(audit.read(str(tmp_path / "out"))[2:])


@pytest.mark.parametrize(
    ("error", "status"),
    [(UserError("no such archive"), "failed"), (RuntimeError("bug"), "failed"), (KeyboardInterrupt(), "interrupted")],
)
def test_the_end_of_a_run_that_fails_is_recorded(tmp_path: Path, error: BaseException, status: str) -> None:
    with pytest.raises(type(error)):
        fail(str(tmp_path), error)
    _, end = audit.read(str(tmp_path))
    assert (end["event"], end["status"], end["error_type"]) == ("end", status, type(error).__name__)
    assert end.get("error", "") == str(error)
    assert end["images"] == 2


def test_messages_of_errors_can_be_left_out(tmp_path: Path) -> None:
    with pytest.raises(UserError), audit.recorded(str(tmp_path), {}, errors=False):
        raise UserError("Zebrafish^Quentin")
    assert "Zebrafish" not in (tmp_path / "audit.jsonl").read_text()
    assert audit.read(str(tmp_path))[1]["error_type"] == "UserError"


def test_a_disk_without_room_does_not_hide_what_ended_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RuntimeError, match="the cause"):
        fail(str(tmp_path), RuntimeError("the cause"), before=lambda: monkeypatch.setattr(os, "fsync", full))
    with pytest.raises(storage.StorageError, match="disk"), audit.recorded(str(tmp_path), {}):
        pass


def test_a_user_without_a_name_is_recorded_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(audit.getpass, "getuser", unknown)
    run(str(tmp_path))
    assert audit.read(str(tmp_path))[0]["user"] == f"uid {os.getuid()}"


def test_on_an_object_store_each_entry_is_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty.moto() as backend:
        for name, value in faulty.variables(backend).items():
            monkeypatch.setenv(name, value)
        boto3.client("s3").create_bucket(Bucket="xrays")
        assert audit.read("s3://xrays/out") == []
        run("s3://xrays/out")
        first = {file.uri: storage.read_bytes(file.uri) for file in storage.list_files("s3://xrays/out/audit")}
        run("s3://xrays/out")
        assert {uri: storage.read_bytes(uri) for uri in first} == first
        assert len(first) == 2
        entries = audit.read("s3://xrays/out")
        check(entries[:2])
        check(entries[2:])
        assert all(json.loads(content)["run"] == entries[0]["run"] for content in first.values())

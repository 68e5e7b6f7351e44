"""Two runs into one folder: the second one stops, unless the first is dead."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cxr import storage
from cxr.data.ingest import ingest
from cxr.errors import UserError
from cxr.families import checkpoint
from cxr.families.align import AlignRecipe
from cxr.inference.score import score
from cxr.runtime import lease
from cxr.storage import s3
from tests.ray.archives import write_archive
from tests.servers import faulty

HOLD = """
import sys, time
from cxr.runtime import lease
lease.HEARTBEAT_S = 0.2
with lease.held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(params=["disk", "s3"])
def out(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(lease, "HEARTBEAT_S", 0.2)
    monkeypatch.setattr(lease, "STALE_S", 2.0)
    if request.param == "disk":
        yield str(tmp_path / "out")
        return
    with faulty.moto() as url:
        for name, value in faulty.variables(url).items():
            monkeypatch.setenv(name, value)
        s3.client("runs").create_bucket(Bucket="runs")
        yield "s3://runs/out"


@pytest.fixture
def other_run(out: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLD, out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def as_if_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    here = lease._this_process()
    monkeypatch.setattr(lease, "_this_process", lambda: {**here, "host": "elsewhere", "machine": "elsewhere"})


def test_a_second_run_stops_with_a_message_that_names_the_first(out: str, other_run: subprocess.Popen[str]) -> None:
    with pytest.raises(UserError, match=rf"is in use by another run \(process {other_run.pid} on "), lease.held(out):
        pass


def test_a_run_killed_on_this_machine_is_taken_over_at_once(out: str, other_run: subprocess.Popen[str]) -> None:
    other_run.kill()
    other_run.wait()
    start = time.monotonic()
    with lease.held(out):
        assert time.monotonic() - start < lease.STALE_S


def test_a_run_on_another_machine_is_watched_until_it_shows_life(
    out: str, other_run: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    as_if_elsewhere(monkeypatch)
    with pytest.raises(UserError, match="is in use by another run"), lease.held(out):
        pass


def test_a_run_that_died_on_another_machine_is_taken_over_when_it_is_stale(
    out: str, other_run: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    as_if_elsewhere(monkeypatch)
    other_run.kill()
    other_run.wait()
    with lease.held(out):
        assert "waiting up to 2 s" in capsys.readouterr().out


def test_the_lease_is_renewed_and_deleted_at_the_end(out: str) -> None:
    uri = storage.join(out, lease.LEASE_FILE)
    with lease.held(out), lease.held(out):
        first = storage.read_bytes(uri)
        deadline = time.monotonic() + 20
        while storage.read_bytes(uri) == first and time.monotonic() < deadline:
            time.sleep(0.1)
        assert storage.read_bytes(uri) != first
    assert not storage.exists(uri)


@pytest.fixture
def _interrupts() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, as in jobs; Ray, used by an earlier test of this process, may have changed
    that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_interrupts")
def test_a_run_whose_lease_was_taken_over_stops(out: str, capsys: pytest.CaptureFixture[str]) -> None:
    uri = storage.join(out, lease.LEASE_FILE)
    with pytest.raises(KeyboardInterrupt), lease.held(out):  # noqa: PT012
        storage.write_bytes(uri, json.dumps({"process": 1}).encode())
        time.sleep(20)
    assert storage.read_json(uri) == {"process": 1}
    assert "another run has taken over" in capsys.readouterr().out


def test_of_many_concurrent_jobs_only_one_writes(out: str) -> None:
    uri, written = storage.join(out, "file"), []
    at_once = storage.is_local(uri)  # the S3 server of the tests checks and writes in two steps
    for previous in (None, b"0"):
        if previous is not None:
            storage.write_bytes(uri, previous)
        begin = threading.Barrier(8 if at_once else 1)

        def write(name: str, previous: bytes | None = previous, begin: threading.Barrier = begin) -> None:
            begin.wait()
            if storage.replace_if(uri, name.encode(), previous):
                written.append(name)

        threads = [threading.Thread(target=write, args=(f"{previous} {number}",)) for number in range(8)]
        for thread in threads:
            thread.start()
            if not at_once:
                thread.join()
        for thread in threads:
            thread.join()
    assert len(written) == 2
    assert storage.read_text(uri) == written[1]


def test_a_process_that_reuses_the_pid_of_a_dead_one_is_not_the_holder() -> None:
    here = lease._this_process()
    assert here["process"] == os.getpid()
    assert lease._lives(here)
    assert not lease._lives({**here, "started": here["started"] - 100})


def test_ingest_and_scoring_stop_where_another_run_is_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cxr.runtime.cluster.check_shared", lambda uri: None)
    archive, out, kept = write_archive(tmp_path / "archive", good=4), str(tmp_path / "out"), tmp_path / "kept"
    recipe = AlignRecipe(size=32, backbone="conv3", lungs=False)
    network = recipe.network(())
    checkpoint.save(kept, recipe, recipe.task(network), network.state_dict(), findings=(), metrics={})
    with subprocess.Popen([sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for begin in (lambda: ingest(archive, out), lambda: score(archive, str(kept), out)):
            with pytest.raises(UserError, match="is in use by another run"):
                begin()
        other.kill()
    assert sorted(path.name for path in Path(out).iterdir()) == [lease.LEASE_FILE]

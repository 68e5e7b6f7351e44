"""Jobs end with the exit code that scripts trust, and leave result.json."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cxr.cli.commands import score
from cxr.runtime.job import parse

JOB = '''
"""A job for tests."""
import atexit
import sys
import time
from dataclasses import dataclass
from cxr.runtime import interrupt
from cxr.errors import ClusterError, UserError
from cxr.runtime.job import run_job

@dataclass(frozen=True)
class Options:
    out: str
    how: str = "well"

@dataclass(frozen=True)
class TrainingOptions(Options):
    resume: bool = False

def main(options):
    if options.how == "badly":
        raise UserError("given x, wanted y: do z")
    if options.how == "broken":
        raise ZeroDivisionError("oh")
    if options.how == "elsewhere":
        raise ClusterError("Ray did not start")
    if options.how == "without a node":
        from ray.exceptions import LocalRayletDiedError

        raise LocalRayletDiedError
    if options.how in ("slowly", "training", "swallowing", "stubborn"):
        try:
            print("started", flush=True)
            time.sleep(60)
        except BaseException:
            if options.how == "swallowing":
                time.sleep(60)
            if options.how == "stubborn":
                print("tidying up", flush=True)
                time.sleep(60)
            print("tidied up", flush=True)
            atexit.register(print, "at exit", flush=True)
            raise ValueError("what an interrupted library may raise")
    return {"metrics": {"answer": 42, "unknown": float("nan")}}

interrupt.GRACE_S = 0.5 if "swallowing" in sys.argv else 30
run_job(main, TrainingOptions if "training" in sys.argv else Options)
'''


@pytest.fixture
def job(tmp_path: Path) -> list[str]:
    script = tmp_path / "some_job.py"
    script.write_text(JOB)
    return [sys.executable, str(script), "--out", str(tmp_path / "out"), "--how"]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_a_successful_job_writes_and_prints_its_result(job: list[str], tmp_path: Path) -> None:
    done = run([*job, "well"])
    path = tmp_path / "out" / "result.json"
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, str(path))
    result = json.loads(path.read_text())
    assert result["job"] == "some_job"
    assert result["metrics"] == {"answer": 42, "unknown": None}
    assert result["settings"] == {"out": str(tmp_path / "out"), "how": "well"}
    assert {"cxr", "python", "ray", "torch"} <= set(result["versions"])


def test_a_mistake_is_reported_without_a_traceback(job: list[str], tmp_path: Path) -> None:
    done = run([*job, "badly"])
    assert (done.returncode, done.stderr) == (2, "error: given x, wanted y: do z\n")
    assert not (tmp_path / "out").exists()


def test_a_failure_shows_its_traceback(job: list[str]) -> None:
    done = run([*job, "broken"])
    assert done.returncode == 1
    assert "ZeroDivisionError: oh" in done.stderr


def test_a_wrong_option_exits_with_2(job: list[str]) -> None:
    assert run([*job, "well", "--nonsense", "1"]).returncode == 2


def test_an_option_that_takes_one_value_is_given_once(job: list[str], tmp_path: Path) -> None:
    for again in (["--how", "badly"], ["--how=well"]):
        done = run([*job, "well", *again])
        assert (done.returncode, done.stderr) == (2, "error: expected one --how, got 2: use it once\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        ([], {}),
        (["--anonymous"], {"CXR_ANONYMOUS_BUCKETS": "*"}),
        (["--anonymous", "a", "s3://b/c/d"], {"CXR_ANONYMOUS_BUCKETS": "a,b"}),
        (["--requester-pays"], {"CXR_REQUESTER_PAYS": "1"}),
    ],
)
def test_every_job_has_options_for_access_to_buckets(
    arguments: list[str], variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("CXR_ANONYMOUS_BUCKETS", "CXR_REQUESTER_PAYS")
    for name in names:
        monkeypatch.setenv(name, "before")  # so that it is put back
        del os.environ[name]
    parse(score.Options, ["--out", "x", *arguments]).buckets.apply()
    assert {name: os.environ[name] for name in names if name in os.environ} == variables


def test_a_failure_of_the_cluster_is_reported_without_a_traceback(job: list[str]) -> None:
    done = run([*job, "elsewhere"])
    assert (done.returncode, done.stderr) == (1, "error: Ray did not start\n")
    done = run([*job, "without a node"])
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("error: Ray's node process on this machine died")
    assert done.stderr.endswith("Finished work is saved; run the same command again to continue\n")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("how", ["slowly", "training", "swallowing"])
def test_an_interrupted_job_says_how_to_continue(job: list[str], how: str, number: signal.Signals, code: int) -> None:
    process = subprocess.Popen([*job, how], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    os.kill(process.pid, number)
    out, errors = process.communicate(timeout=30)
    assert process.returncode == code
    hint = ", with --resume if training had started" if how == "training" else ""
    assert errors == f"interrupted; run the same command again to continue{hint}\n"
    assert out == ("" if how == "swallowing" else "tidied up\nat exit\n")


def test_a_second_signal_ends_a_job_at_once(job: list[str]) -> None:
    process = subprocess.Popen([*job, "stubborn"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "started\n"
    process.terminate()
    assert process.stdout.readline() == "tidying up\n"
    start = time.monotonic()
    process.terminate()
    assert process.wait(timeout=30) == 143
    assert time.monotonic() - start < 5


def test_a_second_job_in_a_folder_exits_with_2_and_the_first_continues(job: list[str]) -> None:
    with subprocess.Popen([*job, "slowly"], stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "started\n"
        second = run([*job, "well"])
        assert second.returncode == 2
        assert f"is in use by another run (process {first.pid} on " in second.stderr
        assert first.poll() is None
        first.send_signal(signal.SIGKILL)
    assert run([*job, "well"]).returncode == 0

"""The local head: listens on loopback, wants its token, leaves no process and no file behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "cluster" / "local_head.py"

pytestmark = [pytest.mark.slow, pytest.mark.ray]


@pytest.fixture
def head() -> Iterator[tuple[subprocess.Popen[str], dict[str, str]]]:
    """A running head and the variables that it printed."""
    with subprocess.Popen([sys.executable, SCRIPT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        variables = {}
        for line in process.stdout:
            if line.startswith("#"):
                break
            name, _, value = line.removeprefix("export ").strip().partition("=")
            variables[name] = value
        yield process, variables
        process.terminate()


def status_without_token(address: str) -> int:
    try:
        return urllib.request.urlopen(f"{address}/api/jobs/").status
    except urllib.error.HTTPError as refusal:
        return refusal.code


def submit(variables: dict[str, str], *arguments: str) -> None:
    """`ray job submit` to the head; fails with its output."""
    command = ["ray", "job", "submit", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_the_head_is_private_and_stops_when_interrupted_during_a_job(head, tmp_path: Path) -> None:
    process, variables = head
    token = Path(variables["RAY_AUTH_TOKEN_PATH"])
    assert token.stat().st_mode & 0o077 == 0
    assert status_without_token(variables["RAY_API_SERVER_ADDRESS"]) == 401

    started = tmp_path / "started"
    work = f"import pathlib, time; pathlib.Path('{started}').touch(); time.sleep(600)"
    submit(variables, "--no-wait", "--", "python", "-c", work)
    deadline = time.monotonic() + 60
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    assert started.exists()

    family = psutil.Process(process.pid).children(recursive=True)
    assert any("time.sleep(600)" in " ".join(p.cmdline()) for p in running(family))
    listening = {c.laddr.ip for p in running(family) for c in p.net_connections() if c.status == "LISTEN"}
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert not running(family)
    assert not token.parent.exists()


def test_cxr_submit_shows_the_output_and_exits_as_the_job_does(head, tmp_path: Path) -> None:
    _, variables = head
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):  # the token's file is enough
        del variables[name]
    for how in ([], ["--working-dir", "."]):
        command = ["cxr", "submit", *how, "--", "phantom", "--count", "1", "--size", "64", "--out"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")} | variables
        run = {"cwd": REPOSITORY, "env": environment, "capture_output": True, "text": True}
        done = subprocess.run([*command, str(tmp_path / f"out{len(how)}")], **run)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == str(tmp_path / f"out{len(how)}" / "result.json")
        failed = subprocess.run([*command, "/proc/nowhere"], **run)
        assert failed.returncode == 2, failed.stdout + failed.stderr
        assert "Traceback" not in failed.stdout + failed.stderr


def test_a_submitted_command_and_its_script_do_the_same(head, tmp_path: Path) -> None:
    _, variables = head
    results = []
    for how, program in (([], ["cxr", "phantom"]), (["--working-dir", "."], ["python", "jobs/make_phantom.py"])):
        out = tmp_path / program[0]
        submit(variables, *how, "--", *program, "--count", "1", "--size", "64", "--out", str(out))
        results.append(json.loads((out / "result.json").read_text()))
    assert [(result["job"], result["images"]) for result in results] == [("phantom", 1), ("phantom", 1)]

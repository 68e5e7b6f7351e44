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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "cluster" / "local_head.py"
PATIENCE_S = 300  # for anything on a busy machine

pytestmark = [pytest.mark.slow, pytest.mark.ray]
Head = tuple[subprocess.Popen[str], dict[str, str]]


@contextmanager
def started_head() -> Iterator[Head]:
    """A running head and the variables that it printed."""
    with subprocess.Popen([sys.executable, SCRIPT], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        variables = {}
        for line in process.stdout:  # which ends if the head does not start
            if line.startswith("#"):
                break
            name, _, value = line.removeprefix("export ").strip().partition("=")
            variables[name] = value
        try:
            assert variables, f"the head did not start and exited with {process.wait()}"
            yield process, variables
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def variables() -> Iterator[dict[str, str]]:
    """The variables for clients of a head."""
    with started_head() as (_, variables):
        yield variables


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=2 * PATIENCE_S
    )


def ray_submit(variables: dict[str, str], *arguments: str) -> None:
    """`ray job submit` to the head; fails with its output."""
    done = run(["ray", "job", "submit", *arguments], os.environ | variables)
    assert done.returncode == 0, done.stdout + done.stderr


def wait_for(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S} s"
        time.sleep(0.2)


def status_without_token(address: str) -> int:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        return direct.open(f"{address}/api/jobs/", timeout=PATIENCE_S).status
    except urllib.error.HTTPError as refusal:
        return refusal.code


def running(processes: list[psutil.Process]) -> list[psutil.Process]:
    alive = []
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            alive += [process] if process.status() != psutil.STATUS_ZOMBIE else []
    return alive


def seen(process: psutil.Process) -> tuple[str, set[str]]:
    """The command line of a process and the addresses at which it listens; nothing if it has just ended."""
    with suppress(psutil.NoSuchProcess):
        listening = {c.laddr.ip for c in process.net_connections() if c.status == "LISTEN"}
        return " ".join(process.cmdline()), listening
    return "", set()


def test_the_head_is_private_and_stops_when_interrupted_during_a_job(tmp_path: Path) -> None:
    with started_head() as (process, variables):
        token = Path(variables["RAY_AUTH_TOKEN_PATH"])
        assert token.stat().st_mode & 0o077 == 0
        assert status_without_token(variables["RAY_API_SERVER_ADDRESS"]) == 401

        started = tmp_path / "started"
        work = f"import pathlib, time; pathlib.Path('{started}').touch(); time.sleep(6000)"
        ray_submit(variables, "--no-wait", "--", "python", "-c", work)
        wait_for(started.exists, "the job has started")

        family = psutil.Process(process.pid).children(recursive=True)
        commands, listening = zip(*map(seen, family), strict=True)
        assert any("time.sleep(6000)" in command for command in commands)
        assert set[str]().union(*listening) <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}

        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 0
        wait_for(lambda: not running(family), "no process is left")
        assert not token.parent.exists()


def test_cxr_submit_shows_the_output_and_exits_as_the_job_does(variables: dict[str, str], tmp_path: Path) -> None:
    # The token's file is enough.
    environment = {k: v for k, v in (os.environ | variables).items() if k not in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    for how in ([], ["--working-dir", "."]):
        command = ["cxr", "submit", *how, "--", "phantom", "--count", "1", "--size", "64", "--out"]
        done = run([*command, str(tmp_path / f"out{len(how)}")], environment)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[-1] == str(tmp_path / f"out{len(how)}" / "result.json")
        failed = run([*command, "/proc/nowhere"], environment)
        assert failed.returncode == 2, failed.stdout + failed.stderr
        assert "Traceback" not in failed.stdout + failed.stderr


def test_a_submitted_command_and_its_script_do_the_same(variables: dict[str, str], tmp_path: Path) -> None:
    results = []
    for how, program in (([], ["cxr", "phantom"]), (["--working-dir", "."], ["python", "jobs/make_phantom.py"])):
        out = tmp_path / program[0]
        ray_submit(variables, *how, "--", *program, "--count", "1", "--size", "64", "--out", str(out))
        results.append(json.loads((out / "result.json").read_text()))
    assert [(result["job"], result["images"]) for result in results] == [("phantom", 1), ("phantom", 1)]

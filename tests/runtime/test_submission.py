"""Following a job whose connections drop, against a server that stands in for a cluster's dashboard."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from cxr.cli.commands import COMMANDS
from cxr.errors import ClusterError, UserError
from cxr.runtime import submission
from cxr.runtime.submission import Follower, connect, exit_code

JOB = "train-align-1a2b3c"
LINES = [f"epoch {number}: loss .{number}\n" for number in range(40)]
RAYS = (
    "2026-01-01 10:00:00,123\tINFO job_manager.py:568 -- Runtime env is setting up.\n"
    f"Running entrypoint for job {JOB}: cxr train align\n"
)


@dataclass
class Dashboard:
    """What the server does. Each connection that follows the log sends it from its beginning, up to `drops_after`."""

    drops_after: list[int] = field(default_factory=list)
    """Lines that successive connections send before they drop; later ones send all."""
    status: str = "SUCCEEDED"
    code: int | None = 0
    token: str = ""
    unavailable: int = 0
    """Requests about the job that fail before the server recovers."""
    submitted: list[dict[str, object]] = field(default_factory=list)
    address: str = ""
    _connections: int = 0

    async def version(self, request: web.Request) -> web.Response:
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401, text="no token")
        return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""})

    async def submit(self, request: web.Request) -> web.Response:
        self.submitted.append(await request.json())
        return web.json_response({"job_id": JOB, "submission_id": self.submitted[-1]["submission_id"]})

    async def info(self, request: web.Request) -> web.Response:
        if request.match_info["job"] == "unknown":
            return web.Response(status=404, text="Job unknown does not exist")
        if self.unavailable:
            self.unavailable -= 1
            return web.Response(status=500, text="the agent is gone")
        running = len(self.drops_after) > self._connections
        about = {"type": "SUBMISSION", "submission_id": JOB, "entrypoint": "cxr", "message": "it ended"}
        status = {"status": "RUNNING"} if running else {"status": self.status, "driver_exit_code": self.code}
        return web.json_response(about | status)

    async def logs(self, request: web.Request) -> web.Response:
        return web.json_response({"logs": RAYS + "".join(LINES)})

    async def tail(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        self._connections += 1
        early = len(self.drops_after) >= self._connections
        lines = [RAYS, *LINES[: self.drops_after[self._connections - 1] if early else None]]
        for start in range(0, len(lines), 10):
            await socket.send_str("".join(lines[start : start + 10]))
        if early:
            assert request.transport
            request.transport.abort()
        else:
            await socket.close()
        return socket


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[Dashboard]:
    for name in [name for name in os.environ if name.startswith("RAY_A")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(submission, "_PAUSES_S", (0.01,))
    served, loop, stop = Dashboard(), asyncio.new_event_loop(), asyncio.Event()

    async def serve() -> None:
        app = web.Application()
        app.router.add_get("/api/version", served.version)
        app.router.add_post("/api/jobs/", served.submit)
        app.router.add_get("/api/jobs/{job}", served.info)
        app.router.add_get("/api/jobs/{job}/logs", served.logs)
        app.router.add_get("/api/jobs/{job}/logs/tail", served.tail)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0]
        served.address = f"http://{host}:{port}"
        started.set()
        await stop.wait()
        await runner.cleanup()

    started = threading.Event()
    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert started.wait(10)
    yield served
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)


def followed(dashboard: Dashboard, job: str = JOB, patience_s: float = 600) -> tuple[str, int]:
    """The text that following a job writes, and the exit code of the job."""
    pieces: list[str] = []
    info = Follower(connect(dashboard.address), job, pieces.append, patience_s).follow()
    return "".join(pieces), exit_code(info)


def test_each_line_is_written_once_although_connections_drop(dashboard: Dashboard) -> None:
    dashboard.drops_after = [12, 0, 5, 31, 31]
    dashboard.unavailable = 3
    assert followed(dashboard) == ("".join(LINES), 0)
    assert dashboard._connections > len(dashboard.drops_after)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 2, 2), ("FAILED", None, 1), ("STOPPED", None, 143), ("STOPPED", -15, 143)],
)
def test_the_exit_code_is_that_of_the_job(dashboard: Dashboard, status: str, code: int | None, expected: int) -> None:
    dashboard.status, dashboard.code = status, code
    assert followed(dashboard) == ("".join(LINES), expected)


def test_a_cluster_that_stays_away_is_given_up_after_a_while(dashboard: Dashboard, capsys) -> None:
    dashboard.unavailable = 10**6
    with pytest.raises(ClusterError, match=r"has not answered for 0\.2 s"):
        followed(dashboard, patience_s=0.2)
    assert capsys.readouterr().out.count("the connection to the cluster is lost") == 1


def test_a_job_that_the_cluster_does_not_know_is_an_error(dashboard: Dashboard) -> None:
    with pytest.raises(UserError, match="does not know the job unknown"):
        followed(dashboard, "unknown")


def test_a_cluster_that_does_not_answer_is_an_error(dashboard: Dashboard) -> None:
    with pytest.raises(UserError, match=r"no Ray cluster answers at http://127\.0\.0\.1:1: start one"):
        connect("http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"expected the address of a dashboard, .* got 127\.0\.0\.1:8265"):
        connect("127.0.0.1:8265")


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        COMMANDS["submit"].run(arguments, "cxr submit")
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_a_command_is_submitted_and_followed(dashboard: Dashboard, capsys, tmp_path) -> None:
    dashboard.code, dashboard.status = 2, "FAILED"
    environment = tmp_path / "environment.yaml"
    environment.write_text("env_vars: {A: from the file, B: b}")
    words = ["train", "align", "--archive", "/x rays", "--archive", "/more", "--out", "/o"]
    options = ["--address", dashboard.address, "--runtime-env", str(environment), "--env", "A=a=1"]
    assert run(*options, "--", *words) == 2
    (sent,) = dashboard.submitted
    assert sent["entrypoint"] == "cxr train align --archive '/x rays' --archive /more --out /o"
    assert sent["runtime_env"] == {"env_vars": {"A": "a=1", "B": "b"}}
    name = str(sent["submission_id"])
    assert name.startswith("train-align-")
    printed = capsys.readouterr().out
    assert printed.startswith(f"submitted {name}\nto show its output: cxr submit --follow {name}\nto stop it: ")
    assert printed.endswith("".join(LINES))


def test_no_wait_returns_at_once(dashboard: Dashboard, capsys) -> None:
    assert run("--address", dashboard.address, "--no-wait", "--json", "--", "score") == 0
    assert capsys.readouterr().out == f'{{"job": "{dashboard.submitted[0]["submission_id"]}"}}\n'
    assert dashboard._connections == 0


def test_ctrl_c_leaves_the_job_and_says_how_to_stop_it(dashboard: Dashboard, capsys, monkeypatch) -> None:
    def interrupted(self: Follower) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Follower, "follow", interrupted)
    assert run("--address", dashboard.address, "--follow", JOB) == 130
    errors = capsys.readouterr().err
    assert f"{JOB} continues on the cluster\n" in errors
    assert f"cxr submit --stop {JOB}\n" in errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "expected a command after --, such as"),
        (("--", "trian", "align"), "expected a command: "),
        (("--stop", "a", "--follow", "b"), "expected a command after --, --follow or --stop, got several"),
        (("--env", "A", "--", "score"), "expected NAME=VALUE after --env, got 'A'"),
        (("--runtime-env", "/none.yaml", "--", "score"), "expected a YAML file at --runtime-env /none.yaml"),
    ],
)
def test_mistakes_are_reported_before_anything_is_sent(
    arguments: tuple[str, ...], message: str, dashboard: Dashboard, capsys
) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err
    assert dashboard.submitted == []


WITH_TOKEN = "from cxr.runtime.submission import connect; import sys; connect(sys.argv[1])"


@pytest.mark.slow
def test_the_token_is_presented_without_further_settings(dashboard: Dashboard, tmp_path) -> None:
    """In a process of its own, since Ray reads its settings when it is imported."""
    dashboard.token = "a" * 64
    command = [sys.executable, "-c", WITH_TOKEN, dashboard.address]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert "did not accept the connection" in refused.stderr
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(dashboard.token)
    assert subprocess.run(command, capture_output=True, text=True, timeout=60).returncode == 0

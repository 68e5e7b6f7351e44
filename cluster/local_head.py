"""Run a Ray head on this machine that only you can reach and use.

    python cluster/local_head.py

It runs until Ctrl-C or SIGTERM, and prints the `export` lines with which `cxr submit` finds it. The head listens on
loopback only, requires a token that only this user can read, and sends no usage statistics.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import psutil

from cxr.runtime.socket_paths import shorten_temporary_folders

LOOPBACK = "127.0.0.1"
STARTS = 3  # attempts: on a busy machine, Ray exceeds its own limit of 30 s, which cannot be changed
PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "ray-client-server-port")


@contextlib.contextmanager
def local_head(log: Path) -> Iterator[dict[str, str]]:
    """Start a head, yield the environment variables for its clients, and stop it with all processes that it started.

    Raises:
        RuntimeError: it exited, or was not ready within two minutes, several times; the message ends with its output.
    """
    shorten_temporary_folders(before_removal=lambda: None)
    for attempt in range(1, STARTS + 1):
        # A short folder: Ray's socket paths end at 107 bytes.
        with tempfile.TemporaryDirectory(prefix="cxr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
            ports = dict(zip(PORTS, _free_ports(len(PORTS)), strict=True))
            variables = _variables(Path(folder), ports["dashboard-port"])
            command = [sys.executable, "-m", "ray.scripts.scripts", "start"]
            command += ["--head", "--block", f"--temp-dir={folder}/ray"]
            command += [f"--{name}={port}" for name, port in ports.items()]
            with log.open("wb") as output, _started(command, variables, output) as head:
                if _is_ready(variables, head, log):
                    yield variables
                    return
        if attempt == STARTS:
            raise RuntimeError(f"the Ray head did not start:\n{log.read_text(errors='replace')[-3000:]}")


@contextlib.contextmanager
def _started(
    command: Sequence[str], variables: dict[str, str], output: IO[bytes]
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in its own process group: Ctrl-C reaches only this process, which then stops the other in order."""
    # Jobs find this interpreter as `python`, even if its environment is not activated.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | variables | {"PATH": path}
    environment.pop("RAY_ADDRESS", None)  # another cluster's
    process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, process_group=0)
    try:
        yield process
    finally:
        _stop(process)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in sockets]


def _variables(folder: Path, dashboard: int) -> dict[str, str]:
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return {
        "RAY_API_SERVER_ADDRESS": f"http://{LOOPBACK}:{dashboard}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "",  # would take precedence over the file
        "RAY_AUTH_TOKEN_PATH": str(token),
        # Unset, Ray on Linux replaces 127.0.0.1 by the machine's address and listens on the whole network.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "no_proxy": ",".join(filter(None, (LOOPBACK, os.environ.get("no_proxy")))),
    }


def _is_ready(variables: dict[str, str], head: subprocess.Popen[bytes], log: Path) -> bool:
    """Wait until the head has started and its dashboard answers; False if it exits or takes more than two minutes."""
    token = Path(variables["RAY_AUTH_TOKEN_PATH"]).read_text()
    jobs = variables["RAY_API_SERVER_ADDRESS"] + "/api/jobs/"
    request = urllib.request.Request(jobs, headers={"Authorization": f"Bearer {token}"})
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and head.poll() is None:
        if b"Ray runtime started" in log.read_bytes():  # the dashboard may answer before the rest has started
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                direct.open(request, timeout=10).close()
                return True
        time.sleep(0.3)
    return False


def _stop(head: subprocess.Popen[bytes], patience_s: float = 5) -> None:
    """Stop the head and its child processes by process id: `ray stop` would stop every cluster of this user."""
    interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not interrupt this
    family: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        family = psutil.Process(head.pid).children(recursive=True)
    head.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        head.wait(patience_s)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    head.kill()
    head.wait()
    psutil.wait_procs(family, timeout=patience_s)
    signal.signal(signal.SIGINT, interrupt)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    log = Path(tempfile.gettempdir(), f"cxr-head-{os.getpid()}.log")
    with contextlib.suppress(KeyboardInterrupt), local_head(log) as variables:
        for name, value in variables.items():
            print(f"export {name}={value}")
        print(f"# The Ray head runs until `kill {os.getpid()}` or Ctrl-C here.", flush=True)
        signal.pause()
    log.unlink()


if __name__ == "__main__":
    main()

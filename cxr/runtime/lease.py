"""One run at a time per folder: a lease that is renewed while the run lives, and taken over when it is dead.

Parts of work have deterministic names, so two runs in one folder would not damage results. But they would do all work
twice, and two training runs would write to the same log.
"""

from __future__ import annotations

import json
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from cxr import storage
from cxr.errors import UserError
from cxr.runtime import console

LEASE_FILE = "lease.json"
HEARTBEAT_S = 10.0  # seconds between renewals
STALE_S = 60.0  # seconds without a renewal after which a run on another machine counts as dead
_HELD: set[str] = set()  # folders whose lease this process has


@contextmanager
def held(folder: str) -> Iterator[None]:
    """Keep other runs out of a folder, any URI, while the block runs. Nested blocks have no effect.

    A killed run on this machine is recognized immediately. For a run on another machine it takes STALE_S seconds
    by this machine's clock. If the storage has neither file locks nor conditional writes, two runs that start at the
    same moment can both get the folder: see `storage.replace_if`.

    Raises:
        UserError: another run is alive there.
    """
    folder = storage.normalize(folder)
    if folder in _HELD:
        yield
        return
    lease = _Lease(storage.join(folder, LEASE_FILE), folder)
    lease.take()
    _HELD.add(folder)
    try:
        yield
    finally:
        _HELD.discard(folder)
        lease.release()


class _Lease:
    def __init__(self, uri: str, folder: str) -> None:
        self._uri, self._folder = uri, folder
        self._made_folder = storage.is_local(folder) and not Path(folder).exists()
        self._about = {
            "token": secrets.token_hex(8),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
            **_this_process(),
        }
        self._content = b""
        self._released = threading.Event()
        self._heartbeat = threading.Thread(target=self._renew, name="lease", daemon=True)

    def take(self) -> None:
        if not self._write(self._left_by_dead()):
            raise self._in_use(_read(self._uri))
        self._heartbeat.start()

    def release(self) -> None:
        self._released.set()
        self._heartbeat.join(timeout=HEARTBEAT_S)
        if _read(self._uri) == self._content:
            storage.delete(self._uri)
        if self._made_folder:
            with suppress(OSError):  # the folder contains results
                Path(self._folder).rmdir()

    def _write(self, previous: bytes | None) -> bool:
        content = json.dumps({**self._about, "renewed": time.time()}).encode()
        written = storage.replace_if(self._uri, content, previous)
        if written:
            self._content = content
        return written

    def _renew(self) -> None:
        while not self._released.wait(HEARTBEAT_S):
            with suppress(storage.StorageError):  # the storage may recover before the lease is stale
                if not self._write(self._content) and not self._write(None):  # None: somebody deleted the file
                    console.note(f"another run has taken over {self._folder}; this run stops")
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return

    def _left_by_dead(self) -> bytes | None:
        """The lease that a dead run left; None: there is no lease."""
        left = _read(self._uri)
        if left is None:
            return None
        holder = _parsed(left)
        if holder.get("machine") == self._about["machine"]:
            if _lives(holder):
                raise self._in_use(left)
            return left
        console.note(
            f"{self._folder} was in use by another run ({_described(holder)}); waiting up to {STALE_S:g} s to see "
            f"whether it is still alive"
        )
        deadline = time.monotonic() + STALE_S
        while time.monotonic() < deadline:
            time.sleep(min(1.0, STALE_S / 10))
            now = _read(self._uri)
            if now is None:  # it has ended
                return None
            if now != left:
                raise self._in_use(now)
        return left

    def _in_use(self, content: bytes | None) -> UserError:
        return UserError(
            f"{self._folder} is in use by another run ({_described(_parsed(content or b'{}'))}): wait until it has "
            f"ended, stop it, or use another --out"
        )


def _read(uri: str) -> bytes | None:
    try:
        return storage.read_bytes(uri)
    except storage.NotFoundError:
        return None


def _parsed(content: bytes) -> dict[str, Any]:
    with suppress(ValueError):
        lease = json.loads(content)
        if isinstance(lease, dict):
            return lease
    return {}


def _this_process() -> dict[str, Any]:
    """The identity of this process, on this machine and across machines.

    Process ids are unique only within one boot of a machine and, in containers, one namespace.
    """
    places = [socket.gethostname()]
    with suppress(OSError):
        places += [
            Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    process = psutil.Process()
    return {
        "host": places[0],
        "machine": " ".join(places),
        "process": process.pid,
        "started": process.create_time(),
    }


def _lives(lease: dict[str, Any]) -> bool:
    """Whether a process of this machine is still running, and is not a new process with the same id."""
    try:
        process = psutil.Process(lease.get("process", 0))
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - lease.get("started", 0)) < 1
    except psutil.Error:
        return False


def _described(lease: dict[str, Any]) -> str:
    return f"process {lease.get('process', '?')} on {lease.get('host', '?')}, since {lease.get('since', '?')}"

"""The audit log of scoring: who scored what with which checkpoint, when, and the hashes of what was written.

Each run adds two entries, one JSON object each: when it starts, and when it ends, also if it fails or is interrupted.
A start without an end belongs to a run that was killed. Entries are only added: on a local disk as lines of
OUT/audit.jsonl, on object stores, which cannot append, as objects OUT/audit/TIME-RUN-EVENT.json, so that a bucket may
forbid changing or deleting them.
"""

from __future__ import annotations

import getpass
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cxr import storage
from cxr.runtime import provenance
from cxr.runtime.console import finite

FILE, FOLDER = "audit.jsonl", "audit"


@contextmanager
def recorded(out: str, about: Mapping[str, Any], *, errors: bool = True) -> Iterator[dict[str, Any]]:
    """Add an entry now and one when the block ends. The block adds what it produced to the dictionary it gets.

    Args:
        out: URI of the results.
        about: what is done: options, checkpoints.
        errors: include messages of errors, which may contain paths. Otherwise only the kind of an error is recorded.
    """
    run = secrets.token_hex(8)
    start = time.monotonic()
    _append(out, {"event": "start", "run": run, **_who(), **about})
    result: dict[str, Any] = {}
    outcome: dict[str, Any] = {"status": "done"}
    try:
        yield result
    except BaseException as error:
        interrupted = isinstance(error, (KeyboardInterrupt, SystemExit))
        outcome = {"status": "interrupted" if interrupted else "failed", "error_type": type(error).__name__}
        if errors and str(error):
            outcome["error"] = str(error)
        with suppress(storage.StorageError):  # what ended the run may also keep its end from being written
            _append(out, {"event": "end", "run": run, **_taken(start), **outcome, **result})
        raise
    _append(out, {"event": "end", "run": run, **_taken(start), **outcome, **result})


def read(out: str) -> list[dict[str, Any]]:
    """All entries, in the order in which they were added."""
    if storage.is_local(out):
        path = Path(storage.normalize(out), FILE)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    folder = storage.join(out, FOLDER)
    if not storage.exists(folder):
        return []
    return [storage.read_json(uri) for uri in sorted(file.uri for file in storage.list_files(folder))]


def _who() -> dict[str, Any]:
    return {
        "user": _user(),
        "host": socket.gethostname(),
        "versions": provenance.versions(),
        "commit": provenance.commit(),
    }


def _user() -> str:
    """The user of the operating system; in containers, a user id may have no name."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def _taken(start: float) -> dict[str, Any]:
    return {"seconds": round(time.monotonic() - start, 1)}


def _append(out: str, entry: Mapping[str, Any]) -> None:
    now = datetime.now(UTC)
    line = json.dumps(finite({"time": now.isoformat(timespec="milliseconds"), **entry}), default=str)
    if not storage.is_local(out):
        name = f"{now:%Y%m%dT%H%M%S.%f}Z-{entry['run']}-{entry['event']}.json"
        storage.write_text(storage.join(out, FOLDER, name), f"{line}\n")
        return
    path = Path(storage.normalize(out), FILE)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as stream:  # one write of one line, which the system appends as a whole
            stream.write(f"{line}\n")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as error:
        raise storage.storage_error(str(path), error) from error

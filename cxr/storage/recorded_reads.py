"""Which files a result was made from, and whether they have changed since."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from cxr.storage.listing import list_files
from cxr.storage.uri import NotFoundError, UnreadableError, normalize, split_member

_FOLDER = "folder"

_recorded: ContextVar[set[str] | None] = ContextVar("reads", default=None)


@contextmanager
def recorded_reads() -> Iterator[set[str]]:
    """The URIs of files that this thread reads as a whole within the block, or whose existence it checks."""
    uris: set[str] = set()
    token = _recorded.set(uris)
    try:
        yield uris
    finally:
        _recorded.reset(token)


def record_read(uri: str) -> None:
    if (uris := _recorded.get()) is not None:
        uris.add(normalize(uri))


def current_versions(uris: Iterable[str]) -> dict[str, str | None]:
    """The version of each file, by URI; None if it cannot be read. A member of a container has that of the container.

    Raises:
        StorageError: storage does not respond.
    """
    return {uri: _version(uri) for uri in sorted(uris)}


def _version(uri: str) -> str | None:
    member = split_member(uri)
    uri = member[0] if member else uri
    try:
        entry = next(list_files(uri), None)
    except (NotFoundError, UnreadableError):
        return None
    return f"{entry.size} {entry.version}" if entry and entry.uri == uri else _FOLDER

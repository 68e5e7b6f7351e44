"""Members of ZIP and TAR files as files: list and read them without unpacking the container."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from pyarrow import fs

from cxr.storage.errors import storage_error
from cxr.storage.filesystems import file_info
from cxr.storage.ranges import ByteStream, local_version
from cxr.storage.retries import retried
from cxr.storage.tar_container import read_tar
from cxr.storage.uri import check_utf8, is_container, join, local_uri, name, normalize, reject_damaged, split_member
from cxr.storage.zip_container import read_zip

_CACHED = 16  # containers whose index a process keeps


@dataclass(frozen=True)
class FileEntry:
    """A listed file: its URI, its `path` relative to the listed folder, its size in bytes.

    `version` changes when the file is replaced: the time of its last change on local disks and Google Cloud Storage,
    its ETag on S3, its checksum in a ZIP file, and its modification time in a TAR file. Empty: unknown.
    """

    uri: str
    path: str
    size: int
    version: str = ""


class Container(Protocol):
    """The index of a container, and access to its members."""

    @property
    def members(self) -> dict[str, Any]: ...
    @property
    def skipped(self) -> Counter[str]: ...
    @property
    def damage(self) -> str | None: ...
    def open(self, name: str) -> AbstractContextManager[tuple[ByteStream, int]]: ...


def archive_root(uri: str) -> str:
    """The folder that contains an archive's files: for a container, its members or the only folder at their top.

    Other URIs are returned in their normal form. Packing a folder usually gives such a container.

    Raises:
        StorageError: the path is not valid UTF-8, or the container cannot be read.
    """
    uri = normalize(uri)
    check_utf8(uri)
    if is_container(uri) and not split_member(uri):
        if retried(uri, lambda: file_info(uri)).type != fs.FileType.File:
            return uri
        uri += "!"
    address = split_member(uri)
    if not address or address[1]:
        return uri
    visible = [path for path in _index(address[0]).members if not path.startswith((".", "__MACOSX/"))]
    first = {path.partition("/")[0] if "/" in path else "" for path in visible}
    folder = first.pop() if len(first) == 1 else ""
    return join(uri, folder) if folder else uri


def list_members(uri: str, special: Counter[str]) -> Iterator[FileEntry]:
    """Every member below `CONTAINER!/FOLDER`, or the member at that URI.

    `special` counts links, devices and members with unsafe or repeated names, which are skipped. If the container is
    damaged after some members, the last entry is `CONTAINER!`, which fails when it is read.

    Raises:
        NotFoundError: there is no such container, folder or member.
        UnreadableError: the container is damaged.
    """
    uri = normalize(uri)
    address, member = _split(uri)
    container = _index(address)
    special.update(container.skipped)
    if member in container.members:
        entry = container.members[member]
        yield FileEntry(_member_uri(address, member), name(uri), entry.size, entry.version)
        return
    prefix, exists = f"{member}/" if member else "", False
    for path, entry in container.members.items():
        if path.startswith(prefix):
            exists = True
            yield FileEntry(_member_uri(address, path), path.removeprefix(prefix), entry.size, entry.version)
    if not exists and member:
        raise storage_error(uri, FileNotFoundError(uri))
    if container.damage:
        yield FileEntry(local_uri(f"{address}!"), f"{name(address)}!", 0)


def member_exists(uri: str) -> bool:
    """Whether `CONTAINER!/MEMBER` is a member, or a folder of members."""
    address, member = _split(normalize(uri))
    if not member:
        return retried(address, lambda: file_info(address)).type == fs.FileType.File
    members = _index(address).members
    return member in members or any(path.startswith(f"{member}/") for path in members)


@contextmanager
def open_member(uri: str) -> Iterator[tuple[ByteStream, int]]:
    """A stream of the member's content for one sequential read, and its size in bytes.

    Raises:
        FileNotFoundError: there is no such member.
        UnreadableError: it cannot be read.
    """
    address, member = _split(normalize(uri))
    container = _index(address)
    if not member:
        reject_damaged(uri, container.damage or "it is a container, not a file")
    if member not in container.members:
        raise FileNotFoundError(uri)
    if problem := container.members[member].problem:
        reject_damaged(normalize(uri), problem)
    with container.open(member) as (stream, size):
        yield stream, size


def _split(uri: str) -> tuple[str, str]:
    address = split_member(uri)
    assert address, f"{uri} is not in a container"
    return address


def _member_uri(container: str, member: str) -> str:
    return local_uri(f"{container}!/{member}")


# ---- Indexes, which each process keeps for the containers that it used last


Version = tuple[int, int] | None


@dataclass
class _Slot:
    """A cached index, with the version of its file; `lock` is held while it is read."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    current: tuple[Version, Container] | None = None


_slots: OrderedDict[str, _Slot] = OrderedDict()
_slots_lock = threading.Lock()


def _index(uri: str) -> Container:
    """The container at a normalized URI; a local one is read again if the file has changed."""
    with _slots_lock:
        slot = _slots.setdefault(uri, _Slot())
        _slots.move_to_end(uri)
        while len(_slots) > _CACHED:
            _slots.popitem(last=False)
    return retried(uri, lambda: _current(uri, slot))


def _current(uri: str, slot: _Slot) -> Container:
    version = local_version(uri)
    if slot.current and slot.current[0] == version:
        return slot.current[1]
    with slot.lock:
        if not slot.current or slot.current[0] != version:  # else another thread has read it
            slot.current = version, (read_zip if uri.lower().endswith(".zip") else read_tar)(uri)
        return slot.current[1]

"""List folders with millions of files without keeping the list in memory."""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pyarrow import fs

from cxr.storage import s3
from cxr.storage.containers import FileEntry, list_members
from cxr.storage.errors import storage_error
from cxr.storage.filesystems import check_regular, file_info, filesystem, special_kind
from cxr.storage.retries import retried
from cxr.storage.uri import is_local, local_uri, name, normalize, split_member

PARTIAL_SUFFIX = ".partial"
_S3_LISTINGS = 16  # folders of a bucket that are listed at the same time
_PARTIAL = re.compile(rf"\..*\.[0-9a-f]{{8}}\{PARTIAL_SUFFIX}")  # a local file while it is written


def list_files(uri: str, special: Counter[str] | None = None) -> Iterator[FileEntry]:
    """Every file below the URI (or the file at the URI), in no particular order.

    Symbolic links are followed, each folder once. A broken link is listed too: it fails when it is read. What is
    renamed or deleted during the listing may be missing. Members of a container are listed below `CONTAINER!`, not
    below the folder that contains it.

    Args:
        special: counts what is skipped, by kind: pipes, sockets, devices and unsafe members of containers.

    Raises:
        NotFoundError: the URI is neither a file nor a folder.
        StorageError: it cannot be listed, or its server does not respond.
    """
    uri, special = normalize(uri), Counter() if special is None else special
    if split_member(uri):
        return list_members(uri, special)
    if is_local(uri):
        entries = _list_local(uri, special)
    else:
        entries = _list_s3(uri) if uri.startswith("s3://") else _list_gcs(uri)
    return _unambiguous(entries, special)


def _unambiguous(entries: Iterator[FileEntry], special: Counter[str]) -> Iterator[FileEntry]:
    """Leave out files whose URIs are those of members of a container: below a folder named like "a.zip!"."""
    for entry in entries:
        if split_member(entry.uri):
            special["name with .zip!/ or .tar!/"] += 1
        else:
            yield entry


def _list_local(root: str, special: Counter[str]) -> Iterator[FileEntry]:
    try:
        if not os.path.isdir(root):  # noqa: PTH112
            check_regular(root)
            yield _local_entry(root, name(root), os.stat(root))  # noqa: PTH116
            return
        for entry, status in _walk(root, special):
            path = os.path.relpath(os.fsencode(entry.path), os.fsencode(root))
            yield _local_entry(entry.path, path.decode("utf-8", "backslashreplace"), status)
    except OSError as error:
        raise storage_error(error.filename or root, error) from error


def _local_entry(file: str, path: str, status: os.stat_result | None) -> FileEntry:
    if status is None:
        return FileEntry(local_uri(file), path, 0)
    return FileEntry(local_uri(file), path, status.st_size, str(status.st_mtime_ns))


def _walk(root: str, special: Counter[str]) -> Iterator[tuple[os.DirEntry[str], os.stat_result | None]]:
    """Files below a folder with their status, and broken links without one."""
    pending, visited = [root], set()
    while pending:
        folder = pending.pop()
        try:
            status = os.stat(folder)  # noqa: PTH116
            entries = os.scandir(folder)
        except FileNotFoundError:
            if folder == root:
                raise
            continue  # renamed or deleted since it was listed
        with entries:
            if (status.st_dev, status.st_ino) in visited:
                continue
            visited.add((status.st_dev, status.st_ino))
            for entry in entries:
                if _PARTIAL.fullmatch(entry.name):
                    continue
                try:
                    status = _status(entry)
                except FileNotFoundError:
                    continue
                if status and stat.S_ISDIR(status.st_mode):
                    pending.append(entry.path)
                elif status and (kind := special_kind(status.st_mode)):
                    special[kind] += 1
                else:
                    yield entry, status


def _status(entry: os.DirEntry[str]) -> os.stat_result | None:
    """The status of an entry or of its link target; None for a broken link."""
    try:
        return entry.stat()
    except OSError:
        if entry.is_symlink():
            return None
        raise


def _list_s3(uri: str) -> Iterator[FileEntry]:
    bucket, _, key = uri.removeprefix("s3://").partition("/")
    prefix = f"{key}/" if key else ""
    exists = not key
    for page in _s3_pages(uri, bucket, prefix):
        for item in page.get("Contents", ()):
            exists = True
            if not item["Key"].endswith("/"):  # else the marker of an empty folder
                path = item["Key"].removeprefix(prefix)
                yield FileEntry(f"s3://{bucket}/{item['Key']}", path, item["Size"], item["ETag"].strip('"'))
    if not exists:
        yield _single(uri)


def _s3_pages(uri: str, bucket: str, prefix: str) -> Iterator[dict[str, Any]]:
    """Pages that together list all objects below a prefix, each once.

    If a page does not hold all objects, and one holds the names of the folders, these are listed at the same time,
    because a page of a listing can be requested only after the one before it.
    """

    def fetch(request: dict[str, Any]) -> dict[str, Any]:
        return retried(uri, lambda: s3.client(bucket).list_objects_v2(Bucket=bucket, **request))

    def next_of(request: dict[str, Any], page: dict[str, Any]) -> list[dict[str, Any]]:
        return [{**request, "ContinuationToken": page["NextContinuationToken"]}] if page.get("IsTruncated") else []

    first: dict[str, Any] = {"Prefix": prefix}
    page = fetch(first)
    yield page
    requests = next_of(first, page)
    if requests:
        last = page["Contents"][-1]["Key"]
        top = fetch({"Prefix": prefix, "Delimiter": "/"})
        while len(top.get("CommonPrefixes", ())) == 1 and not top.get("Contents"):
            top = fetch({"Prefix": top["CommonPrefixes"][0]["Prefix"], "Delimiter": "/"})
        if not top.get("IsTruncated"):
            yield {"Contents": [item for item in top.get("Contents", ()) if item["Key"] > last]}
            folders = [folder["Prefix"] for folder in top.get("CommonPrefixes", ())]
            requests = [
                {"Prefix": folder, "StartAfter": last}
                for folder in folders
                if folder > last or last.startswith(folder)
            ]
    with ThreadPoolExecutor(_S3_LISTINGS) as pool:
        while requests:
            now, requests = requests[:_S3_LISTINGS], requests[_S3_LISTINGS:]
            for request, page in zip(now, pool.map(fetch, now), strict=True):
                yield page
                requests += next_of(request, page)


def _list_gcs(uri: str) -> Iterator[FileEntry]:
    filesystem_, path = filesystem(uri)
    if retried(uri, lambda: file_info(uri)).type != fs.FileType.Directory:
        yield _single(uri)
        return
    selector = fs.FileSelector(path, recursive=True)
    for info in retried(uri, lambda: filesystem_.get_file_info(selector)):
        if info.type == fs.FileType.File:
            yield FileEntry(f"gs://{info.path}", info.path.removeprefix(f"{path}/"), info.size, str(info.mtime_ns))


def _single(uri: str) -> FileEntry:
    info = retried(uri, lambda: file_info(uri))
    if info.type != fs.FileType.File:
        raise storage_error(uri, FileNotFoundError(uri))
    version = s3.etag(uri.removeprefix("s3://")) if uri.startswith("s3://") else str(info.mtime_ns)
    return FileEntry(uri, name(uri), info.size, version)

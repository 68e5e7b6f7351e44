"""Reading, writing, copying and deleting files by URI."""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from pyarrow import fs

from cxr.storage.filesystems import file_info, filesystem
from cxr.storage.listing import PARTIAL_SUFFIX, list_files
from cxr.storage.retries import retried
from cxr.storage.uri import StorageError, is_local, join, normalise

_COPY_THREADS = 8


def read_bytes(uri: str) -> bytes:
    """The whole file.

    Raises:
        NotFound: there is no such file, or no such bucket.
        StorageError: it may not be read, or its server does not answer.
    """

    def read() -> bytes:
        with _reading(uri) as stream:
            return stream.read()

    return retried(uri, read)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file, its folders too. A reader sees the old file or the whole new one, never a part."""

    def write() -> None:
        with _writing(uri) as stream:
            stream.write(data)

    retried(uri, write)


def read_text(uri: str) -> str:
    return read_bytes(uri).decode()


def write_text(uri: str, text: str) -> None:
    write_bytes(uri, text.encode())


def read_json(uri: str) -> Any:
    data = read_bytes(uri)
    try:
        return json.loads(data)
    except ValueError as error:
        raise StorageError(f"{uri} is not JSON ({error}): write it again, or point to another file") from None


def write_json(uri: str, value: Any) -> None:
    write_text(uri, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def exists(uri: str) -> bool:
    """Whether a file or a folder lies at the URI. An empty folder exists on local disks alone."""
    return retried(uri, lambda: file_info(uri)).type != fs.FileType.NotFound


def delete(uri: str) -> None:
    """Delete a file, or a folder with all that is in it. Where nothing lies, nothing happens.

    Raises:
        StorageError: it may not be deleted, or is a whole disk or bucket.
    """
    filesystem_, path = filesystem(uri)
    if not path.strip("/") or (not is_local(uri) and "/" not in path):
        raise StorageError(f"{uri} is a whole disk or bucket, which is never deleted: name a folder in it")

    def remove() -> None:
        found = file_info(uri).type
        if found == fs.FileType.Directory:
            filesystem_.delete_dir(path)
        elif found != fs.FileType.NotFound:
            filesystem_.delete_file(path)

    retried(uri, remove)


def upload_folder(local: Path, uri: str) -> None:
    """Copy the files of a local folder to below a URI, several at once."""
    _copy_all([(entry.uri, join(uri, entry.path)) for entry in list_files(str(local))])


def download_folder(uri: str, local: Path) -> None:
    """Copy the files below a URI into a local folder, several at once."""
    pairs = [(entry.uri, join(str(local), entry.path)) for entry in list_files(uri)]
    for source, target in pairs:
        if not Path(normalise(target)).is_relative_to(normalise(local)):
            raise StorageError(f"{source} would land outside {local}: rename it and try again")
    _copy_all(pairs)


def _copy_all(pairs: list[tuple[str, str]]) -> None:
    with ThreadPoolExecutor(_COPY_THREADS) as pool:
        list(pool.map(_copy, *zip(*pairs, strict=True)) if pairs else ())


def _copy(source: str, target: str) -> None:
    def copy() -> None:
        with _reading(source) as reader, _writing(target) as writer:
            shutil.copyfileobj(reader, writer, 8 << 20)

    retried(source if is_local(target) else target, copy)


@contextmanager
def _reading(uri: str) -> Iterator[BinaryIO]:
    if is_local(uri):
        with open(normalise(uri), "rb") as stream:
            yield stream
        return
    filesystem_, path = filesystem(uri)
    with filesystem_.open_input_stream(path) as stream:
        yield cast(BinaryIO, stream)


@contextmanager
def _writing(uri: str) -> Iterator[BinaryIO]:
    """A stream whose bytes appear at the URI when the block ends well, and not at all when it does not."""
    if is_local(uri):
        with _replacing(Path(normalise(uri))) as stream:
            yield stream
        return
    filesystem_, path = filesystem(uri)
    stream = filesystem_.open_output_stream(path)
    try:
        yield cast(BinaryIO, stream)
    except BaseException:
        stream.close()  # pyarrow cannot abandon an upload
        filesystem_.delete_file(path)
        raise
    stream.close()


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    try:
        with partial.open("xb") as stream:
            yield stream
        os.replace(partial, path)  # noqa: PTH105
    finally:
        partial.unlink(missing_ok=True)

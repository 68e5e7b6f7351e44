"""Reading, writing, copying and deleting files by URI."""

from __future__ import annotations

import io
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from boto3.s3.transfer import TransferConfig
from pyarrow import fs

from cxr.storage import s3
from cxr.storage.filesystems import file_info, filesystem
from cxr.storage.listing import PARTIAL_SUFFIX, check_regular, list_files
from cxr.storage.retries import retried
from cxr.storage.uri import NotFoundError, StorageError, check_no_empty_folder, is_local, join, normalize

HEAD_BYTES = 4096  # of a file, that `read_bytes` gives to its check
_COPY_THREADS = 8
_PROBE_BYTES = 1 << 16
_PIECE = 8 << 20  # bytes copied at a time
_IN_PARTS = TransferConfig(multipart_threshold=4 * _PIECE, multipart_chunksize=2 * _PIECE, use_threads=False)


def read_bytes(uri: str, *, check: Callable[[bytes, int], None] | None = None) -> bytes:
    """The whole file.

    Args:
        check: called with the first `HEAD_BYTES` bytes and the size of the file before the rest is read, and again if
            reading is tried again; what it raises ends the reading.

    Raises:
        NotFound: there is no such file, or no such bucket.
        StorageError: it may not be read, or its server does not answer.
    """

    def read() -> bytes:
        with _reading(uri) as (stream, size):
            if check is None:
                return stream.read()
            head = stream.read(HEAD_BYTES)
            check(head, size)
            return head + stream.read(max(0, size - len(head)))

    return retried(uri, read)


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file, its folders too. A reader sees the old file or the whole new one, never a part."""
    retried(uri, lambda: _put(uri, io.BytesIO(data)))


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


def check_readable(uri: str) -> None:
    """List the first file below the URI.

    Raises:
        NotFound: nothing lies there.
        StorageError: it may not be listed, or does not answer.
    """
    if next(list_files(uri), None) is None:
        raise NotFoundError(f"{uri} is an empty folder: correct the URI, or fill it first")


def check_writable(folder: str) -> None:
    """Write a small file into a folder that need not be there yet, and delete it where that is allowed.

    Raises:
        StorageError: files cannot be written there, or it is a file itself.
    """
    check_no_empty_folder(folder)
    if not is_local(folder):
        probe = join(folder, ".writable")
        write_bytes(probe, b"?")
        with suppress(StorageError):
            delete(probe)
        return
    place = Path(normalize(folder))
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise StorageError(f"expected a folder, got the file {place}: give another folder, or delete the file")

    def probe_disk() -> None:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(_PROBE_BYTES))

    retried(str(place), probe_disk)


def upload_folder(local: Path, uri: str) -> None:
    """Copy the files of a local folder to below a URI, several at once."""
    _copy_all([(entry.uri, join(uri, entry.path)) for entry in list_files(str(local))])


def download_folder(uri: str, local: Path) -> None:
    """Copy the files below a URI into a local folder, several at once."""
    pairs = [(entry.uri, join(str(local), entry.path)) for entry in list_files(uri)]
    for source, target in pairs:
        if not Path(normalize(target)).is_relative_to(normalize(local)):
            raise StorageError(f"{source} would land outside {local}: rename it and try again")
    _copy_all(pairs)


def _copy_all(pairs: list[tuple[str, str]]) -> None:
    with ThreadPoolExecutor(_COPY_THREADS) as pool:
        list(pool.map(_copy, *zip(*pairs, strict=True)) if pairs else ())


def _copy(source: str, target: str) -> None:
    def copy() -> None:
        with _reading(source) as (reader, _):
            _put(target, reader)

    retried(source if is_local(target) else target, copy)


def _opened(path: str) -> BinaryIO:
    check_regular(path)
    return open(path, "rb")


@contextmanager
def _reading(uri: str) -> Iterator[tuple[BinaryIO, int]]:
    """The file opened for reading once from start to end, and its size in bytes."""
    if is_local(uri):
        with _opened(normalize(uri)) as stream:
            size = stream.seek(0, os.SEEK_END)
            stream.seek(0)
            yield stream, size
        return
    filesystem_, path = filesystem(uri)
    if uri.startswith("s3://"):
        stream, size = s3.open_object(path)
        with closing(stream):
            yield stream, size
        return
    with filesystem_.open_input_file(path) as stream:
        yield cast(BinaryIO, stream), stream.size()


def fetched(uri: str) -> BinaryIO:
    """The file opened for reading; a remote one is copied here first, so that no connection is lost later on."""

    def fetch() -> BinaryIO:
        if is_local(uri):
            return _opened(normalize(uri))
        with ExitStack() as stack:
            copy = stack.enter_context(tempfile.TemporaryFile())
            with _reading(uri) as (stream, _):
                shutil.copyfileobj(stream, copy, _PIECE)
            copy.seek(0)
            stack.pop_all()
            return cast(BinaryIO, copy)

    return retried(uri, fetch)


@contextmanager
def writing(uri: str) -> Iterator[BinaryIO]:
    """A stream whose bytes appear at the URI when the block ends well, and not at all when it does not."""
    if is_local(uri):
        with _replacing(Path(normalize(uri))) as stream:
            yield stream
        return
    with tempfile.TemporaryFile() as stream:
        yield cast(BinaryIO, stream)
        stream.flush()

        def send() -> None:
            with os.fdopen(os.dup(stream.fileno()), "rb") as again:  # boto3 closes what it could not send
                again.seek(0)
                _put(uri, again)

        retried(uri, send)


def _put(uri: str, source: BinaryIO) -> None:
    """Write what `source` still holds, whole or not at all: S3 shows an object once all of it has come."""
    filesystem_, path = filesystem(uri)
    if is_local(uri):
        with _replacing(Path(path)) as target:
            shutil.copyfileobj(source, target, _PIECE)
    elif uri.startswith("s3://"):
        bucket, key = s3.split(path)
        s3.client(bucket).upload_fileobj(source, bucket, key, Config=_IN_PARTS)
    else:
        _put_gcs(filesystem_, path, source)


def _put_gcs(files: fs.FileSystem, path: str, source: BinaryIO) -> None:
    target = files.open_output_stream(path)
    try:
        shutil.copyfileobj(source, cast(BinaryIO, target), _PIECE)
    except BaseException:
        with suppress(OSError):
            target.close()  # pyarrow cannot abandon an upload
        with suppress(OSError):
            files.delete_file(path)
        raise
    target.close()


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

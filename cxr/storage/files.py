"""Reading, writing, copying and deleting files by URI."""

from __future__ import annotations

import errno
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
from cxr.storage.containers import member_exists, open_member
from cxr.storage.filesystems import file_info, filesystem
from cxr.storage.inflate import gunzipped, is_gzipped_image
from cxr.storage.listing import PARTIAL_SUFFIX, list_files
from cxr.storage.ranges import open_local, read_up_to
from cxr.storage.recorded_reads import record_read
from cxr.storage.retries import retried
from cxr.storage.s3_upload import uploaded
from cxr.storage.uri import (
    NotFoundError,
    StorageError,
    check_utf8,
    check_writable_uri,
    is_local,
    join,
    normalize,
    split_member,
)

HEAD_BYTES = 4096  # first bytes of a file, which `read_bytes` passes to its check
_COPY_THREADS = 8
_PROBE_BYTES = 1 << 16
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS}  # exFAT, FUSE and SMB
_CHUNK = 8 << 20  # bytes copied at a time
_IN_PARTS = TransferConfig(multipart_threshold=4 * _CHUNK, multipart_chunksize=2 * _CHUNK, use_threads=False)


def read_bytes(uri: str, *, check: Callable[[bytes, int], None] | None = None) -> bytes:
    """Read a whole file, which may be a member of a container. `.dcm.gz` files are decompressed.

    Args:
        check: called with the first `HEAD_BYTES` bytes and the size of the file before the rest is read, and again
            on every retry; an exception that it raises ends the reading.

    Raises:
        NotFoundError: the file does not exist.
        StorageError: it cannot be read, or its server does not respond.
    """

    def read() -> bytes:
        with _reading(uri) as (stream, size):
            if is_gzipped_image(uri):
                stream, size = gunzipped(uri, stream, size)
            if check is None:
                return stream.read()
            head = read_up_to(stream, HEAD_BYTES)
            check(head, size)
            return head + read_up_to(stream, max(0, size - len(head)))

    record_read(uri)
    return retried(uri, read)


def read_start(uri: str, size: int) -> tuple[bytes, int]:
    """Read the first `size` bytes of a file, and the size of the whole file; otherwise like `read_bytes`.

    One ranged request reads an object on S3.

    Raises:
        NotFoundError: the file does not exist.
        StorageError: it cannot be read, or its server does not respond.
    """

    def read() -> tuple[bytes, int]:
        if uri.startswith("s3://") and not (split_member(uri) or is_gzipped_image(uri)):
            return s3.read_start(filesystem(uri)[1], size)
        with _reading(uri) as (stream, total):
            if is_gzipped_image(uri):
                stream, total = gunzipped(uri, stream, total)
            return read_up_to(stream, size), total

    return retried(uri, read)


def write_bytes(uri: str, data: bytes, *, private: bool = False) -> None:
    """Write a file and create its folders. Readers see the old file or the complete new one, never a part.

    Args:
        private: only the owner may read a local file, and its folder if it is new.
    """
    retried(uri, lambda: _put(uri, io.BytesIO(data), private))


def write_new(uri: str, data: bytes, *, private: bool = False) -> bool:
    """Write a local file like `write_bytes` unless it exists; return whether it was written.

    On file systems without hard links, a file that appears in the meantime is replaced.
    """

    def write() -> bool:
        try:
            with _replacing(Path(normalize(uri)), private, _link) as target:
                target.write(data)
        except FileExistsError:
            return False
        return True

    return retried(uri, write)


def read_text(uri: str) -> str:
    return read_bytes(uri).decode()


def write_text(uri: str, text: str) -> None:
    write_bytes(uri, text.encode())


def read_json(uri: str) -> Any:
    data = read_bytes(uri)
    try:
        return json.loads(data)
    except ValueError as error:
        raise StorageError(f"{uri} is not valid JSON ({error}): rewrite it, or use another file") from None


def write_json(uri: str, value: Any) -> None:
    write_text(uri, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def exists(uri: str) -> bool:
    """Whether the URI is a file or a folder. Empty folders exist only on local disks."""
    record_read(uri)
    if split_member(normalize(uri)):
        return member_exists(uri)
    return retried(uri, lambda: file_info(uri)).type != fs.FileType.NotFound


def is_folder(uri: str) -> bool:
    """Whether the URI is a folder that is not empty, or a local one."""
    return retried(uri, lambda: file_info(uri)).type == fs.FileType.Directory


def delete(uri: str) -> None:
    """Delete a file, or a folder with its contents. Does nothing if the URI does not exist.

    Raises:
        StorageError: it cannot be deleted, or it is a whole disk or bucket.
    """
    filesystem_, path = filesystem(uri)
    if not path.strip("/") or (not is_local(uri) and "/" not in path):
        raise StorageError(f"{uri} is a whole disk or bucket, which is never deleted: use a folder inside it")

    def remove() -> None:
        file_type = file_info(uri).type
        if file_type == fs.FileType.Directory:
            filesystem_.delete_dir(path)
        elif file_type != fs.FileType.NotFound:
            filesystem_.delete_file(path)

    retried(uri, remove)


def check_readable(uri: str) -> None:
    """Check that there is a file at or below the URI by listing the first one.

    Raises:
        NotFoundError: it does not exist, or it is an empty folder.
        StorageError: it cannot be listed, its path is not valid UTF-8, or its server does not respond.
    """
    check_utf8(normalize(uri))
    if next(list_files(uri), None) is None:
        raise NotFoundError(f"{uri} is an empty folder: correct the URI, or add files first")


def check_writable(folder: str) -> None:
    """Check that files can be written to a folder, which need not exist yet.

    Writes a small file and deletes it again, if deleting is allowed.

    Raises:
        StorageError: files cannot be written there, or `folder` is a file.
    """
    check_writable_uri(folder)
    if not is_local(folder):
        probe = join(folder, ".writable")
        write_bytes(probe, b"?")
        with suppress(StorageError):
            delete(probe)
        return
    parent = Path(normalize(folder))
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise StorageError(f"expected a folder, got the file {parent}: choose another folder, or delete the file")

    def probe_disk() -> None:
        with tempfile.TemporaryFile(dir=parent) as file:
            file.write(bytes(_PROBE_BYTES))

    retried(str(parent), probe_disk)


def upload_folder(local: Path, uri: str) -> None:
    """Copy the files of a local folder to a folder at a URI, several at a time."""
    _copy_all([(entry.uri, join(uri, entry.path)) for entry in list_files(str(local))])


def download_folder(uri: str, local: Path) -> None:
    """Copy the files of the folder at a URI into a local folder, several at a time."""
    pairs = [(entry.uri, join(str(local), entry.path)) for entry in list_files(uri)]
    for source, target in pairs:
        if not Path(normalize(target)).is_relative_to(normalize(local)):
            raise StorageError(f"{source} would be written outside {local}: rename it and try again")
    _copy_all(pairs)


def _copy_all(pairs: list[tuple[str, str]]) -> None:
    with ThreadPoolExecutor(_COPY_THREADS) as pool:
        list(pool.map(_copy, *zip(*pairs, strict=True)) if pairs else ())


def _copy(source: str, target: str) -> None:
    def copy() -> None:
        with _reading(source) as (reader, _):
            _put(target, reader)

    retried(source if is_local(target) else target, copy)


@contextmanager
def _reading(uri: str) -> Iterator[tuple[BinaryIO, int]]:
    """Open a file for one sequential read; yields the stream and the size in bytes."""
    if split_member(normalize(uri)):
        with open_member(uri) as (member, size):
            yield cast(BinaryIO, member), size
        return
    if is_local(uri):
        with open_local(normalize(uri)) as stream:
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


def open_local_copy(uri: str) -> BinaryIO:
    """Open a file for reading. A remote file is first copied to a temporary file, so that later reads cannot fail."""

    def fetch() -> BinaryIO:
        if is_local(uri):
            return open_local(normalize(uri))
        with ExitStack() as stack:
            copy = stack.enter_context(tempfile.TemporaryFile())
            with _reading(uri) as (stream, _):
                shutil.copyfileobj(stream, copy, _CHUNK)
            copy.seek(0)
            stack.pop_all()
            return cast(BinaryIO, copy)

    return retried(uri, fetch)


@contextmanager
def atomic_writer(uri: str) -> Iterator[BinaryIO]:
    """A stream whose bytes appear at the URI if the block ends without an exception, and not at all otherwise.

    The bytes are uploaded to S3 while they are written, up to 64 MiB being in memory.
    """
    if is_local(uri):
        with _replacing(Path(normalize(uri))) as stream:
            yield stream
        return
    if uri.startswith("s3://"):
        check_writable_uri(uri)
        with uploaded(uri, filesystem(uri)[1]) as upload:
            yield cast(BinaryIO, upload)
        return
    with tempfile.TemporaryFile() as stream:
        yield cast(BinaryIO, stream)
        stream.flush()

        def send() -> None:
            with os.fdopen(
                os.dup(stream.fileno()), "rb"
            ) as duplicate:  # boto3 closes a stream that it failed to send
                duplicate.seek(0)
                _put(uri, duplicate)

        retried(uri, send)


def _put(uri: str, source: BinaryIO, private: bool = False) -> None:
    """Write the rest of `source`, completely or not at all: an object on S3 appears once its upload is complete."""
    if split_member(normalize(uri)):
        check_writable_uri(uri)
    filesystem_, path = filesystem(uri)
    if is_local(uri):
        with _replacing(Path(path), private) as target:
            shutil.copyfileobj(source, target, _CHUNK)
    elif uri.startswith("s3://"):
        bucket, key = s3.split(path)
        s3.client(bucket).upload_fileobj(source, bucket, key, Config=_IN_PARTS)
    else:
        _put_gcs(filesystem_, path, source)


def _put_gcs(files: fs.FileSystem, path: str, source: BinaryIO) -> None:
    target = files.open_output_stream(path)
    try:
        shutil.copyfileobj(source, cast(BinaryIO, target), _CHUNK)
    except BaseException:
        with suppress(OSError):
            target.close()  # pyarrow cannot abandon an upload
        with suppress(OSError):
            files.delete_file(path)
        raise
    target.close()


@contextmanager
def _replacing(
    path: Path, private: bool = False, publish: Callable[[Path, Path], None] | None = None
) -> Iterator[BinaryIO]:
    """Write to a temporary file, which `publish` then gives its name; the default replaces a file of this name."""
    path.parent.mkdir(0o700 if private else 0o777, parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with open(os.open(partial, flags, 0o600 if private else 0o666), "wb") as stream:
            yield stream
        (publish or os.replace)(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _link(partial: Path, path: Path) -> None:
    """Unlike a rename, a link never replaces a file, but not all file systems have links."""
    try:
        os.link(partial, path)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        os.replace(partial, path)  # noqa: PTH105

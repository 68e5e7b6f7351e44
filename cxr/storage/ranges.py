"""Read parts of files by URI: one range from a given byte on, or a seekable file for parsers."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import BinaryIO, Protocol, cast

from cxr.storage import s3
from cxr.storage.filesystems import check_regular, filesystem
from cxr.storage.uri import is_local, normalize

_DRAINED = 1 << 16  # bytes left of a response that are read so that its connection can be used again


class ByteStream(Protocol):
    """A stream that is read once from start to end."""

    def read(self, size: int = -1, /) -> bytes: ...


@contextmanager
def open_range(uri: str, start: int, length: int) -> Iterator[ByteStream]:
    """Open a file for one sequential read of at most `length` bytes from `start`: one request on a remote store.

    The stream ends early if the file does. A local stream may continue beyond `length`.
    """
    if is_local(uri):
        with open_local(normalize(uri)) as file:
            file.seek(start)
            yield file
    elif uri.startswith("s3://"):
        stream = s3.open_object_range(filesystem(uri)[1], start, length)
        with closing(stream):
            yield stream
            stream.read(_DRAINED)
    else:
        filesystem_, path = filesystem(uri)
        with filesystem_.open_input_file(path) as file:
            file.seek(min(start, file.size()))
            yield cast(BinaryIO, file)


def read_range(uri: str, start: int, length: int) -> bytes:
    """At most `length` bytes from `start`; fewer if the file ends there."""
    with open_range(uri, start, length) as stream:
        return read_up_to(stream, length)


def read_up_to(stream: ByteStream, size: int) -> bytes:
    """`size` bytes, or all that are left.

    One `read` of a response may return less than that if its connection is lost; only the next one raises an error.
    """
    data = stream.read(size)
    while len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return data


def open_local(path: str) -> BinaryIO:
    """Open a local file for reading; raises UnreadableError for pipes, sockets and devices."""
    check_regular(path)
    return open(path, "rb")


def open_seekable(uri: str) -> BinaryIO:
    """Open a file for reading in any order. Each read is a request on a remote store."""
    if is_local(uri):
        return open_local(normalize(uri))
    filesystem_, path = filesystem(uri)
    return cast(
        BinaryIO, s3.RangeReader(*s3.split(path)) if uri.startswith("s3://") else filesystem_.open_input_file(path)
    )


def local_version(uri: str) -> tuple[int, int] | None:
    """Size and time of the last change of a local file, to notice that it was replaced; None if it is remote."""
    if not is_local(uri):
        return None
    status = os.stat(normalize(uri))  # noqa: PTH116
    return status.st_size, status.st_mtime_ns


class BlockReader(io.RawIOBase):
    """A file-like view of a function that reads at an offset; wrap it in io.BufferedReader to read in blocks."""

    def __init__(self, read_at: Callable[[int, int], bytes]) -> None:
        self._read_at, self._position = read_at, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END or (whence == io.SEEK_SET and offset < 0):
            raise ValueError("expected a position from the start of the file")
        self._position = offset + (self._position if whence == io.SEEK_CUR else 0)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        data = self._read_at(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)

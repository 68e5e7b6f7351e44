"""TAR files, compressed by gzip or not: an index of their members, each read by one range of bytes."""

from __future__ import annotations

import io
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from cxr.storage.gzip_random_access import GzipRandomAccess
from cxr.storage.inflate import STORED, InflatingStream, claim_problem
from cxr.storage.member_names import Names
from cxr.storage.ranges import BlockReader, ByteStream, open_local, open_range, read_range
from cxr.storage.uri import DamagedError, is_local, normalize, reject_damaged

_MAX_HEADER_BYTES = 1 << 20  # of a long name or of extended headers
_BLOCK = 1 << 20  # bytes of a remote file read at a time while its headers are read
_GZIP_BLOCK = 1 << 14
_READ_AT_ONCE = 16 << 20  # bytes; in pieces, threads that read neighbors would decompress many bytes twice


class TarMember(NamedTuple):
    """Where a member's content is, in bytes of the TAR file without compression."""

    size: int
    offset: int
    modified: float  # seconds since 1970
    problem: str | None  # why it cannot be read

    @property
    def version(self) -> str:
        return f"{self.modified:.6f}"


@dataclass(frozen=True)
class TarContainer:
    """The members of a TAR file; with `damage`, those before the damage."""

    uri: str
    members: dict[str, TarMember]
    skipped: Counter[str] = field(default_factory=Counter)
    damage: str | None = None
    gzip: GzipRandomAccess | None = None

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[ByteStream, int]]:
        """A stream of the content of a member without `problem`, for one sequential read, and its size in bytes.

        Raises:
            DamagedError: the member cannot be read.
        """
        member, uri = self.members[name], f"{self.uri}!/{name}"
        with self._open_range(member) as raw:
            yield InflatingStream(uri, raw, member.size, member.size, STORED, crc=None), member.size

    @contextmanager
    def _open_range(self, member: TarMember) -> Iterator[ByteStream]:
        if self.gzip is None:
            with open_range(self.uri, member.offset, member.size) as raw:
                yield raw
        elif member.size <= _READ_AT_ONCE:
            yield io.BytesIO(self.gzip.read_at(member.offset, member.size))
        else:
            content = BlockReader(self.gzip.read_at)
            content.seek(member.offset)
            yield content


def read_tar(uri: str) -> TarContainer:
    """Read all headers of a TAR file in one pass, without the contents between them unless it is compressed.

    Raises:
        DamagedError: there is no member before the damage.
    """
    if uri.lower().endswith(".tar"):
        with _open(uri) as file:
            return _index(uri, file, None)
    gzip = GzipRandomAccess(uri)
    return _index(uri, io.BufferedReader(BlockReader(gzip.read_at), _GZIP_BLOCK), gzip)


def _open(uri: str) -> BinaryIO:
    if is_local(uri):
        return open_local(normalize(uri))
    return io.BufferedReader(BlockReader(lambda offset, size: read_range(uri, offset, size)), _BLOCK)


def _index(uri: str, file: BinaryIO, gzip: GzipRandomAccess | None) -> TarContainer:
    names, members, damage = Names(uri), dict[str, TarMember](), None
    bounded = _Bounded(file)
    try:
        with tarfile.open(fileobj=bounded, mode="r:") as tar:  # pyright: ignore[reportArgumentType, reportCallIssue]
            position = -1
            while (info := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]
                if tar.offset <= position or info.size < 0:  # pyright: ignore[reportAttributeAccessIssue]
                    raise tarfile.ReadError("negative size")
                position = tar.offset  # pyright: ignore[reportAttributeAccessIssue]
                _add(info, names, members)
            # tarfile takes a damaged header for the end.
            bounded.seek(tar.offset)  # pyright: ignore[reportAttributeAccessIssue]
            if any(bounded.read(tarfile.BLOCKSIZE)):
                raise tarfile.ReadError("invalid header")
            while gzip and bounded.read(_GZIP_BLOCK):  # its checksum is at the end
                pass
    except (tarfile.TarError, DamagedError, ValueError, OverflowError, RecursionError, EOFError) as error:
        reason = error.__cause__ if isinstance(error, DamagedError) else error
        damage = f"damaged or truncated after {len(members):,} members ({' '.join(str(reason).split())[:80]})"
        if not members:
            reject_damaged(uri, "it is not a TAR file, or its first header is damaged")
    return TarContainer(uri, members, names.skipped, damage, gzip)


def _add(info: tarfile.TarInfo, names: Names, members: dict[str, TarMember]) -> None:
    if info.isdir():
        return
    if info.issym() or info.islnk():
        names.skipped["link"] += 1
    elif not info.isreg():
        names.skipped["device"] += 1
    elif name := names.add(info.name):
        problem = "it is a sparse file" if info.issparse() else claim_problem(info.size, info.size)
        members[name] = TarMember(info.size, info.offset_data, info.mtime, problem)


class _Bounded:
    """A seekable file that limits each read to the maximum size of a header."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if offset < 0:
            raise tarfile.ReadError("negative offset")
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= _MAX_HEADER_BYTES:
            raise tarfile.ReadError("a header that is too large")
        return self._file.read(size)

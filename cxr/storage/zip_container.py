"""ZIP files: the members that their directory lists, each read by one range of bytes."""

from __future__ import annotations

import io
import stat
import struct
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import BinaryIO, NamedTuple

from cxr.storage.inflate import STORED, InflatingStream, claim_problem, is_supported
from cxr.storage.member_names import Names
from cxr.storage.ranges import ByteStream, open_range, open_seekable, read_up_to
from cxr.storage.uri import DamagedError, reject_damaged

MAX_DIRECTORY_BYTES = 128 << 20  # of the directory; 400,000 members with names of 100 characters take 60 MiB
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra field
_SIGNATURE = b"PK\x03\x04"
_MAX_LOCAL_HEADER = _LOCAL_HEADER.size + 2 * 0xFFFF
_ENCRYPTED = 0x2041  # flags of encrypted data, strong encryption and masked headers (APPNOTE.TXT 4.4.4)
_METHODS = {9: "Deflate64", 93: "Zstandard", 95: "XZ", 96: "JPEG", 97: "WavPack", 98: "PPMd"}


class ZipMember(NamedTuple):
    """Where a member is, in bytes of the ZIP file."""

    size: int
    offset: int  # of its local header
    extent: int  # bytes from there to the next member or the directory
    compressed: int
    method: int
    crc: int
    problem: str | None  # why it cannot be read

    @property
    def version(self) -> str:
        return f"{self.crc:08x}"


@dataclass(frozen=True)
class ZipContainer:
    """The members of a ZIP file."""

    uri: str
    members: dict[str, ZipMember]
    skipped: Counter[str] = field(default_factory=Counter)
    damage: str | None = None

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[ByteStream, int]]:
        """A stream of the content of a member without `problem`, for one sequential read, and its size in bytes.

        Raises:
            DamagedError: the member cannot be read.
        """
        member, uri = self.members[name], f"{self.uri}!/{name}"
        with open_range(self.uri, member.offset, member.extent) as raw:
            header = read_up_to(raw, _LOCAL_HEADER.size)
            if len(header) < _LOCAL_HEADER.size:
                reject_damaged(uri, "it is truncated")
            signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(header)
            if signature != _SIGNATURE:
                reject_damaged(uri, "its header is missing")
            read_up_to(raw, name_bytes + extra_bytes)
            yield (
                InflatingStream(uri, raw, member.compressed, member.size, member.method, member.crc),
                member.size,
            )


def read_zip(uri: str) -> ZipContainer:
    """Read the directory at the end of a ZIP file: one or two requests on a remote store.

    Raises:
        DamagedError: the directory is missing, damaged or too large.
    """
    try:
        with open_seekable(uri) as file:
            directory = zipfile.ZipFile(_Bounded(file, uri))  # pyright: ignore[reportArgumentType]
            return _index(uri, directory)
    except DamagedError:  # which is a ValueError
        raise
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, OverflowError, EOFError) as error:
        reject_damaged(uri, f"its directory is missing or damaged ({' '.join(str(error).split())[:80]})")


def _index(uri: str, directory: zipfile.ZipFile) -> ZipContainer:
    names, members = Names(uri), dict[str, ZipMember]()
    entries = directory.infolist()
    starts = sorted({*(entry.header_offset for entry in entries), directory.start_dir})
    extents = {start: end - start for start, end in pairwise(starts)}
    repeated = Counter(entry.header_offset for entry in entries)
    for entry in entries:
        mode = entry.external_attr >> 16
        if entry.is_dir():
            continue
        if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
            names.skipped["link" if stat.S_ISLNK(mode) else "device"] += 1
        elif name := names.add(entry.filename):
            extent = extents.get(entry.header_offset, 0) if repeated[entry.header_offset] == 1 else 0
            members[name] = ZipMember(
                size=entry.file_size,
                offset=entry.header_offset,
                extent=min(extent, _MAX_LOCAL_HEADER + entry.compress_size),
                compressed=entry.compress_size,
                method=entry.compress_type,
                crc=entry.CRC,
                problem=_problem(entry, extent),
            )
    return ZipContainer(uri, members, names.skipped)


def _problem(entry: zipfile.ZipInfo, extent: int) -> str | None:
    method = entry.compress_type
    if entry.flag_bits & _ENCRYPTED:
        return "it is encrypted"
    if not is_supported(method):
        return f"its compression method is not supported ({_METHODS.get(method, method)})"
    if extent < _LOCAL_HEADER.size + entry.compress_size or entry.header_offset < 0:
        return "it overlaps other members"
    if method == STORED and entry.compress_size != entry.file_size:
        return "its header is damaged"
    return claim_problem(entry.file_size, entry.compress_size)


class _Bounded:
    """A seekable file that limits each read to the maximum size of a directory."""

    def __init__(self, file: BinaryIO, uri: str) -> None:
        self._file, self._uri = file, uri
        self._size = file.seek(0, io.SEEK_END)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_SET and offset < 0:
            raise zipfile.BadZipFile("negative offset")
        return self._file.seek(max(offset, -self._size) if whence == io.SEEK_END else offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def seekable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._size - self.tell())
        size = left if size < 0 else min(size, left)
        if size > MAX_DIRECTORY_BYTES:
            raise zipfile.BadZipFile(f"larger than {MAX_DIRECTORY_BYTES >> 20} MiB")
        return self._file.read(size)

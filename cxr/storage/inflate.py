"""Decompress files of untrusted size: never more than requested, without trusting sizes in headers."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import struct
import zlib
from typing import Protocol

from cxr.storage.ranges import ByteStream
from cxr.storage.uri import reject_damaged

MAX_BYTES = 2 << 30  # of a file without compression; images are limited to less when they are read
MAX_RATIO = 1000  # of a file's size to its compressed size; CSV files and X-rays stay far below
RATIO_EXEMPT_BYTES = 64 << 20  # smaller files may have any ratio: a blank image compresses well

STORED, DEFLATED, BZIP2, LZMA = 0, 8, 12, 14  # compression methods of ZIP files (APPNOTE.TXT 4.4.5)
GZIP = -1  # a gzip file
_GZIP_MAGIC = b"\x1f\x8b"
_GZIP_TRAILER = struct.Struct("<4xI")  # size modulo 2**32 (RFC 1952)
_GZIP_PADDING = bytes(4)  # as the size of the content, it would mean that there is none
_GZIP_MEMBER = re.compile(rb"\x1f\x8b\x08[\x00-\x1f].{4}[\x00\x02\x04][\x00-\x0d\xff]", re.DOTALL)  # its header
_GZIPPED_IMAGES = (".dcm.gz", ".dicom.gz")
_LZMA_HEADER = struct.Struct("<2xHBI")  # size of the properties, which are lc, lp, pb and the size of the dictionary
_LZMA_DICTIONARY = 256 << 20  # bytes; 7-Zip's largest preset uses 64 MiB
_CHUNK = 1 << 16
_PIECE = 4 << 20  # bytes of content read at a time if it is not compressed


class Decompressor(Protocol):
    """The interface that bz2 and lzma share."""

    @property
    def needs_input(self) -> bool: ...
    @property
    def eof(self) -> bool: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Zlib:
    """zlib with the interface of bz2 and lzma."""

    def __init__(self, wbits: int) -> None:
        self._zlib = zlib.decompressobj(wbits)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._zlib.eof

    def decompress(self, data: bytes, max_length: int) -> bytes:
        result = self._zlib.decompress(self._zlib.unconsumed_tail + data, max_length)
        self.needs_input = len(result) < max_length
        return result


def is_supported(method: int) -> bool:
    return method in (STORED, DEFLATED, BZIP2, LZMA)


def claim_problem(size: int, compressed: int) -> str | None:
    """Why a file of this claimed size is not decompressed at all; None if it may be."""
    if size > MAX_BYTES:
        return f"larger than {MAX_BYTES >> 30} GiB"
    if size > max(RATIO_EXEMPT_BYTES, MAX_RATIO * compressed):
        return "a decompression bomb"
    return None


class InflatingStream:
    """The content of a compressed file for one sequential read.

    Args:
        uri: for error messages.
        raw: the compressed bytes; at most `compressed` of them are read.
        size: the size that its header claims. More or less content is an error.
        crc: CRC-32 of the content; None if the format checks it itself.

    Reading raises DamagedError if the file is damaged or differs from what its header says.
    """

    def __init__(self, uri: str, raw: ByteStream, compressed: int, size: int, method: int, crc: int | None) -> None:
        self._uri, self._raw, self._compressed_left, self._left = uri, raw, compressed, size
        self._crc, self._expected_crc = 0, crc
        self._decompressor = None if method == STORED else self._open(method)

    def read(self, size: int = -1, /) -> bytes:
        remaining = self._left if size < 0 else min(size, self._left)
        pieces: list[bytes] = []
        while remaining:
            piece = self._piece(remaining)
            if not piece:
                reject_damaged(self._uri, "it is truncated")
            pieces.append(piece)
            remaining -= len(piece)
            self._left -= len(piece)
            self._crc = zlib.crc32(piece, self._crc)
        if not self._left:
            self._check_end()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _piece(self, limit: int) -> bytes:
        """Up to `limit` bytes of content; empty at its end."""
        if self._decompressor is None:
            return self._compressed(min(limit, _PIECE))
        while not self._decompressor.eof:
            data = self._compressed(_CHUNK) if self._decompressor.needs_input else b""
            at_end = self._decompressor.needs_input and not data
            try:
                piece = self._decompressor.decompress(data, limit)
            except (zlib.error, lzma.LZMAError, OSError, EOFError, ValueError):
                reject_damaged(self._uri, "its compressed data are damaged")
            if piece or at_end:
                return piece
        return b""

    def _compressed(self, size: int) -> bytes:
        data = self._raw.read(min(size, self._compressed_left))
        self._compressed_left -= len(data)
        return data

    def _check_end(self) -> None:
        if self._decompressor is not None and self._piece(1):
            reject_damaged(self._uri, "it is larger than its header says")
        if self._expected_crc is not None and self._crc != self._expected_crc:
            reject_damaged(self._uri, "its checksum is wrong")

    def _open(self, method: int) -> Decompressor:
        if method == BZIP2:
            return bz2.BZ2Decompressor()
        return self._open_lzma() if method == LZMA else _Zlib(31 if method == GZIP else -15)

    def _open_lzma(self) -> Decompressor:
        header = self._compressed(_LZMA_HEADER.size)
        if len(header) < _LZMA_HEADER.size:
            reject_damaged(self._uri, "it is truncated")
        properties_bytes, packed, dictionary = _LZMA_HEADER.unpack(header)
        packed, lc = divmod(packed, 9)
        pb, lp = divmod(packed, 5)
        if properties_bytes != 5 or pb > 4 or lc + lp > 4 or dictionary > _LZMA_DICTIONARY:
            reject_damaged(self._uri, "its LZMA settings are not supported")
        settings = {"id": lzma.FILTER_LZMA1, "lc": lc, "lp": lp, "pb": pb, "dict_size": max(dictionary, 4096)}
        return lzma.LZMADecompressor(lzma.FORMAT_RAW, filters=[settings])


def is_gzipped_image(uri: str) -> bool:
    """Whether the name is that of a compressed DICOM file, which is read as the DICOM file that it contains."""
    return uri.lower().endswith(_GZIPPED_IMAGES)


def gunzipped(uri: str, stream: ByteStream, size: int) -> tuple[ByteStream, int]:
    """The content of a gzip file and its size. A file that is not compressed is returned as it is."""
    if problem := claim_problem(size, size):
        reject_damaged(uri, problem)
    data = stream.read()
    if not data.startswith(_GZIP_MAGIC):
        return io.BytesIO(data), len(data)
    if data.endswith(_GZIP_PADDING) or _GZIP_MEMBER.search(data, 1):
        return _gunzipped_members(uri, data)
    content = _GZIP_TRAILER.unpack(data[-_GZIP_TRAILER.size :])[0] if len(data) >= 18 else 0
    if problem := claim_problem(content, len(data)):
        reject_damaged(uri, problem)
    return InflatingStream(uri, io.BytesIO(data), len(data), content, GZIP, crc=None), content


def _gunzipped_members(uri: str, data: bytes) -> tuple[ByteStream, int]:
    """Like `gunzipped` for several members or padding, after which the last bytes do not say the size of the content.

    The content is decompressed once to find its size, without keeping it.
    """
    size = 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as content:
            while piece := content.read(_PIECE):
                size += len(piece)
                if problem := claim_problem(size, len(data)):
                    reject_damaged(uri, problem)
    except (OSError, EOFError, zlib.error):
        reject_damaged(uri, "its compressed data are damaged")
    return gzip.GzipFile(fileobj=io.BytesIO(data)), size

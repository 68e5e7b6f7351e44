"""Random access to the content of a gzip file without unpacking it to disk."""

from __future__ import annotations

import threading
import zlib
from collections import deque
from dataclasses import dataclass
from typing import Any

from cxr.storage.ranges import read_range
from cxr.storage.uri import reject_damaged

_BLOCK = 4 << 20  # compressed bytes read at a time
_FED = 1 << 18  # compressed bytes given to zlib at a time
_STEP = 1 << 20  # bytes of content produced at a time
_SPACING = 8 << 20  # bytes of content between remembered states, at first
_MAX_STATES = 256  # of about 40 KiB; with more, every other one is dropped and the spacing doubles
_MAX_ENDS = 8
_MAX_RATIO = 200  # of the content to the compressed file, beyond _RATIO_EXEMPT
_RATIO_EXEMPT = 1 << 30
_MAGIC = b"\x1f\x8b"
_GZIP = 31  # wbits of zlib: a gzip header and trailer


@dataclass(frozen=True)
class _State:
    """A decompressor, with its position in the content and in the compressed file."""

    content: int
    compressed: int
    zlib: Any

    def copied(self) -> _State:
        return _State(self.content, self.compressed, self.zlib.copy())


class GzipRandomAccess:
    """Reads at any offset of the content, by continuing from the nearest remembered state before it.

    Reading forward decompresses every byte once; the first read near the end decompresses all of the file; a read
    anywhere else costs about `_SPACING` bytes, or 1/256 of a large file. Threads take turns.
    """

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._lock = threading.Lock()
        self._spacing = _SPACING
        # The decompressors of remembered states are only copied.
        self._states = [_State(0, 0, zlib.decompressobj(_GZIP))]  # by position
        self._ends = deque[_State](maxlen=_MAX_ENDS)  # where the last reads of this file's threads ended
        self._current = self._states[0]
        self._block_start, self._block = 0, b""

    def read_at(self, offset: int, size: int) -> bytes:
        """`size` bytes of the content from `offset`; fewer if it ends there.

        Raises:
            DamagedError: the compressed data are damaged or a decompression bomb.
        """
        with self._lock:
            before = [state for state in self._ends if state.content <= offset]
            before.append(next(state for state in reversed(self._states) if state.content <= offset))
            self._current = max(before, key=lambda state: state.content).copied()
            pieces = []
            while self._current.content < offset + size:
                start = self._current.content
                limit = offset - start if start < offset else offset + size - start
                piece = self._advance(min(limit, _STEP))
                if not piece:
                    break
                if start >= offset:
                    pieces.append(piece)
            self._ends.append(self._current)
            return b"".join(pieces)

    def _advance(self, limit: int) -> bytes:
        """Decompress up to `limit` bytes from the current position on; empty at the end of the content."""
        while True:
            state = self._current
            decompressor, data = state.zlib, self._compressed_at(state.compressed)
            if decompressor.eof:
                if not data.startswith(_MAGIC):  # the end, or padding
                    return b""
                decompressor = zlib.decompressobj(_GZIP)
            try:
                piece = decompressor.decompress(data, limit)
            except zlib.error:
                reject_damaged(self._uri, "its compressed data are damaged")
            left = decompressor.unused_data if decompressor.eof else decompressor.unconsumed_tail
            used = len(data) - len(left)
            self._current = _State(state.content + len(piece), state.compressed + used, decompressor)
            if self._current.content > max(_RATIO_EXEMPT, _MAX_RATIO * self._current.compressed):
                reject_damaged(self._uri, "it is a decompression bomb")
            if piece:
                self._remember()
                return piece
            if not data and not decompressor.eof:
                reject_damaged(self._uri, "it is truncated")

    def _remember(self) -> None:
        if self._current.content < self._states[-1].content + self._spacing:
            return
        self._states.append(self._current.copied())
        if len(self._states) > _MAX_STATES:
            self._states = self._states[::2]
            self._spacing *= 2

    def _compressed_at(self, position: int) -> bytes:
        """Compressed bytes from `position` on, at least the two of a magic number except at the end of the file."""
        at = position - self._block_start
        if not 0 <= at < len(self._block) - 1:
            self._block_start, self._block, at = position, read_range(self._uri, position, _BLOCK), 0
        return self._block[at : at + _FED]
